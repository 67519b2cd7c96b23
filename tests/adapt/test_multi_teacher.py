"""Teachers: their own preprocessing, left as they were, and soft labels that are the same whenever computed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from downriver.adapt.multi_teacher import (
    Examples,
    SourceModel,
    as_sources,
    distillation,
    extra_heads,
    labelled,
    unlabelled,
)
from downriver.core import InputError, metered
from downriver.models import Model, small
from downriver.tasks import Task


@pytest.fixture
def x():
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return SourceModel(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), nn.Linear(8, 4), name="t")


def test_a_teacher_runs_in_evaluation_mode_and_stays_as_it_is(teacher, x):
    teacher.model.train()
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    first, again = teacher.targets(Examples(x)), teacher.targets(Examples(x))
    assert torch.equal(first, again)  # no dropout
    assert teacher.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.model.parameters())
    assert not first.requires_grad
    assert teacher.features(Examples(x)).shape == (30, 8)


def test_soft_labels_are_the_softmax_of_its_logits(teacher, x):
    model = teacher.model
    with torch.no_grad():
        logits = model.head(model.backbone(x))
    torch.testing.assert_close(teacher.targets(Examples(x), temperature=2.0), torch.softmax(logits / 2, 1))
    torch.testing.assert_close(teacher.targets(Examples(x), mode="features"), model.backbone(x).detach())


def test_cached_and_fresh_soft_labels_are_the_same(teacher, x):
    cached = teacher.targets(Examples(x), batch_size=7)
    with teacher.frozen():
        fresh = torch.cat([teacher.target_of(x[i : i + 7], None) for i in range(0, 30, 7)])
    torch.testing.assert_close(cached, fresh)


def test_the_cost_of_a_forward_pass_is_charged(teacher, x):
    with metered() as meter:
        teacher.targets(Examples(x))
    assert meter.cost.flops == 30 * 2 * (6 * 8 + 8 * 4)
    assert meter.cost.examples == 0


def test_every_source_reads_rows_its_own_way(x):
    shifted = SourceModel(nn.Identity(), nn.Identity(), preprocess=lambda rows: rows[:, :2] * 3)
    torch.testing.assert_close(shifted.features(Examples(x)), x[:, :2] * 3)
    texts = Examples([{"text": "aa"}, {"text": "a much longer text"}, {"text": "b"}], view=_view())
    named = SourceModel(
        nn.Identity(), name="lengths", preprocess=lambda rows: torch.tensor([[float(len(r["text"]))] for r in rows])
    )
    assert named.features(texts).flatten().tolist() == [2, 18, 1]  # in the rows' order, whatever the batches' order
    assert SourceModel(small("text-encoder", "nano")).features(texts).shape == (3, 32)


def _view():
    task = Task(
        "t", "text-classification", {"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})}, ("text",),
        "label",
    )  # fmt: skip
    return labelled(task).view


def test_distillation_is_the_divergence_plus_the_teachers_entropy(x):
    outputs, logits = torch.randn(30, 5, requires_grad=True), torch.randn(30, 5)
    target = torch.softmax(logits, 1)
    entropy = -(target * target.log()).sum(1).mean()
    divergence = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(outputs, 1), target)
    torch.testing.assert_close(distillation([outputs], [target], [1.0]), divergence + entropy)


def test_a_source_of_weight_zero_gives_no_gradient():
    outputs = [torch.randn(6, 3, requires_grad=True) for _ in range(2)]
    targets = [torch.softmax(torch.randn(6, 3), 1) for _ in range(2)]
    distillation(outputs, targets, [1.0, 0.0]).backward()
    assert outputs[0].grad.abs().sum() > 0
    assert outputs[1].grad.abs().sum() == 0


def test_features_are_compared_by_their_direction():
    target = torch.randn(6, 3)
    assert distillation([5 * target], [target], [1.0], mode="features").item() == pytest.approx(0, abs=1e-6)
    assert distillation([-target], [target], [2.0], mode="features").item() == pytest.approx(4)


def test_an_extra_head_depends_on_name_and_seed_alone():
    targets = [torch.zeros(1, 3), torch.zeros(1, 4)]
    both, second = extra_heads(5, targets, ["a", "b"], 0), extra_heads(5, targets[1:], ["b"], 0)
    assert torch.equal(both[1].weight, second[0].weight) and both[0].weight.shape == (3, 5)
    assert not torch.equal(extra_heads(5, targets, ["a", "b"], 1)[1].weight, second[0].weight)


def test_sources_get_names_of_their_own():
    nets = [nn.Identity(), nn.Identity(), SourceModel(nn.Identity(), name="x")]
    assert [s.name for s in as_sources(nets)] == ["Identity (1)", "Identity (2)", "x"]
    assert as_sources([small("mlp", "nano", seed=3)])[0].name == "small:mlp:nano:3"


def test_unlabelled_rows_are_read_like_the_labelled_ones(letters):
    few = labelled(letters)
    assert len(few) == 120 and few.classes == 2
    for given in (letters, letters.rows("test"), ["aa", "zz"], [{"text": "aa"}]):
        rows = unlabelled(given, few).take([0])
        assert set(rows[0]) == {"text"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: labelled((x, torch.tensor([1] * 30))), r"classes \[1\]: all of 0 to C−1"),
        (lambda x: labelled((x, torch.tensor([0, 2] * 15))), r"classes \[0, 2\]"),
        (lambda x: labelled((x, torch.rand(30))), "class ids 0, 1, 2"),
        (lambda x: labelled((x, torch.tensor([0, 1]))), "for 30 rows: one a row"),
        (lambda x: labelled((x.fill_(np.nan), torch.tensor([0, 1] * 15))), "X: a value is not finite"),
        (lambda x: labelled(x), r"\(X, y\), are expected, not Tensor"),
        (lambda x: unlabelled(x[:, :3], Examples(x)), r"shape \(3,\), the labelled ones \(6,\)"),
        (lambda x: unlabelled(Dataset.from_dict({"body": ["a"]}), Examples([], _view())), "column of the unlabelled"),
        (lambda x: unlabelled([{"body": "a"}], Examples([], _view())), "lacks the column 'text'"),
        (lambda x: unlabelled([], Examples([], _view())), "no unlabelled rows"),
        (lambda x: unlabelled("aa", Examples([], _view())), "a list is expected, not str"),
        (lambda x: as_sources([]), "at least one model"),
        (lambda x: SourceModel(Model(nn.Identity()), nn.Identity()), "a Model brings its own head"),
        (lambda x: SourceModel(nn.Identity(), name="bare").targets(Examples(x)), "source 'bare' has no head"),
        (lambda x: SourceModel(nn.Identity(), nn.Linear(6, 1)).targets(Examples(x)), r"logits of shape \(30, 1\)"),
        (lambda x: SourceModel(nn.Identity(), nn.Identity()).targets(Examples(x / 0)), "not finite"),
        (lambda x: SourceModel(small("text-encoder", "nano")).features(Examples(x)), "reads texts"),
        (lambda x: labelled(_regression()), "a classification task is expected"),
    ],
)  # fmt: skip
def test_bad_input_is_named(x, call, message):
    with pytest.raises(InputError, match=message):
        call(x)


def _regression():
    rows = Dataset.from_dict({"x": [0.0, 1.0], "y": [0.5, 1.5]})
    return Task("r", "tabular-regression", {"train": rows}, ("x",), "y")
