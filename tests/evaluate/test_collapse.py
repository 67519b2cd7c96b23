"""The guard: bit-for-bit rollback, silence where nothing happened, merges, training; what the surrogate is worth."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from torch.nn.utils.prune import random_unstructured

from downriver.adapt import fine_tune
from downriver.core.errors import DownriverError, InputError
from downriver.evaluate import Collapsed, CollapseGuard, CollapseWarning, SurrogatePerplexity, surrogate_validity
from downriver.evaluate.collapse import validity
from downriver.models import Model, small
from downriver.tasks import Task

TEXTS = ["a river runs to the sea", "the mill turns"]
HEAD = "backbone.model.embed_tokens.weight"


@pytest.fixture
def lm() -> Model:
    return small("causal-lm", "nano")


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8)) for k in a
    )


def ruin(model: Model) -> None:
    with torch.no_grad():
        model.backbone.lm_head.weight.mul_(50)


def guard(**settings) -> CollapseGuard:
    return CollapseGuard(SurrogatePerplexity(TEXTS), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollback_is_bit_for_bit(lm, dtype):
    lm = lm.to(dtype)
    with torch.no_grad():
        lm.backbone.model.layers[0].mlp.gate_proj.weight[0, 0] = -0.0
    before = state(lm)
    with pytest.warns(CollapseWarning, match="rolled back"), guard().watch(lm) as report:
        ruin(lm)
        lm.backbone.model.layers[0].mlp.gate_proj.weight.data.abs_()  # turns -0.0 into 0.0 too
    assert report.collapsed and report.rolled_back and report.after > 10 * report.before
    assert set(report.changed) == {HEAD, "backbone.model.layers.0.mlp.gate_proj.weight"}
    assert set(report._originals.kept) == set(report.changed)  # only what changed is still held
    assert identical(before, state(lm))


def test_a_surgery_that_does_nothing_never_fires(lm):
    ruin(lm)  # far beyond both limits already
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guard(rel=1, abs=1, warn=1).watch(lm) as report:
            assert report.state == "open"
            lm.train(False)
    assert (report.state, report.changed, report.after) == ("sound", (), report.before)


def test_a_small_change_is_sound_and_can_still_be_taken_back(lm):
    before = state(lm)
    with guard().watch(lm) as report, torch.no_grad():
        lm.backbone.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    assert (report.state, report.rolled_back) == ("sound", False) and not identical(before, state(lm))
    assert report.changed == ("backbone.model.layers.1.mlp.down_proj.weight",)
    report.rollback()
    assert identical(before, state(lm))


def test_the_rule():
    judge = CollapseGuard(rel=10, abs=1000).judge
    assert judge(20, 30) == "sound" and judge(20, 30.1) == "warning"
    assert judge(20, 201) == "collapsed" and judge(500, 1001) == "collapsed"
    assert judge(2000, 2100) == "sound"  # above the absolute limit before the surgery already
    assert judge(20, math.inf) == "collapsed" and judge(2000, math.inf) == "collapsed"
    default = CollapseGuard()
    assert (default.rel, default.abs, default.warn, default.on_collapse) == (10, 1000, 1.5, "rollback")


def test_a_warning_comes_first(lm):
    calls = iter([10.0, 16.0])
    watcher = CollapseGuard(lambda model: next(calls))
    with pytest.warns(CollapseWarning, match="from 10 to 16"), watcher.watch(lm) as report, torch.no_grad():
        lm.backbone.model.norm.weight.mul_(2)
    assert report.state == "warning" and not report.rolled_back and report.ratio == 1.6


@pytest.mark.parametrize("mode", ["raise", "warn"])
def test_modes_that_leave_the_weights(lm, mode):
    before = state(lm)
    expected = pytest.raises(Collapsed) if mode == "raise" else pytest.warns(CollapseWarning)
    with expected as caught, guard(on_collapse=mode).watch(lm) as report:
        ruin(lm)
    assert report.collapsed and not report.rolled_back and not identical(before, state(lm))
    if mode == "raise":
        caught.value.report.rollback()
        assert identical(before, state(lm))


def test_a_surgery_that_fails_half_way_is_taken_back(lm):
    before = state(lm)
    with pytest.raises(ZeroDivisionError), guard().watch(lm):
        ruin(lm)
        raise ZeroDivisionError
    assert identical(before, state(lm))


def test_within_keeps_little_and_notices_the_rest(lm):
    before = state(lm)
    with pytest.warns(CollapseWarning), guard().watch(lm, within=lambda name: "embed" in name) as report:
        assert list(report._originals.kept) == [HEAD]
        ruin(lm)
    assert identical(before, state(lm))
    with pytest.raises(DownriverError, match=r"norm\.weight changed"), guard().watch(lm, within=lambda n: "embed" in n):
        lm.backbone.model.norm.weight.data.add_(1)
    with pytest.raises(InputError, match="within refuses all"), guard().watch(lm, within=lambda name: False):
        pass


def test_one_reference_for_many_watches_stops_slow_drift(lm):
    perplexities = iter([10.0, 14.0, 19.0, 21.0])
    watcher = CollapseGuard(lambda model: next(perplexities), rel=2, warn=10)
    reference, states = watcher.measure(lm), []
    for step in range(3):
        with warnings.catch_warnings(), watcher.watch(lm, reference=reference) as report, torch.no_grad():
            warnings.simplefilter("ignore")
            lm.backbone.model.norm.weight.fill_(step)
        states.append(report.state)
    assert states == ["sound", "sound", "collapsed"]
    assert lm.backbone.model.norm.weight[0] == 1  # what the last sound edit left


def test_surgery_that_renames_tensors(lm):
    with (
        pytest.raises(DownriverError, match=r"gate_proj.weight is no longer in the model.*use check"),
        guard().watch(lm),
    ):
        random_unstructured(lm.backbone.model.layers[0].mlp.gate_proj, "weight", 0.5)
        ruin(lm)


def test_a_tensor_of_another_shape_and_type_is_put_back(lm):
    before = state(lm)
    with pytest.warns(CollapseWarning), guard().watch(lm):
        ruin(lm)
        layer = lm.backbone.model.layers[0].mlp
        layer.down_proj.weight.data = layer.down_proj.weight.data[:, :64].double()
        layer.down_proj.weight.data = torch.zeros(32, 128, dtype=torch.float64).float()
    assert identical(before, state(lm))


def test_check_of_two_models(lm):
    merged = copy.deepcopy(lm)
    ruin(merged)
    with pytest.warns(CollapseWarning):
        report = guard().check(lm, merged)
    assert report.collapsed and report.rolled_back and report.model is lm
    fine = small("causal-lm", "nano", seed=1)
    report = guard().check(lm, fine, reference=260.0)
    assert (report.state, report.before) == ("sound", 260.0) and report.model is fine
    with pytest.warns(CollapseWarning):
        assert guard(on_collapse="warn").check(lm, merged).model is merged
    with pytest.raises(Collapsed):
        guard(on_collapse="raise").check(lm, merged)


def test_a_plain_transformers_model(lm):
    before = state(lm.backbone)
    with pytest.warns(CollapseWarning), guard().watch(lm.backbone, lm.processor) as report:
        ruin(lm)
    assert report.changed == ("model.embed_tokens.weight",) and identical(before, state(lm.backbone))


def test_bad_input(lm):
    for settings, words in (
        ({"rel": 0.9}, "rel is 0.9"),
        ({"abs": float("nan")}, "abs is nan"),
        ({"on_collapse": "undo"}, "unknown on_collapse 'undo'"),
    ):
        with pytest.raises(InputError, match=words):
            guard(**settings)
    for broken in (math.inf, math.nan, 0.0):
        with pytest.raises(InputError, match="before the surgery"), CollapseGuard(lambda m, b=broken: b).watch(lm):
            pass
    with pytest.raises(InputError, match="every is 0"):
        guard().callback(every=0)


@pytest.fixture(scope="module")
def rows() -> Task:
    texts = ["the river runs to the sea", "the mill turns by the river", "rain falls on the mill"] * 20
    return Task("rivers", "language-modelling", {"train": Dataset.from_dict({"text": texts})}, ("text",), None)


def train(model: Model, task: Task, callback, learning_rate: float, steps: int = 12) -> Model:
    """The Hugging Face Trainer on the rows of a task."""
    from transformers import Trainer, TrainingArguments

    dataset = [{"row": row} for row in task.rows("train")]
    collate = model.collate(task)
    args = TrainingArguments(
        output_dir="/nowhere",
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=lambda rows: collate([r["row"] for r in rows]),
        callbacks=[callback],
    )
    trainer.train()
    return model


def test_training_that_goes_well_is_left_alone(lm, rows):
    callback = guard().callback(every=5)
    before = state(lm)
    train(lm, rows, callback, 0.05)
    assert [report.state for report in callback.reports] == ["sound"] * 3  # steps 5 and 10, and the end
    assert callback.reports[-1].after < callback.reports[0].before and not identical(before, state(lm))


def test_training_that_goes_wrong_is_stopped_and_taken_back(lm, rows):
    callback = guard(rel=2).callback(every=2)
    before = state(lm)
    with pytest.warns(CollapseWarning):
        train(lm, rows, callback, 10.0)
    assert [report.state for report in callback.reports] == ["collapsed"] and callback.reports[0].rolled_back
    assert identical(before, state(lm))
    callback = guard(rel=2, on_collapse="warn").callback(every=2)
    with pytest.warns(CollapseWarning):
        train(small("causal-lm", "nano"), rows, callback, 100.0)  # weights that stay broken stay flagged
    assert [report.state for report in callback.reports] == ["collapsed"] * 6
    with pytest.raises(Collapsed):
        train(lm, rows, guard(rel=2, on_collapse="raise").callback(every=2), 10.0)


def test_fine_tune_takes_the_callback(lm, rows):
    callback = guard(rel=2).callback(every=2)
    before = state(lm)
    with pytest.warns(CollapseWarning):
        tuned = fine_tune(lm, rows, "64 examples", learning_rate=50.0, batch_size=4, warmup=0, callbacks=[callback])
    assert [report.state for report in callback.reports][-1] == "collapsed" and len(callback.reports) < 8
    assert len(callback.reports) > 1 or identical(before, state(tuned))
    assert float(SurrogatePerplexity(TEXTS)(tuned)) < 2 * float(SurrogatePerplexity(TEXTS)(lm))


def test_the_last_sound_weights_come_back(lm, rows):
    weight, seen = lm.backbone.model.norm.weight, iter([10.0, 11.0, 12.0, 99.0])
    kept: list[torch.Tensor] = []

    def surrogate(model):
        kept.append(weight.detach().clone())
        return next(seen)

    with pytest.warns(CollapseWarning):
        train(lm, rows, CollapseGuard(surrogate, rel=2).callback(every=3), 0.05)
    assert len(kept) == 4 and torch.equal(weight, kept[2]) and not torch.equal(kept[3], kept[2])


def test_validity_agrees_with_scipy():
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(3, 1, 40))
    y = -np.log(x) + rng.normal(0, 0.5, 40)
    found = validity(x, y, threshold=float(np.median(x)), task="t")
    below = x <= np.median(x)
    for mine, theirs, chosen in (
        (found.spearman, spearmanr, slice(None)),
        (found.pearson, pearsonr, slice(None)),
        (found.spearman_below, spearmanr, below),
        (found.pearson_below, pearsonr, below),
    ):
        assert mine.value == pytest.approx(theirs(np.log(x[chosen]), y[chosen]).statistic, abs=1e-12)
        assert mine.low < mine.value < mine.high
    assert found.spearman.n == 40 and found.spearman_below.n == 20 and found.infinite == 0
    wide = validity(x, y, threshold=10.0, level=0.99)
    assert wide.spearman.high - wide.spearman.low > found.spearman.high - found.spearman.low


def test_intervals_cover_what_they_should():
    rng, rho, hits = np.random.default_rng(1), -0.7, 0
    for _ in range(100):
        x, e = rng.normal(size=(2, 60))
        y = rho * x + math.sqrt(1 - rho**2) * e
        pearson = validity(np.exp(x), y, threshold=1e-9, resamples=400).pearson
        hits += pearson.low <= rho <= pearson.high
    assert 87 <= hits <= 99


def test_collapsed_points_inflate_a_correlation():
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(10, 14, 30), [500, 900, np.inf]])
    y = np.concatenate([rng.uniform(0.8, 0.9, 30), [0.0, 0.0, 0.0]])
    found = validity(x, y, threshold=15)
    assert found.infinite == 1 and found.spearman.n == 33 and found.pearson.n == 32 and found.spearman_below.n == 30
    assert found.pearson.value < -0.9 and abs(found.spearman_below.value) < 0.4


def test_few_or_equal_models_have_no_correlation():
    found = validity([10, 10, 10, 10], [1, 2, 3, 4], threshold=5)
    assert math.isnan(found.spearman.value) and found.spearman_below.n == 0 and math.isnan(found.pearson_below.low)
    for x, y, words in (
        ([1, 2], [1, 2], "at least three"),
        ([1, 2, 3], [1, 2], "one of each"),
        ([1, 2, -3], [1, 2, 3], "positive"),
        ([1, 2, 3], [1, 2, float("nan")], "finite"),
    ):
        with pytest.raises(InputError, match=words):
            validity(x, y, threshold=5)


def test_surrogate_validity_measures_models_folders_and_tasks(lm, rows, tmp_path):
    models: list = [lm]
    for number, scale in enumerate((3, 10, 30), start=1):
        models.append(copy.deepcopy(lm))
        with torch.no_grad():
            models[-1].backbone.lm_head.weight.mul_(scale)
        if number == 2:
            models[-1] = models[-1].save(tmp_path / "folder")
    test = Task("held out", "language-modelling", {"test": rows.rows("train").select(range(6))}, ("text",), None)
    [found] = surrogate_validity(models, SurrogatePerplexity(TEXTS), [test])
    assert found.task == "held out" and found.spearman.value == pytest.approx(1) and found.spearman.n == 4
    assert found.threshold == pytest.approx(1.5 * SurrogatePerplexity(TEXTS)(lm).score)
    [named] = surrogate_validity(
        models, SurrogatePerplexity(TEXTS), {"less": lambda m: -float(SurrogatePerplexity(TEXTS)(m))}
    )
    assert named.task == "less" and named.spearman.value == pytest.approx(-1)
    with pytest.raises(InputError, match="no models"):
        surrogate_validity([], SurrogatePerplexity(TEXTS), [test])
