"""The DPO loss: its limits, its gradient, and agreement with trl on a real model."""

import importlib.util
import math

import pytest
import torch

from downriver.core.errors import InputError
from downriver.models import small
from downriver.nn.preference import dpo_loss, nll_anchor, sequence_logprobs


def draws(n=5, seed=0):
    return [
        -10 * torch.rand(n, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(4)
    ]


def test_the_formula():
    chosen, rejected, ref_chosen, ref_rejected = draws()
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3), torch.log(1 + torch.exp(-margin))
    )


def test_beta_zero_gives_log_two_and_no_gradient():
    chosen, rejected, *reference = draws()
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = dpo_loss(chosen, rejected, *reference, beta=0.0)
    torch.testing.assert_close(loss, torch.full((5,), math.log(2), dtype=torch.float64))
    loss.sum().backward()
    assert chosen.grad.abs().max() == 0 and rejected.grad.abs().max() == 0


def test_gradient_is_beta_times_the_chance_of_being_wrong():
    chosen, rejected, *reference = draws()
    chosen.requires_grad_(), rejected.requires_grad_()
    dpo_loss(chosen, rejected, *reference, beta=0.5).sum().backward()
    margin = 0.5 * ((chosen - reference[0]) - (rejected - reference[1])).detach()
    torch.testing.assert_close(chosen.grad, -0.5 * torch.sigmoid(-margin))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_sequence_logprobs_counts_labelled_tokens_only():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 6]])
    total, tokens = sequence_logprobs(logits, labels)
    logs = logits.log_softmax(-1)
    by_hand = [logs[0, 1, 3] + logs[0, 2, 4], logs[1, 0, 1] + logs[1, 1, 2] + logs[1, 2, 3] + logs[1, 3, 6]]
    torch.testing.assert_close(total, torch.stack(by_hand))
    assert tokens.tolist() == [2, 4]
    assert nll_anchor(total, tokens).item() == pytest.approx(-total.sum().item() / 6)


def test_bad_input():
    x = torch.zeros(3)
    with pytest.raises(InputError, match="beta is -1"):
        dpo_loss(x, x, x, x, -1)
    with pytest.raises(InputError, match=r"shapes \[\(3,\), \(3,\), \(2,\), \(3,\)\]"):
        dpo_loss(x, x, x[:2], x)
    with pytest.raises(InputError, match=r"labels \(2, 3\)"):
        sequence_logprobs(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_agreement_with_trl(tmp_path, anchor):
    import datasets
    from trl import DPOConfig, DPOTrainer

    policy, reference = small("causal-lm", "nano", seed=0), small("causal-lm", "nano", seed=1)
    rows = datasets.Dataset.from_list(
        [
            {"prompt": "one river", "chosen": " flows", "rejected": " stands still"},
            {"prompt": "the sea", "chosen": " is salt", "rejected": " is"},
        ]
    )
    config = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.2,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, anchor],
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer(
        policy.backbone, reference.backbone, args=config, train_dataset=rows, processing_class=policy.processor
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model.eval(), batch)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        mine, ref = (sequence_logprobs(m.eval()(**inputs)["logits"], labels) for m in (policy, reference))
    (chosen, rejected), (ref_chosen, ref_rejected) = mine[0].chunk(2), ref[0].chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2).mean() + anchor * nll_anchor(chosen, mine[1][:2])
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
