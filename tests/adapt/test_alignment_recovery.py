"""Alignment recovery: what is put back and what is not, budgets, rollback, the patch, and what is refused."""

import copy
import math

import pytest
import torch

from downriver.adapt.alignment_recovery import _batches, recover_alignment
from downriver.core.errors import InputError
from downriver.models import small

HARM, TASK = ["Do harm.", "Do more harm now."], ["Sort this.", "Add."]
RATE = 0.01


@pytest.fixture(scope="module")
def models():
    """An aligned model, and one that moved a little."""
    aligned = small("causal-lm", "nano", seed=0)
    tuned = copy.deepcopy(aligned)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return aligned, tuned


def recovered(models, **settings):
    aligned, tuned = models
    settings = {"rate": RATE, "steps": 4, "rollback": False, "progress": False} | settings
    return recover_alignment(tuned, aligned, HARM, TASK, **settings)


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_equal_models_stay_equal(models):
    aligned, _ = models
    found = recover_alignment(aligned, aligned, HARM, TASK, steps=3, rollback=False, progress=False)
    assert found.mask.count == 0
    for name, value in parameters(found.model).items():
        assert torch.equal(value, parameters(aligned)[name])


def test_entries_are_the_aligned_models_or_untouched(models):
    aligned, tuned = models
    found = recovered(models)
    old, new, now = parameters(aligned), parameters(tuned), parameters(found.model)
    size = sum(p.numel() for p in new.values())
    budget = math.ceil(size * RATE)
    shares = [row["restored"] * size for row in found.history]
    assert all(0 < b - a <= budget + 1e-6 for a, b in zip([0, *shares], shares, strict=False))  # grows, within budget
    for name in now:
        where = found.mask.dense(name, now[name].shape)
        assert torch.equal(now[name][where], old[name][where])
        assert torch.equal(now[name][~where], new[name][~where])
        if where.any():
            assert "layers.0." in name and "norm" not in name  # two thirds of two layers are one
    assert found.mask.count == round(shares[-1]) and found.chosen_step == 4
    cosines = [row["cosine_harm"] for row in found.history]
    assert cosines[-1] > cosines[0]


def test_the_first_step_is_the_sign_test_and_one_global_threshold(models):
    aligned, tuned = models
    found = recovered(models, steps=1)
    model = copy.deepcopy(tuned).eval()
    [batch] = _batches(HARM, tuned.processor, 8, "harm")
    hidden = [m.eval().backbone(**batch, output_hidden_states=True).hidden_states[1][:, -1] for m in (model, aligned)]
    (-torch.cosine_similarity(hidden[0].mean(0), hidden[1].detach().mean(0), dim=0)).backward()
    old, new = parameters(aligned), parameters(tuned)
    flat = {}
    for name, parameter in model.named_parameters():
        if "layers.0." in name and "norm" not in name:
            approved = (new[name] - old[name]) * parameter.grad > 0
            flat[name] = (parameter.grad.abs() * approved).flatten()
    joined = torch.cat(list(flat.values()))
    chosen = torch.cat([found.mask.dense(name, (len(v),)) for name, v in flat.items()])
    k = math.ceil(sum(p.numel() for p in new.values()) * RATE)
    assert torch.equal(chosen.nonzero()[:, 0], joined.topk(k).indices.sort().values)


def test_rollback_takes_back_a_fifth_of_the_step(models):
    plain, rolled = recovered(models, steps=1), recovered(models, steps=1, rollback=True)
    assert rolled.rollback and 0 < rolled.mask.count < plain.mask.count
    assert rolled.mask.intersection(plain.mask).count == rolled.mask.count  # nothing else is touched
    assert plain.mask.count - rolled.mask.count <= math.ceil(0.2 * plain.mask.count)


def test_the_paper_schedule(models):
    """Too large a drop after five steps restarts with rollback; the last checkpoint that is good enough is taken."""
    scores = iter([1.0, 0.5, 0.99, 0.9])  # the fine-tuned model, step 5, then 5 and 10 with rollback
    found = recovered(models, steps=20, rollback="auto", task_metric=lambda model: next(scores))
    assert found.rollback and found.chosen_step == 5 and len(found.history) == 15
    scores = iter([1.0, 0.99, 0.2])
    found = recovered(models, steps=20, rollback="auto", task_metric=lambda model: next(scores))
    assert not found.rollback and found.chosen_step == 5
    scores = iter([1.0, 0.2, 0.2])
    found = recovered(models, steps=20, rollback="auto", task_metric=lambda model: next(scores))
    assert found.chosen_step == 0 and found.mask.count == 0


def test_the_patch_is_exact(models, tmp_path):
    _, tuned = models
    found = recovered(models)
    before = parameters(tuned)
    applied = found.patch.apply(before)
    assert all(torch.equal(applied[n], p) for n, p in parameters(found.model).items())
    assert all(torch.equal(v, before[n]) for n, v in found.patch.revert(applied).items())
    assert found.patch.about["method"] == "alignment_recovery"


def test_prompts_as_token_ids_and_padding_on_the_left(models):
    _, tuned = models
    ids = [tuned.processor(text)["input_ids"] for text in HARM]
    [batch] = _batches(ids, None, 8, "harm")
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    alone = tuned.backbone(torch.tensor([ids[0]])).logits[0, -1]
    torch.testing.assert_close(tuned.backbone(**batch).logits[0, -1], alone, rtol=1e-4, atol=1e-5)
    found = recover_alignment(tuned, models[0], ids, ids, rate=RATE, steps=1, rollback=False, progress=False)
    assert found.mask.count == recovered(models, steps=1).mask.count


def test_what_is_refused(models):
    aligned, tuned = models
    other = small("causal-lm", "tiny")
    with pytest.raises(InputError, match="differ in"):
        recover_alignment(tuned, other, HARM, TASK, rollback=False)
    with pytest.raises(InputError, match="harmful_prompts: a list"):
        recover_alignment(tuned, aligned, [], TASK, rollback=False)
    with pytest.raises(InputError, match="needs task_metric"):
        recover_alignment(tuned, aligned, HARM, TASK)
    with pytest.raises(InputError, match="rate is 0"):
        recovered(models, rate=0)
    with pytest.raises(InputError, match="layer_end is 5"):
        recovered(models, layer_end=5)
    with pytest.raises(InputError, match="there is no tokenizer"):
        recover_alignment(tuned.backbone, aligned.backbone, HARM, TASK, rollback=False)
    with pytest.raises(InputError, match="is a masked-lm model"):
        recover_alignment(small("masked-lm", "nano"), small("masked-lm", "nano"), HARM, TASK, rollback=False)
