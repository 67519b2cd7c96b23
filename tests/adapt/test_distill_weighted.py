"""Distilling from similar tasks: the weights' exact properties, the limits of the loss, and that it helps."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from downriver import adapt
from downriver.adapt import MultiSourceDistiller, SourceModel, distill_nearest, distill_weighted, task_weights
from downriver.adapt.two_streams import _visits
from downriver.core import InputError, metered
from downriver.models import Model, small


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def y():
    return np.repeat(np.arange(3), 6)


@pytest.fixture
def features(rng, y):
    """Sources from good to useless."""
    signal = np.eye(3)[y]
    mixed = {f"s{i}": signal @ rng.normal(size=(3, 12)) + i * rng.normal(size=(18, 12)) for i in (0.5, 1, 2)}
    return mixed | {"noise": rng.normal(size=(18, 12))}


@pytest.mark.parametrize("method", ["parc", "cka", "rsa"])
def test_weights_are_powers_of_similarities_that_sum_to_one(features, y, method):
    found = task_weights(features, y, method=method, power=3)
    positive = np.maximum(found.alpha, 0)
    np.testing.assert_allclose(found.w, positive**3 / (positive**3).sum(), atol=1e-12)
    assert found.w.sum() == pytest.approx(1) and found.names == tuple(features)
    assert found.nearest == 0 and found.alpha[0] > found.alpha[-1]


def test_power_zero_is_uniform_and_a_large_one_takes_the_nearest(features, y):
    np.testing.assert_allclose(task_weights(features, y, power=0).w, 0.25)
    np.testing.assert_allclose(task_weights(features, y, power=1e6).w, [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_array_equal(task_weights(features, y, power=np.inf).w, [1, 0, 0, 0])


def test_scaling_the_similarities_changes_no_weight(features, y):
    given = {array.tobytes(): alpha for array, alpha in zip(features.values(), [0.1, 0.2, 0.4, -0.3], strict=True)}

    def score(factor):
        return lambda rows, classes: factor * given.get(rows.tobytes(), 0.0)

    one, ten = (task_weights(features, y, method=score(factor), power=2) for factor in (1, 10))
    np.testing.assert_allclose(one.w, np.array([0.01, 0.04, 0.16, 0]) / 0.21)
    np.testing.assert_allclose(one.w, ten.w)


def test_the_floor_cuts_small_weights_and_keeps_the_sum(features, y):
    full = task_weights(features, y, power=2)
    cut = task_weights(features, y, power=2, floor=float(np.sort(full.w)[1]))
    assert (cut.w > 0).sum() == 2 and cut.w.sum() == pytest.approx(1)
    kept = cut.w > 0
    np.testing.assert_allclose(cut.w[kept] / full.w[kept], (cut.w[kept] / full.w[kept])[0])


def test_no_similar_source_gives_uniform_weights_and_a_warning(features, y):
    with pytest.warns(UserWarning, match="no source is similar"):
        found = task_weights(features, y, method=lambda f, c: -0.1)
    np.testing.assert_allclose(found.w, 0.25)


def test_one_row_of_a_class_is_warned_of(rng):
    with pytest.warns(UserWarning, match="a class has 1 labelled row"):
        task_weights([rng.normal(size=(7, 4))], [0, 0, 0, 1, 1, 1, 2], method="cka")


def test_parc_with_fewer_rows_than_dimensions_still_tells_sources_apart(rng):
    """15 labels and 64 features: principal components, standardised, would make every source score nothing."""
    labels = np.repeat(np.arange(5), 3)
    good = np.eye(5)[labels] @ rng.normal(size=(5, 64)) + 0.5 * rng.normal(size=(15, 64))
    found = task_weights({"good": good, "bad": rng.normal(size=(15, 64))}, labels)
    assert found.alpha[0] > 0.4 and found.w[0] > 0.9


def test_the_standard_error_falls_with_more_rows(rng):
    def error(each):
        labels = np.repeat(np.arange(3), each)
        x = np.eye(3)[labels] @ rng.normal(size=(3, 10)) + 2 * rng.normal(size=(3 * each, 10))
        return task_weights([x], labels).error[0]

    assert np.mean([error(4) for _ in range(6)]) > 2 * np.mean([error(40) for _ in range(6)])


def test_the_spread_over_samples_is_what_the_standard_error_says(rng):
    labels, found = np.repeat(np.arange(3), 20), []
    means = rng.normal(size=(3, 10))
    for _ in range(25):
        found.append(task_weights([means[labels] + 2 * rng.normal(size=(60, 10))], labels))
    spread, said = np.std([f.alpha[0] for f in found]), np.mean([f.error[0] for f in found])
    assert 0.5 < said / spread < 2


def test_models_are_weighed_on_a_task(letters):
    trained = adapt.full(small("text-encoder", "nano", seed=1), letters, "480 examples", learning_rate=1e-3)
    plain = small("text-encoder", "nano", seed=2)
    found = task_weights([SourceModel(trained, name="trained"), SourceModel(plain, name="plain")], letters)
    assert found.names == ("trained", "plain") and found.alpha[0] > found.alpha[1] + 0.05


# training


@pytest.fixture
def data():
    """Three blobs: 9 labelled rows, 90 unlabelled ones, 300 to test."""
    generator = torch.Generator().manual_seed(3)
    centres = 2.2 * torch.randn(3, 10, generator=generator)
    y = torch.arange(399) % 3
    x = centres[y] + 2.5 * torch.randn(399, 10, generator=generator)
    return {"few": (x[:9], y[:9]), "many": x[9:99], "test": (x[99:], y[99:]), "centres": centres}


def oracle(centres, name="oracle"):
    """The best linear classifier of the blobs."""
    head = nn.Linear(10, 3)
    with torch.no_grad():
        head.weight.copy_(centres / 2.5**2)
        head.bias.copy_(-(centres**2).sum(1) / (2 * 2.5**2))
    backbone = nn.Linear(10, 3)
    backbone.load_state_dict(head.state_dict())
    return SourceModel(backbone, nn.Identity(), name=name)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU()), head=nn.Linear(16, 3))


def noise(name="noise", seed=5):
    """A source whose features wave so fast that rows of one class have nothing in common."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), Wave())
    return SourceModel(backbone, nn.Linear(16, 4), name=name)


class Wave(nn.Module):
    def forward(self, x):
        return torch.sin(40 * x)


def fitted(student, sources, data, budget="40 steps", **settings):
    settings = {"learning_rate": 1e-2, "batch_size": 9, "seed": 0} | settings
    return MultiSourceDistiller(student, sources, **settings).fit(data["few"], data["many"], budget)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def accuracy(model, data):
    x, y = data["test"]
    with torch.no_grad():
        return (model(inputs=x)["logits"].argmax(1) == y).float().mean().item()


def test_with_one_source_weighted_and_nearest_are_the_same(student, data):
    weighted, nearest = (fitted(student, [oracle(data["centres"])], data, weights=w) for w in ("auto", "nearest"))
    assert same(weighted.student_, nearest.student_)


def test_nearest_is_the_limit_of_weighted(student, data):
    sources = [noise(), oracle(data["centres"]), noise("other", 6)]
    nearest = fitted(student, sources, data, weights="nearest")
    limit = fitted(student, sources, data, weights="auto", power=np.inf)
    assert same(nearest.student_, limit.student_)
    np.testing.assert_array_equal(nearest.weights_.w, [0, 1, 0])


def test_lambda_one_is_supervised_training(student, data):
    """The same parameters as a loop written here; no source is run."""
    found = fitted(student, ["no such model"], data, lam=1.0, budget="7 steps")
    x, y = data["few"]
    plain = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    visits = _visits(9, "labelled", 0)
    for step in range(7):
        ids = [next(visits) for _ in range(9)]
        optimizer.param_groups[0]["lr"] = 0.5e-2 * (1 + np.cos(np.pi * step / 7))
        optimizer.zero_grad()
        F.cross_entropy(plain.head(plain.backbone(x[ids])), y[ids]).backward()
        optimizer.step()
    assert same(found.student_, plain)


def test_a_second_phase_goes_on_with_the_labelled_rows_alone(student, data):
    """What comes out is the first phase's student, trained on by a supervised run at a tenth of the rate."""
    sources = [oracle(data["centres"])]
    both = fitted(student, sources, data, budget="40 steps", second_phase=0.25)
    first = fitted(student, sources, data, budget="30 steps")
    assert [row["step"] for row in both.history_] == list(range(1, 41)) and both.history_[:30] == first.history_
    assert all("sources" in row for row in both.history_[:30]) and not any("sources" in r for r in both.history_[30:])
    on = fitted(first.student_, [], data, budget="10 steps", lam=1.0, learning_rate=1e-3)
    assert same(both.student_, on.student_) and not same(both.student_, first.student_)


def test_a_second_phase_that_does_harm_is_undone_where_rows_are_held(student, data):
    (x, y), sources = data["few"], [oracle(data["centres"])]
    wrong = (x, (y + 1) % 3)
    settings = {"learning_rate": 5e-2, "batch_size": 9, "seed": 0, "lam": 0.0}
    first = MultiSourceDistiller(student, sources, **settings).fit(wrong, data["many"], "30 steps", validation=(x, y))
    both = MultiSourceDistiller(student, sources, second_phase=0.25, **settings)
    both.fit(wrong, data["many"], "40 steps", validation=(x, y))
    assert same(both.student_, first.student_)


def test_at_lambda_zero_labels_change_nothing(student, data):
    (x, y), sources = data["few"], [oracle(data["centres"])]
    one = fitted(student, sources, data, lam=0.0, weights="uniform")
    other = fitted(student, sources, data | {"few": (x, (y + 1) % 3)}, lam=0.0, weights="uniform")
    assert same(one.student_.backbone, other.student_.backbone)
    assert torch.equal(one.student_.head.weight, student.head.weight)


def test_a_source_of_weight_zero_changes_nothing(student, data):
    one = fitted(student, [oracle(data["centres"])], data, weights=[1.0])
    two = fitted(student, [oracle(data["centres"]), noise()], data, weights=[2.0, 0.0])
    assert same(one.student_, two.student_)


def test_teachers_and_the_student_given_stay_as_they_are(student, data):
    teacher = noise()
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher.model)]
    for cached in (True, False):
        fitted(student, [teacher], data, weights="uniform", cache_teachers=cached)
    for state, model in zip(before, (student, teacher.model), strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_cached_and_fresh_teachers_give_the_same_student(student, data):
    cached, fresh = (
        fitted(student, [oracle(data["centres"]), noise()], data, cache_teachers=c, weights="uniform")
        for c in (True, False)
    )
    for a, b in zip(cached.history_, fresh.history_, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_fresh_teachers_see_the_students_augmented_view(student, data):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x[:, :3]

    settings = {"weights": "uniform", "augment": lambda rows: rows + 100, "budget": "2 steps"}
    fitted(student, [SourceModel(Spy(), nn.Identity())], data, cache_teachers=False, **settings)
    assert seen[-1].shape == (54, 10) and seen[-1].mean() > 90
    seen.clear()
    fitted(student, [SourceModel(Spy(), nn.Identity())], data, cache_teachers=True, **settings)
    assert max(x.max() for x in seen) < 50


def test_the_loss_is_the_weighted_sum_of_its_parts(student, data):
    for entry in fitted(student, [noise(), noise("b", 6)], data, lam=0.3, weights=[1, 3]).history_:
        assert entry["loss"] == pytest.approx(0.3 * entry["labels"] + 0.7 * entry["sources"], rel=1e-5)


def test_a_similar_source_helps_and_a_useless_one_is_passed_over(student, data):
    good, bad = oracle(data["centres"]), [noise(f"noise {i}", i) for i in range(3)]
    supervised = accuracy(fitted(student, [], data, "80 steps", lam=1.0).student_, data)
    weighted = fitted(student, [*bad, good], data, "80 steps")
    uniform = fitted(student, [*bad, good], data, "80 steps", weights="uniform")
    assert weighted.weights_.names[weighted.weights_.nearest] == "oracle"
    assert accuracy(weighted.student_, data) > supervised + 0.05
    assert accuracy(weighted.student_, data) >= accuracy(uniform.student_, data) - 0.01
    assert weighted.student_.head.out_features == 3 and not weighted.student_.training
    assert set(dict(weighted.student_.named_parameters())) == set(dict(student.named_parameters()))  # no extra head


def test_features_of_a_source_without_a_head_are_learnt_from(student, data):
    bare = SourceModel(nn.Linear(10, 5), name="bare")
    with pytest.raises(InputError, match="source 'bare' has no head"):
        fitted(student, [bare], data)
    history = fitted(student, [bare], data, "100 steps", mode="features", weights="uniform", lam=0.1).history_
    assert history[-1]["sources"] < 0.3 * history[0]["sources"]


def test_the_temperature_softens_both_sides(student, data):
    cold, hot = (fitted(student, [noise()], data, temperature=t, lam=0.0, weights="uniform") for t in (1.0, 1000.0))
    assert (
        hot.history_[0]["sources"]
        == pytest.approx(np.log(4), abs=1e-4)
        != pytest.approx(cold.history_[0]["sources"], abs=1e-4)
    )


def test_the_teachers_are_part_of_a_budget_in_flops(student, data):
    sources = [oracle(data["centres"])]
    with metered() as meter:
        fitted(student, sources, data, "10 steps", weights="uniform")
    teachers = 99 * 2 * 10 * 3
    with metered() as again:
        found = fitted(student, sources, data, f"{meter.cost.flops} flops", weights="uniform")
    assert len(found.history_) == 10 and again.cost.flops == meter.cost.flops
    assert meter.cost.examples == 10 * 54
    with pytest.raises(InputError, match="does not pay for the teachers"):
        fitted(student, sources, data, f"{teachers} flops", weights="uniform")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.5}, "lam is 1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"mode": "feature"}, "did you mean 'features'"),
        ({"weights": "unifrom"}, "did you mean 'uniform'"),
        ({"weights": [1.0, 2.0]}, "1 numbers, not negative"),
        ({"weights": [float("nan")]}, "not negative nor all 0"),
        ({"weights": [-1.0]}, "not negative nor all 0"),
        ({"method": "park"}, "did you mean 'parc'"),
        ({"method": lambda f, c: float("nan")}, "similarity of source 'noise' is not a number"),
        ({"power": -1.0}, "power is -1"),
        ({"second_phase": 1.0}, "second_phase is 1"),
    ],
)
def test_a_bad_parameter_is_named(student, data, settings, message):
    with pytest.raises(InputError, match=message):
        fitted(student, [noise()], data, **settings)


def test_bad_rows_and_students_are_named(student, data, features, y):
    with pytest.raises(InputError, match="gives \\(2,\\) outputs, the task has 3"):
        fitted(Model(nn.Linear(10, 4), head=nn.Linear(4, 2)), [noise()], data)
    with pytest.raises(InputError, match="unlabelled rows have shape"):
        fitted(student, [noise()], data | {"many": data["many"][:, :5]})
    with pytest.raises(InputError, match="source 'short' has features of 5 rows"):
        task_weights({"short": np.ones((5, 2))}, y)
    with pytest.raises(InputError, match="at least one"):
        task_weights({}, y)


# models and tasks


@pytest.fixture(scope="module")
def trained(letters):
    return adapt.full(small("text-encoder", "nano", seed=7), letters, "960 examples", learning_rate=2e-3)


def test_a_text_model_learns_from_a_source_with_a_few_labels(letters, trained, score):
    few = letters.subset("train", range(6))
    start = small("text-encoder", "nano", seed=1)
    settings = {"sources": [trained, small("text-encoder", "nano", seed=9).with_head(letters)], "batch_size": 6}
    with metered() as meter:
        tuned = distill_weighted(
            start, few, "30 steps", unlabelled=letters, learning_rate=2e-3, head="random", **settings
        )
    assert score(tuned, letters)[0] > 0.85
    assert meter.cost.examples == 30 * 36 and meter.cost.tokens > 30 * 36 * 5
    assert start.head is None and not tuned.training
    nearest = distill_nearest(
        start, few, "2 steps", unlabelled=["ab", "yz"], head="random", validation=True, **settings
    )
    assert nearest.labels == letters.labels


def test_both_are_methods_of_the_room():
    from downriver.core import registry

    for name, method in (("distill_weighted", distill_weighted), ("distill_nearest", distill_nearest)):
        assert registry.resolve("adapt", name) is method
        checked = registry.check_parameters(method, {"sources": ["a"], "unlabelled": "wine", "lam": 0.5}, name)
        assert checked["lam"] == 0.5


def test_images_are_learnt_from():
    from datasets import Array2D, Dataset, Features, Value

    from downriver.tasks import Task

    shades = np.repeat([40, 200], 6)
    images = np.clip(shades[:, None, None] + np.random.default_rng(0).integers(-30, 30, size=(12, 8, 8)), 0, 255)
    layout = Features({"image": Array2D((8, 8), "uint8"), "label": Value("int64")})
    rows = Dataset.from_dict({"image": images.astype(np.uint8), "label": np.repeat([0, 1], 6)}, features=layout)
    task = Task("shades", "image-classification", {"train": rows}, ("image",), "label")
    source = small("resnet", "nano").with_head(task)
    tuned = distill_weighted(
        small("vit", "nano"), task, "2 steps", sources=[source], unlabelled=task, batch_size=4, head="random"
    )
    assert tuned.kind == "vision-encoder" and tuned.head.out_features == 2
