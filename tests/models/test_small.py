import pytest
import torch

from downriver import models
from downriver.core.errors import InputError
from downriver.models.small import KINDS, SIZES
from downriver.models.tokenizers import byte_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_model_and_sizes_grow(kind):
    def state(size, seed):
        return models.small(kind, size, seed).state_dict()

    torch.manual_seed(1)
    first, random_state = state("nano", 0), torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = state("nano", 0), state("nano", 1)
    assert all(v.equal(again[k]) for k, v in first.items()) and any(not v.equal(other[k]) for k, v in first.items())
    torch.manual_seed(1)
    assert random_state.equal(torch.random.get_rng_state())  # building one draws nothing from the caller's stream
    counts = [sum(v.numel() for v in state(size, 0).values()) for size in SIZES]
    assert counts == sorted(counts) and counts[0] * 10 < counts[-1] < 20_000_000


def test_the_source_of_a_small_model_loads_it_again():
    lm = models.small("causal-lm", "nano", 3)
    again = models.load(lm.source)
    assert all(a.equal(b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))


def test_the_tokenizer_is_the_bytes():
    tokenizer = byte_tokenizer(64)
    for text in ("plain", "  spaces\n\ttabs ", "žluťoučký kůň 🐎", "<s> looks special"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<s>")
        if "<s>" not in text:
            assert len(ids) == len(text.encode()) + 2
    assert len(tokenizer) == 260
    assert tokenizer("a", "b")["input_ids"].count(tokenizer.eos_token_id) == 2


def test_a_language_model_can_learn():
    lm = models.small("causal-lm", "nano").train()
    batch = lm.processor(["abcabcabcabc"] * 4, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    optimiser = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = lm(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 1


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'causal-lm'"):
        models.small("causal", "nano")
    with pytest.raises(InputError, match="unknown size 'large'"):
        models.small("vit", "large")
