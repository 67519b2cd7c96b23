"""Talking models: every loss is what the card says, gradients stop where they must, and only the student stays."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

import downriver.merge
from downriver.core import InputError, metered
from downriver.merge.talking_models import InteractiveDistiller, interpolate, talking_models
from downriver.models import Model, load, small
from downriver.models.split import SplitModel
from downriver.tasks import Task
from downriver.training.engine import fine_tune

LAYERS = {"student_layers": ("1", "3"), "teacher_layers": ("1", "3")}


@pytest.fixture
def task():
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"x": x.tolist(), "y": (x[:, 0] > 0).long().tolist()})
    return Task("sign", "tabular-classification", {"train": rows, "test": rows}, ("x",), "y")


@pytest.fixture
def letters():
    texts = [a * n for a in "az" for n in (3, 5, 8, 9)]
    rows = Dataset.from_dict({"text": texts, "label": [0] * 4 + [1] * 4})
    return Task("letters", "text-classification", {"train": rows, "test": rows}, ("text",), "label")


def net(hidden, outputs=2, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout))
    return Model(trunk, head=nn.Linear(hidden, outputs))


def batch(n=6):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return {"inputs": x, "labels": torch.tensor([0, 1, 1, *[-100] * (n - 3)])}


def talk(student, teacher, rows=None, other=None, **settings):
    layers = LAYERS if isinstance(student.backbone, nn.Sequential) else {}
    made = InteractiveDistiller(student, teacher, message_dim=8, **{**layers, **settings})
    if rows is not None:
        made.prepare(rows, other)
    return made


def identities(distiller):
    for name in distiller.talkers:
        distiller.talkers[name] = nn.Module()
        distiller.talkers[name].encode = distiller.talkers[name].decode = lambda state: state


def test_one_step_is_the_cards_sketch():
    student, teacher, rows = net(5), net(9, 3, seed=1), batch()
    weights = {"int": 0.5, "ans": 0.25, "msg": 2.0, "rec": 3.0, "trans": 4.0}
    made = talk(student, teacher, rows, weights=weights)
    parts = made.loss(rows)
    x, t = rows["inputs"], made.talkers
    es, ds, et, dt = ({level: getattr(t[f"{m}_{level}"], f) for level in ("lo", "hi")}
                      for m, f in (("S", "encode"), ("S", "decode"), ("T", "encode"), ("T", "decode")))  # fmt: skip
    ln = lambda h: F.layer_norm(h, h.shape[-1:])  # noqa: E731
    mse = lambda a, b: F.mse_loss(ln(a), ln(b))  # noqa: E731
    hs1, ht1 = student.backbone[:2](x), teacher.backbone[:2](x)
    hs2, ht2 = student.backbone[2:4](hs1), teacher.backbone[2:4](ht1)
    a1 = ln(dt["lo"](es["lo"](hs1))) * (ht1.var(1, correction=0, keepdim=True) + 1e-5).sqrt() + ht1.mean(1, True)
    ans = ds["hi"](et["hi"](teacher.backbone[2:4](a1)))
    expected = {
        "task": F.cross_entropy(student(inputs=x[:3])["logits"], rows["labels"][:3]),
        "int": mse(hs2, ans),
        "ans": mse(hs2, ans),
        "trans": mse(a1, ht1),
        "msg": F.mse_loss(es["lo"](hs1), et["lo"](ht1)) + F.mse_loss(es["hi"](hs2), et["hi"](ht2)),
        "rec": sum(mse(d[k](e[k](h)), h) for d, e, k, h in (
            (ds, es, "lo", hs1), (ds, es, "hi", hs2), (dt, et, "lo", ht1), (dt, et, "hi", ht2))),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, msg=name, rtol=1e-4, atol=1e-5)
    whole = expected["task"] + sum(weights[name] * expected[name] for name in weights)
    torch.testing.assert_close(parts["loss"], whole, rtol=1e-4, atol=1e-5)


def test_gradients_stop_where_the_card_says():
    student, teacher, rows = net(5), net(9, 3, seed=1), batch()
    made = talk(student, teacher, rows)
    parts = made.loss(rows)
    talkers = list(made.talkers.parameters())
    learned = list(student.backbone.parameters())
    grads = lambda part, of: torch.autograd.grad(parts[part], of, retain_graph=True, allow_unused=True)  # noqa: E731
    assert all(g is None for g in grads("int", talkers))
    assert all(g is not None and g.abs().sum() > 0 for g in grads("int", learned))
    low, high = learned[:2], learned[2:]
    for part in ("ans", "trans"):  # what is heard follows the student's words, not its own high state
        assert all(g is not None for g in grads(part, low)) and all(g is None for g in grads(part, high))
    assert any(g is not None for g in grads("ans", list(made.talkers["T_hi"].parameters())))
    parts["loss"].backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in talkers if p.requires_grad)


@pytest.mark.parametrize("pool", ["mean", "cls", "tokens"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(pool):
    model = small("text-encoder")
    model.head = nn.Linear(128, 2)
    rows = dict(model.processor(["a river", "the sea is wide"], return_tensors="pt", padding=True))
    made = talk(model, model, rows, pool=pool)
    identities(made)
    parts = made.loss(rows)
    assert all(parts[name] < 1e-9 for name in ("int", "ans", "msg", "rec", "trans"))


def test_messages_of_vectors_and_maps_reach_the_teachers_upper_part():
    student, teacher = small("resnet", "nano"), small("vit", "nano", seed=1)
    student.head = nn.Linear(16, 2)
    rows = {"pixel_values": torch.rand(4, 3, 32, 32)}
    layers = {"student_layers": ("encoder.stages.0", "encoder.stages.1")}
    made = talk(student, teacher, rows, **layers)
    assert all(torch.isfinite(value) for value in made.loss(rows).values())


def test_dropout_of_the_teacher_is_off_and_comes_back():
    student, teacher, rows = net(5), net(9, seed=1, dropout=0.5).train(), batch()
    made = talk(student, teacher, rows)
    torch.testing.assert_close(made.loss(rows)["rec"], made.loss(rows)["rec"], rtol=0, atol=0)
    assert teacher.training and teacher.backbone[4].training


def test_without_weights_it_is_supervised_training_bit_by_bit(task):
    student, settings = net(5, dropout=0.2), {"learning_rate": 1e-2, "batch_size": 8, "seed": 3}
    plain = fine_tune(student, task, "6 steps", **settings)
    none = dict.fromkeys(("int", "ans", "msg", "rec", "trans"), 0)
    tuned = talk(student, net(9, seed=1), weights=none).fit(task, "6 steps", **settings)
    assert all(torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_the_student_stays_frozen_while_the_talkers_warm_up(task):
    student = net(5)
    made = talk(student, net(9, seed=1), warmup=0.5)
    seen = []
    loss = made.loss

    def watched(rows, other=None, *, student=None):
        parts = loss(rows, other, student=student)
        seen.append(
            (
                made.phase,
                made.ramp,
                copy.deepcopy(student.state_dict()),
                made.talkers["S_lo"].encoder[1].weight.sum().item(),
            )
        )
        return parts

    made.loss = watched
    made.fit(task, "12 steps", learning_rate=1e-2, batch_size=8)
    warm = [entry for entry in seen if entry[0] == "warm-up"]
    joint = [entry for entry in seen if entry[0] == "joint"]
    assert len(made.history_) == 12 and "int" not in made.history_[5] and "int" in made.history_[6]
    for _, _, state, _ in warm:
        assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
    assert warm[-1][3] != warm[0][3]
    ramps = [entry[1] for entry in joint]
    assert ramps[0] == 0 and ramps[-1] == pytest.approx(5 / 6) and ramps == sorted(ramps)


def test_only_a_plain_student_comes_back_and_it_can_be_saved(letters, tmp_path):
    student, teacher = small("text-encoder", "nano"), small("masked-lm", "tiny", seed=1)
    before = copy.deepcopy(teacher.state_dict())
    with metered() as meter:
        tuned = talking_models(
            student, letters, "80 examples", teacher=teacher, unlabelled=["az", "zza", "aaz"], batch_size=4, ratio=1,
            message_dim=8, learning_rate=1e-3,
        )  # fmt: skip
    assert meter.cost.examples == 80 and meter.cost.flops > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert list(tuned.state_dict()) == list(student.with_head(letters).state_dict())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in tuned.modules())
    rows = tuned.collate(letters)(list(letters.rows("test")))
    again = load(tuned.save(tmp_path / "student"))
    with torch.no_grad():
        assert torch.equal(again(**rows)["logits"], tuned(**rows)["logits"])


def test_the_talk_goes_well_and_the_report_says_so(task):
    made = talk(net(6), net(16, 3, seed=1))
    made.fit(task, "150 steps", unlabelled=task, learning_rate=1e-2, batch_size=8, ratio=1)
    report = made.report_
    assert report.cka > 0.6 and not report.collapsed and len(report.history) == 150
    assert set(report.message_variance) == {"S_lo", "S_hi", "T_lo", "T_hi"}
    first, last = report.history[15], report.history[-1]  # the joint phase
    assert all(last[name] < 0.7 * first[name] for name in ("task", "ans", "trans"))


def test_collapsed_messages_are_warned_of():
    rows = batch()
    made = talk(net(5), net(9, seed=1), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.report(rows).collapsed == []
    nn.init.zeros_(made.talkers["T_lo"].encoder[3].weight)
    with pytest.warns(UserWarning, match=r"messages have collapsed \(T_lo\)"):
        assert made.report(rows).collapsed == ["T_lo"]


def test_contrastive_messages_find_their_rows():
    rows = batch()
    made = talk(net(5), net(9, seed=1), rows, contrastive=True)
    identities(made)
    same = lambda x, y: made._same(x, y, None)  # noqa: E731
    x = torch.eye(6)
    assert same(x, x) < 0.01 < same(x, x.roll(1, 0)) and same(torch.zeros(6, 6), x) > 1.5  # collapse is the worst


def test_rounds_and_shared_levels():
    student, rows = net(5), batch()
    one, two = (talk(student, net(9, seed=1), rows, rounds=k) for k in (1, 2))
    assert one.loss(rows)["trans"] == two.loss(rows)["trans"] and one.loss(rows)["ans"] != two.loss(rows)["ans"]
    shared = talk(student, net(9, seed=1), rows, share_levels=True)
    assert shared.talkers["S_lo"] is shared.talkers["S_hi"]
    assert sum(p.numel() for p in shared.parameters()) * 2 == sum(p.numel() for p in one.parameters())
    assert torch.isfinite(shared.loss(rows)["loss"])
    uneven = Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh()), head=nn.Linear(3, 2))
    with pytest.raises(InputError, match="share_levels: the two layers of a model are 6 and 3 wide"):
        talk(uneven, net(9, seed=1), rows, share_levels=True)


def test_tokens_of_unlike_texts_are_interpolated_or_refused():
    student, teacher = small("text-encoder", "nano"), small("text-encoder", "nano", seed=1)
    student.head = nn.Linear(32, 2)
    own = dict(student.processor(["abc", "abcdef"], return_tensors="pt", padding=True))
    other = dict(student.processor(["ab", "abcd"], return_tensors="pt", padding=True))
    with pytest.raises(InputError, match=r"unlike tokens \(up to 8 and 6 a row\)"):
        talk(student, teacher, own, other, pool="tokens").loss(own, other)
    parts = talk(student, teacher, own, other, pool="tokens", align="position").loss(own, other)
    assert all(torch.isfinite(value) for value in parts.values())
    states = torch.randn(1, 6, 3)
    four, two = torch.tensor([[True] * 4 + [False] * 2]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(interpolate(states, four, four), states * four[:, :, None])
    ends = interpolate(states, four, two)
    torch.testing.assert_close(ends[0], torch.stack([states[0, 0], states[0, 3], torch.zeros(3)]))


def test_a_teacher_split_by_functions_and_one_with_its_own_encoding(task):
    base, student = net(9, seed=1), net(5)
    split = SplitModel(base, lambda b: base.backbone[:2](b["inputs"]), lambda h, b: base.backbone[2:4](h))
    by_name = talk(student, base).fit(task, "4 steps", batch_size=8)
    made = InteractiveDistiller(student, split, student_layers=("1", "3"), message_dim=8)
    by_functions = made.fit(task, "4 steps", batch_size=8)
    pairs = zip(by_name.state_dict().values(), by_functions.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    wide = Model(nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh()))
    double = talk(student, wide, encode=lambda rows: {"inputs": torch.tensor([[*r["x"], *r["x"]] for r in rows])})
    assert double.fit(task, "2 steps", batch_size=8).head.out_features == 2


def test_bad_input_is_named(task):
    student, teacher = net(5), net(9, seed=1)
    for settings, message in [
        ({"weights": {"hint": 1}}, "loss 'hint'"),
        ({"weights": {"int": -1}}, "the weight of int is -1: 0 or more"),
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"pool": "max"}, "pool 'max'"),
        ({"align": "x"}, "align is x"),
        ({"student_layers": ("1", "9")}, "no layer '9'"),
    ]:
        with pytest.raises(InputError, match=message):
            talk(student, teacher, **settings)
    with pytest.raises(InputError, match=r"there are no talkers yet: prepare\(batch\)"):
        talk(student, teacher).loss(batch())
    with pytest.raises(InputError, match="already brings its two layers"):
        InteractiveDistiller(student, SplitModel(teacher, "1"), student_layers=("1", "3"))
    with pytest.raises(InputError, match="start of the head 'probe'"):
        talking_models(student, task, "2 steps", teacher=teacher, head="probe")
    encoder = small("text-encoder", "nano")
    with pytest.raises(InputError, match=r"inside the block encoder\.layer\.0"):
        InteractiveDistiller(encoder, encoder, teacher_layers=("encoder.layer.0.attention", "encoder.layer.1"))


def test_the_room_names_it():
    assert downriver.merge.talking_models is talking_models
    assert downriver.merge.InteractiveDistiller is InteractiveDistiller
