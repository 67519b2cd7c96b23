"""Plain distillation: each loss is its formula, rows without labels stay without, and the teacher as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from downriver.core import InputError, metered
from downriver.merge.distill import HintDistiller, LabelDistiller, RelationDistiller, _Order, positions, squared
from downriver.models import Model, small
from downriver.tasks import Task
from downriver.training.engine import fine_tune


@pytest.fixture
def task():
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"x": x.tolist(), "y": (x[:, 0] > 0).long().tolist()})
    return Task("sign", "tabular-classification", {"train": rows, "validation": rows, "test": rows}, ("x",), "y")


def net(hidden, outputs=2, seed=0):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    return Model(trunk, head=nn.Linear(hidden, outputs))


def batch(n=6):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return {"inputs": x, "labels": torch.tensor([0, 1, 1, *[-100] * (n - 3)])}


def test_hints_are_the_distance_of_normalised_states_through_a_linear_map():
    student, teacher, rows = net(5), net(9, 3, seed=1), batch()
    hints = HintDistiller(student, teacher, layers=("1", "3"), weight=0.5)
    hints.prepare(rows)
    parts = hints.loss(rows)
    own, other = student.backbone[:2](rows["inputs"]), teacher.backbone(rows["inputs"])
    expected = (F.layer_norm(hints.map(own), (9,)) - F.layer_norm(other, (9,))).square().mean()
    torch.testing.assert_close(parts["teacher"], expected)
    few = F.cross_entropy(student(inputs=rows["inputs"][:3])["logits"], rows["labels"][:3])
    torch.testing.assert_close(parts["task"], few)
    torch.testing.assert_close(parts["loss"], few + 0.5 * expected)
    assert [tuple(p.shape) for p in hints.parameters()] == [(9, 5), (9,)]


def test_soft_labels_are_hintons():
    student, teacher, rows = net(5), net(9, seed=1), batch()
    parts = LabelDistiller(student, teacher, temperature=3.0).loss(rows)
    given, said = (torch.softmax(m(inputs=rows["inputs"])["logits"] / 3, 1) for m in (student, teacher))
    torch.testing.assert_close(parts["teacher"], 9 * (said * (said / given).log()).sum(1).mean())


def test_relations_do_not_change_with_scale_and_rotation():
    student, rows = net(5), batch()
    assert RelationDistiller(student, student, layers=("3", "3")).loss(rows)["teacher"] == 0
    turned = copy.deepcopy(student)
    turned.backbone.append(nn.Linear(5, 5, bias=False))
    turned.backbone[4].weight.data = 3 * torch.linalg.qr(torch.randn(5, 5)).Q
    like = RelationDistiller(student, turned, layers=("3", "4")).loss(rows)["teacher"]
    assert like < 1e-9 < 1e-5 < RelationDistiller(student, net(9, seed=1), layers=("3", "3")).loss(rows)["teacher"]


def test_no_labels_no_task_loss_and_one_row_no_relation():
    student, rows = net(5), {"inputs": torch.randn(1, 4)}
    parts = RelationDistiller(student, net(9, seed=1), layers=("3", "3")).loss(rows)
    assert parts["task"] == 0 and parts["teacher"] == 0


def test_pads_do_not_count():
    model = small("text-encoder", "nano")
    texts = ["a", "a much longer text"]
    padded = dict(model.processor(texts, return_tensors="pt", padding=True))
    alone = dict(model.processor(texts[:1], return_tensors="pt"))
    hints = HintDistiller(model, model)
    torch.testing.assert_close(hints.states(model, padded, 0)[0], hints.states(model, alone, 0)[0])
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = squared(x[mask], y[mask])
    torch.testing.assert_close(squared(x, y, mask), kept)


def test_every_stream_visits_each_row_once_an_epoch():
    order = _Order((3, 4), 2, 4, seed=0)
    visits = [order(v) for v in range(18)]
    few = [row for step in range(3) for row in visits[6 * step : 6 * step + 2]]
    many = [row for step in range(3) for row in visits[6 * step + 2 : 6 * step + 6]]
    assert sorted(few[:3]) == sorted(few[3:]) == [0, 1, 2]
    assert all(sorted(many[i : i + 4]) == [3, 4, 5, 6] for i in (0, 4, 8))
    assert [order(v) for v in (0, 17, 5)] == [visits[v] for v in (0, 17, 5)]  # of the number alone


def test_without_a_teachers_weight_it_is_plain_training_bit_by_bit(task):
    student = net(5)
    settings = {"learning_rate": 1e-2, "batch_size": 8, "seed": 3}
    plain = fine_tune(student, task, "6 steps", **settings)
    hints = HintDistiller(student, net(9, seed=1), layers=("3", "3"), weight=0.0).fit(task, "6 steps", **settings)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(hints.state_dict()[name], tensor, rtol=0, atol=0)


def test_fit_leaves_teacher_and_student_and_learns_the_teachers_states(task):
    student, teacher = net(5), net(9, 3, seed=1).train()
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    hints = HintDistiller(student, teacher, layers=("3", "3"))
    with metered() as meter:
        tuned = hints.fit(task, "40 steps", unlabelled=task, learning_rate=1e-2, batch_size=4, ratio=2)
    assert meter.cost.examples == 40 * 12 and meter.cost.parameters == sum(p.numel() for p in student.parameters())
    for model, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert teacher.training and not tuned.training and len(hints.history_) == 40
    assert list(tuned.state_dict()) == list(student.state_dict())
    assert hints.history_[-1]["teacher"] < 0.5 * hints.history_[0]["teacher"]


def test_training_continues_from_checkpoints_and_validates(task, tmp_path):
    student, teacher = net(5), net(9, seed=1)
    settings = {"learning_rate": 1e-2, "batch_size": 4, "ratio": 1, "validation": 2, "checkpoints": tmp_path}
    once = LabelDistiller(student, teacher).fit(task, "8 steps", unlabelled=task, **settings)
    again = LabelDistiller(student, teacher).fit(task, "8 steps", unlabelled=task, **settings)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in once.state_dict().items())
    assert (tmp_path / "joint" / "finished.json").is_file()


def test_bad_input_is_named(task):
    with pytest.raises(InputError, match="weight is -1: 0 or more"):
        LabelDistiller(net(5), net(9), weight=-1)
    with pytest.raises(InputError, match="temperature is 0"):
        LabelDistiller(net(5), net(9), temperature=0)
    with pytest.raises(InputError, match="the teacher gives 3 outputs and the student 2"):
        LabelDistiller(net(5), net(9, 3)).fit(task, "2 steps")
    with pytest.raises(InputError, match="no layer '7'"):
        HintDistiller(net(5), net(9), layers=("3", "7"))
    with pytest.raises(InputError, match="pool 'middle'"):
        HintDistiller(net(5), net(9), layers=("3", "3"), pool="middle")
    with pytest.raises(InputError, match="relations are between rows"):
        RelationDistiller(net(5), net(9), layers=("3", "3"), pool="tokens")
    plain = LabelDistiller(net(5, 3), net(9, 3))
    with pytest.raises(InputError, match="task 'sign' needs 2"):
        plain.fit(task, "2 steps")
    with pytest.raises(InputError, match="column of the unlabelled rows 'x'"):
        plain.fit(task, "2 steps", unlabelled=[{"z": 1}])
    with pytest.raises(InputError, match="a row at least"):
        plain.fit(task, "2 steps", unlabelled=[])
    with pytest.raises(InputError, match="ratio is 0"):
        plain.fit(task, "2 steps", unlabelled=task, ratio=0)
    words = Task("words", "language-modelling", {"train": Dataset.from_dict({"text": ["a", "b"]})}, ("text",), None)
    with pytest.raises(InputError, match="a classification or a regression is expected"):
        plain.fit(words, "2 steps")
    with pytest.raises(InputError, match="tokens or maps are expected"):
        positions(torch.zeros(3), {})
