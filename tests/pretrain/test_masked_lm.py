"""Masked language modelling: blocks without padding, the exact batch of tokens, what resumes, what is refused."""

import pytest
import torch

from downriver.core import InputError
from downriver.core.cost import metered
from downriver.models import byte_tokenizer, small
from downriver.pretrain.masked_lm import masked_lm
from downriver.training.rows import in_blocks

TEXTS = [f"the river number {i} runs to the sea" for i in range(60)]


def test_blocks_hold_every_token_in_order():
    tokenizer = byte_tokenizer(64)
    blocks = list(in_blocks(TEXTS, tokenizer, 50, batch=7))
    assert {len(block) for block in blocks} == {50}
    stream = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    assert [t for block in blocks for t in block] == stream[: len(blocks) * 50]
    assert len(stream) - len(blocks) * 50 < 50


def test_a_step_is_the_exact_number_of_tokens_however_it_is_cut():
    model = small("masked-lm", "nano")
    for part in (512, 128):
        with metered() as meter:
            trained = masked_lm(model, TEXTS, "2 steps", batch_tokens=512, part_tokens=part, learning_rate=1e-3)
        assert meter.cost.tokens == 2 * 512
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_a_budget_in_tokens_and_a_checkpoint_that_continues(tmp_path):
    model = small("masked-lm", "nano")
    whole = masked_lm(model, TEXTS, "4 steps", batch_tokens=256, checkpoints=tmp_path / "run")
    again = masked_lm(model, TEXTS, "4 steps", batch_tokens=256, checkpoints=tmp_path / "run")
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    with metered() as meter:
        masked_lm(model, TEXTS, "1000 tokens", batch_tokens=256)
    assert meter.cost.tokens <= 1000


def test_bad_input_is_named():
    with pytest.raises(InputError, match="a masked-lm is expected"):
        masked_lm(small("causal-lm", "nano"), TEXTS, "1 steps")
    with pytest.raises(InputError, match="one block of 128 tokens"):
        masked_lm(small("masked-lm", "nano"), TEXTS, "1 steps", batch_tokens=100)
    with pytest.raises(InputError, match="fill no block"):
        masked_lm(small("masked-lm", "nano"), ["short"], "1 steps")
