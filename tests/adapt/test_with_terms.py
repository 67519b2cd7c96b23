"""Terms in foreign trainers: what is added and logged, with accumulated batches too, and training by trl."""

import peft
import pytest
import torch
import transformers
from datasets import Dataset

from downriver.adapt import AlignGuard, FisherSubspace, LoRAMoE, LoRAMoEConfig, WithTerms, balance_term
from downriver.core import InputError
from downriver.models import small
from downriver.tasks.task import Task
from downriver.training import TokenRows
from downriver.training.trainer import Term

IDS = [[1, 7, 8, 9], [1, 17, 2, 4], [1, 30, 31, 32], [1, 40, 41, 2]]
ROWS = Dataset.from_dict({"input_ids": IDS, "labels": IDS})


class Guarded(WithTerms, transformers.Trainer):
    pass


def arguments(folder, **settings):
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    plain |= {"max_grad_norm": 1e9, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}
    return transformers.TrainingArguments(folder, **(plain | settings))


def size(model, batch, outputs):
    return sum(p.square().sum() for name, p in model.named_parameters() if "norm" in name)


def trained(folder, terms=(), batch=4, accumulate=1):
    model = small("causal-lm", "nano").backbone.eval()
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
    trainer = Guarded(model, arguments(folder, **settings), train_dataset=ROWS, terms=terms)
    trainer.train()
    return model, trainer.state.log_history[0]


def test_a_step_goes_down_loss_and_terms(tmp_path):
    base = small("causal-lm", "nano").backbone
    term = Term("size", 0.5, size)
    plain, guarded = trained(tmp_path)[0], trained(tmp_path, [term])
    for (name, p), q, r in zip(base.named_parameters(), plain.parameters(), guarded[0].parameters(), strict=True):
        expected = q - 0.1 * 0.5 * 2 * p if "norm" in name else q
        torch.testing.assert_close(r, expected, rtol=1e-4, atol=1e-6)
    assert guarded[1]["size"] == pytest.approx(float(size(base, None, None)))


def test_accumulated_batches_count_a_term_once(tmp_path):
    term = Term("size", 0.5, size)
    whole, parts = trained(tmp_path, [term])[0], trained(tmp_path, [term], batch=2, accumulate=2)[0]
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_has_the_trainers_own_loss(tmp_path):
    model = small("causal-lm", "nano").backbone
    trainers = [Guarded(model, arguments(tmp_path), eval_dataset=ROWS, terms=t) for t in ([], [Term("s", 9.0, size)])]
    assert trainers[0].evaluate()["eval_loss"] == trainers[1].evaluate()["eval_loss"]


def test_alignguard_in_trls_sft(tmp_path):
    trl = pytest.importorskip("trl")
    model = small("causal-lm", "nano")
    refusals = Dataset.from_dict({"text": ["I refuse.", "No, never."]})
    kept = Task("kept", "language-modelling", {"train": refusals}, ("text",), None)
    guard = AlignGuard(FisherSubspace.estimate(model, kept, rank=2), lam_a=10.0)
    adapted = peft.get_peft_model(model.backbone, peft.LoraConfig(r=2, target_modules=list(guard.subspace)))

    class Sft(WithTerms, trl.SFTTrainer):
        pass

    settings = trl.SFTConfig(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Sft(
        adapted, settings, train_dataset=Dataset.from_dict({"input_ids": IDS}), processing_class=model.processor,
        terms=guard.terms(),
    )  # fmt: skip
    trainer.train()
    logged = [row["alignguard fisher"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3 and logged[0] == 0 < logged[2]


def test_loramoe_in_a_foreign_trainer(tmp_path):
    rows = TokenRows("mix", {"train": Dataset.from_dict({"input_ids": IDS, "data_types": [1, 0, 1, 0]})})
    model = LoRAMoE(small("causal-lm", "nano"), LoRAMoEConfig(num_experts=4))
    routers = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    trainer = Guarded(
        model, arguments(tmp_path, max_steps=2, remove_unused_columns=False, learning_rate=0.03),
        train_dataset=rows.rows("train"), data_collator=rows.collate(model), terms=[balance_term(5.0)],
    )  # fmt: skip
    trainer.train()
    logged = [row["balance"] for row in trainer.state.log_history if "loss" in row]
    assert logged[1] < logged[0]
    assert all(not torch.equal(p, routers[n]) for n, p in model.named_parameters() if n in routers)


def test_a_term_must_give_one_number(tmp_path):
    with pytest.raises(InputError, match="term 'pair' gives"):
        trained(tmp_path, [Term("pair", 1.0, lambda model, batch, outputs: torch.ones(2))])
