"""AIO-P: what the paper's parts promise, on small chains of operators with a known score."""

import copy
import json
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import rankdata

from downriver.core import InputError
from downriver.core.cost import metered
from downriver.models.compute_graph import ComputeGraph
from downriver.rank.aio_p import ArchPredictor, LabelScaler, search_smaller, srcc

KINDS = ("Conv", "ReLU", "MatMul", "Mul")
WORTH = {"Conv": 3.0, "ReLU": 0.0, "MatMul": 1.0, "Mul": -2.0}
FAST = {"epochs": 4, "learning_rate": 3e-3}


def chain(kinds: tuple[str, ...], channels: int = 8) -> ComputeGraph:
    """Input, these operators in a row with a skip from first to last, Output."""
    n = len(kinds) + 2
    edges = np.array([*((i, i + 1) for i in range(n - 1)), (0, n - 1)]).T
    kernels = [(3, 3) if op == "Conv" else (0, 0) for op in ("", *kinds, "")]
    shapes = np.full((n, 6), channels)
    flops = 1e6 * channels * (1 + sum(op in ("Conv", "MatMul") for op in kinds))
    return ComputeGraph(("Input", *kinds, "Output"), shapes, kernels, None, edges, flops, params=100 * len(kinds))


def draw(n: int, seed: int, sign: float = 1.0) -> tuple[list[ComputeGraph], np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = [tuple(KINDS[i] for i in rng.integers(4, size=rng.integers(2, 6))) for _ in range(n)]
    return [chain(row) for row in rows], np.array([70 + sign * sum(WORTH[op] for op in row) / len(row) for row in rows])


@pytest.fixture(scope="module")
def fitted() -> ArchPredictor:
    return ArchPredictor().fit(*draw(160, 0), epochs=25, learning_rate=3e-3)


@pytest.fixture(scope="module")
def adapted(fitted: ArchPredictor) -> ArchPredictor:
    return copy.deepcopy(fitted).add_adapter("other", *draw(80, 1, sign=-1.0), epochs=15, learning_rate=3e-3)


def state(predictor: ArchPredictor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in predictor.net_.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The first parts of the names of the tensors that differ or are new."""
    return {k.split(".")[0] for k, v in after.items() if k not in before or not torch.equal(v, before[k])}


def test_it_learns_to_rank(fitted: ArchPredictor) -> None:
    graphs, y = draw(100, 2)
    found = fitted.compare(graphs, y)
    assert found["predictor"]["srcc"] > 0.9 and found["predictor"]["mae"] < 0.7 * np.abs(y - y.mean()).mean()
    assert found.keys() == {"predictor", "FLOPs", "parameters"}
    assert found["FLOPs"]["srcc"] == pytest.approx(srcc([g.flops for g in graphs], y))
    order = fitted.rank(graphs)
    assert (np.diff(fitted.predict(graphs)[order]) <= 0).all() and sorted(order) == list(range(100))


def test_the_order_of_nodes_and_edges_is_of_no_account(adapted: ArchPredictor) -> None:
    rng = np.random.default_rng(0)
    graphs, _ = draw(20, 3)
    shuffled = []
    for g in graphs:
        order, edges = rng.permutation(len(g)), rng.permutation(g.edge_index.shape[1])
        place = np.argsort(order)
        ops = tuple(g.ops[i] for i in order)
        moved = place[g.edge_index[:, edges]]
        shuffled.append(ComputeGraph(ops, g.shapes[order], g.kernels[order], g.bias[order], moved, g.flops, g.params))
    assert shuffled != graphs
    z = (adapted.scaler_.transform(adapted.predict(gs), [g.flops for g in graphs]) for gs in (graphs, shuffled))
    np.testing.assert_allclose(*z, atol=1e-6)


def test_edges_have_a_direction(fitted: ArchPredictor) -> None:
    graph = chain(("Conv", "ReLU", "Mul"))
    turned = ComputeGraph(
        graph.ops, graph.shapes, graph.kernels, graph.bias, graph.edge_index[::-1], graph.flops, graph.params
    )
    assert abs(fitted.predict([graph])[0] - fitted.predict([turned])[0]) > 1e-4


@pytest.mark.parametrize("kind", ["stand", "stand_flops"])
def test_the_scaler_goes_there_and_back(kind: str) -> None:
    rng = np.random.default_rng(0)
    y, flops = rng.normal(70, 5, 20), rng.uniform(1e6, 1e10, 20)
    scaler = LabelScaler(kind).fit(y, flops)  # type: ignore[arg-type]
    z = scaler.transform(y, flops)
    assert z.mean() == pytest.approx(0, abs=1e-9) and z.std() == pytest.approx(1)
    np.testing.assert_allclose(scaler.inverse_transform(z, flops), y, rtol=1e-12)


def test_equal_flops_give_the_same_ranking_with_both_scalings() -> None:
    y, flops = np.random.default_rng(0).normal(70, 5, 20), np.full(20, 3e9)
    one, two = (LabelScaler(kind).fit(y, flops).transform(y, flops) for kind in ("stand", "stand_flops"))  # type: ignore[arg-type]
    assert (rankdata(one) == rankdata(two)).all()
    np.testing.assert_allclose(one, two, rtol=1e-9)


def test_scaling_by_flops_is_the_papers() -> None:
    scaler = LabelScaler("stand_flops").fit([4.0, 8.0], flops=[999.0, 999.0])  # divided by log10(1000) + 1 = 4
    assert (scaler.mean_, scaler.scale_) == pytest.approx((1.5, 0.5))


def test_an_adapter_leaves_the_base_as_it_was(fitted: ArchPredictor, adapted: ArchPredictor) -> None:
    assert changed(state(fitted), state(adapted)) == {"adapters", "adapter_heads"}
    graphs, y = draw(60, 4, sign=-1.0)
    assert srcc(adapted.predict(graphs), y) > 0.3 > 0 > srcc(fitted.predict(graphs), y)  # it has learnt the other task


def test_a_second_adapter_leaves_the_first_as_it_was(adapted: ArchPredictor) -> None:
    two = copy.deepcopy(adapted).add_adapter("third", *draw(20, 5), **FAST)
    assert all(torch.equal(v, state(two)[k]) for k, v in state(adapted).items())


def test_the_mean_of_identical_adapters_is_one_of_them(adapted: ArchPredictor) -> None:
    three = copy.deepcopy(adapted)
    for name in ("b", "c"):
        three.net_.add_adapter(name)
        three.net_.adapters[name].load_state_dict(adapted.net_.adapters["other"].state_dict())
        three.net_.adapter_heads[name].load_state_dict(adapted.net_.adapter_heads["other"].state_dict())
    graphs, _ = draw(20, 6)
    np.testing.assert_allclose(three.predict(graphs), adapted.predict(graphs), rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "moved"),
    [
        ("heads+base", {"adapter_heads", "convs"}),
        ("all", {"adapter_heads", "convs", "adapters"}),
        ("adapters", {"adapter_heads", "adapters"}),
        ("rescale", {"alpha", "b"}),
    ],
)
def test_each_mode_trains_its_own_part(adapted: ArchPredictor, mode: str, moved: set[str]) -> None:
    tuned = copy.deepcopy(adapted).finetune(*draw(6, 7), mode=mode, epochs=2)  # type: ignore[arg-type]
    assert changed(state(adapted), state(tuned)) == moved


def test_rescaling_trains_its_factors_of_the_last_layer(adapted: ArchPredictor) -> None:
    tuned = copy.deepcopy(adapted)
    tuned.net_.add_scales()
    graphs, _ = draw(5, 8)
    with torch.no_grad():
        tuned.net_.alpha.fill_(0.25), tuned.net_.b.fill_(0.75)  # type: ignore[union-attr]
    np.testing.assert_allclose(tuned.predict(graphs), adapted.predict(graphs), rtol=1e-6)  # factor 1
    with torch.no_grad():
        tuned.net_.b.fill_(1.75)  # type: ignore[union-attr]
    z = (p.scaler_.transform(p.predict(graphs), [g.flops for g in graphs]) for p in (adapted, tuned))
    one, two = z
    np.testing.assert_allclose(two, 2 * one, atol=1e-5)
    start, end = (copy.deepcopy(adapted).finetune(*draw(8, 9), mode="rescale", epochs=e).net_ for e in (1, 4))
    assert not torch.equal(start.alpha, end.alpha) and not torch.equal(start.b, end.b)


def test_fine_tuning_helps_on_the_target(adapted: ArchPredictor) -> None:
    graphs, y = draw(60, 10, sign=-1.0)
    few, labels = draw(20, 11, sign=-1.0)
    zero = srcc(adapted.predict(graphs), y)
    tuned = copy.deepcopy(adapted).finetune(few, labels, epochs=15, learning_rate=1e-3)
    assert srcc(tuned.predict(graphs), y) > zero
    assert tuned.scaler_.mean_ == pytest.approx(LabelScaler().fit(labels, [g.flops for g in few]).mean_)


def test_the_unit_of_a_zero_shot_prediction_may_be_given(fitted: ArchPredictor) -> None:
    graphs, y = draw(10, 12)
    flops = [g.flops for g in graphs]
    tenth = fitted.predict(graphs, scaler=LabelScaler().fit(y / 10, flops))
    np.testing.assert_allclose(tenth, fitted.predict(graphs, scaler=LabelScaler().fit(y, flops)) / 10, rtol=1e-6)


def test_the_best_epoch_is_kept_and_the_work_is_charged() -> None:
    graphs, y = draw(20, 13)
    with metered() as meter:
        good = ArchPredictor().fit(graphs, y, epochs=1, validation=0.5)
    assert meter.cost.examples == 10 and meter.cost.trained_parameters == meter.cost.parameters > 10_000
    wild = ArchPredictor().fit(graphs, y, epochs=6, validation=0.5, learning_rate=10.0)
    tame = ArchPredictor().fit(graphs, y, epochs=6, validation=0.0, learning_rate=10.0)
    held = np.abs(wild.predict(graphs) - y).mean(), np.abs(tame.predict(graphs) - y).mean()
    assert good.net_ and held[0] < held[1]


def test_equal_seeds_give_equal_predictors_whatever_was_drawn_before() -> None:
    graphs, y = draw(12, 14)
    one = ArchPredictor(seed=3).fit(graphs, y, epochs=2).predict(graphs)
    torch.rand(7)
    assert (ArchPredictor(seed=3).fit(graphs, y, epochs=2).predict(graphs) == one).all()
    assert (ArchPredictor(seed=4).fit(graphs, y, epochs=2).predict(graphs) != one).any()


@pytest.mark.parametrize("mode", ["heads+base", "rescale"])
def test_saved_and_loaded(adapted: ArchPredictor, mode: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tuned = copy.deepcopy(adapted).finetune(*draw(6, 15), mode=mode, epochs=1)  # type: ignore[arg-type]
    tuned.save(tmp_path / "p.safetensors")
    again, graphs = ArchPredictor.load(tmp_path / "p.safetensors"), draw(20, 16)[0]
    assert (again.predict(graphs) == tuned.predict(graphs)).all()
    assert again.vocabulary == tuned.vocabulary and again.seed == tuned.seed
    assert vars(again.scaler_) == vars(tuned.scaler_)


def test_what_is_no_saved_predictor_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "text").write_text("nothing")
    save_file({"w": torch.zeros(2)}, tmp_path / "other", metadata={"aio_p": json.dumps({"format": 1, "settings": {}})})
    for name in ("text", "other", "none"):
        with pytest.raises(InputError, match=name):
            ArchPredictor.load(tmp_path / name)


def cheaper(graph: ComputeGraph) -> Iterator[ComputeGraph]:
    """One operator replaced by ReLU, which is free."""
    inner = graph.ops[1:-1]
    for i in range(len(inner)):
        yield chain((*inner[:i], "ReLU", *inner[i + 1 :]))


def test_the_search_reaches_its_budget_and_gives_up_what_is_worth_least(fitted: ArchPredictor) -> None:
    start = chain(("Conv", "MatMul", "Conv", "MatMul"))
    found = search_smaller(fitted, start, cheaper, flops_budget=0.6 * start.flops)
    assert found.reached and found.graph.flops <= 0.6 * start.flops < start.flops
    assert found.graph.ops.count("Conv") == 2 and found.graph.ops.count("MatMul") == 0
    steps = np.array(found.path)
    assert (np.diff(steps[:, 0]) < 0).all() and found.path[0] == (start.flops, found.start_score)
    assert found.score == pytest.approx(fitted.predict([found.graph])[0], abs=1e-4)
    kept = search_smaller(fitted, start, cheaper, flops_budget=1e6, max_drop=0.0)
    assert not kept.reached and kept.score >= kept.start_score
    stuck = search_smaller(fitted, start, lambda graph: [], flops_budget=1e6)
    assert stuck.graph == start and not stuck.reached


def test_within_the_budget_the_search_goes_on_while_the_prediction_rises(fitted: ArchPredictor) -> None:
    start = chain(("Mul", "Mul", "Conv"))
    found = search_smaller(fitted, start, cheaper, flops_budget=math.inf)
    assert found.score > found.start_score and found.graph.count("Mul") == 0


def test_unknown_operators_are_counted_once_and_share_one_type(fitted: ArchPredictor) -> None:
    with pytest.warns(UserWarning, match="3 operators outside the vocabulary count as unknown: Magic, Wonder"):
        a, b = fitted.predict([chain(("Magic", "Wonder")), chain(("Magic", "ReLU"))])
    assert a != b
    with pytest.warns(UserWarning):
        assert fitted.predict([chain(("Wonder", "Wonder"))])[0] == pytest.approx(
            fitted.predict([chain(("Magic", "Magic"))])[0], abs=1e-9
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = ArchPredictor(vocabulary=("Input", "Output", *KINDS)).fit(*draw(10, 17), epochs=1)
    assert own.net_.embed.regular.num_embeddings == 7


def test_bad_input(fitted: ArchPredictor, adapted: ArchPredictor) -> None:
    graphs, y = draw(8, 18)
    bare = [ComputeGraph(g.ops, edge_index=g.edge_index) for g in graphs]
    cases = [
        ("stand_flops.*needs the positive FLOPs", lambda: ArchPredictor().fit(bare, y)),
        ("needs the positive FLOPs", lambda: LabelScaler().fit(y)),
        ("8 labels are all the same", lambda: ArchPredictor(scaling="stand").fit(graphs, np.full(8, 0.7))),
        ("4 labelled architectures: at least 5", lambda: fitted.finetune(graphs[:4], y[:4])),
        ("7 numbers for 8 architectures", lambda: ArchPredictor().fit(graphs, y[:7])),
        ("finite", lambda: ArchPredictor().fit(graphs, [*y[:7], math.nan])),
        ("has not been fitted", lambda: ArchPredictor().predict(graphs)),
        ("no graphs", lambda: fitted.predict([])),
        ("unknown mode.*'head'", lambda: fitted.finetune(graphs, y, mode="head")),  # type: ignore[arg-type]
        ("has none: add_adapter first", lambda: fitted.finetune(graphs, y, mode="all")),
        ("adapter 'other'", lambda: adapted.add_adapter("other", graphs, y)),
        ("unknown label scaling 'flops'", lambda: ArchPredictor(scaling="flops")),  # type: ignore[arg-type]
        ("hidden 8", lambda: ArchPredictor(hidden=8)),
        ("epochs 0", lambda: ArchPredictor().fit(graphs, y, epochs=0)),
        ("flops_budget 0, the", lambda: search_smaller(fitted, graphs[0], cheaper, 0)),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message):
            call()
