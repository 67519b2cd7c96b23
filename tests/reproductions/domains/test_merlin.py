"""The study of scores against the number of scans: its parts are what the paper's are, and its claims can fail."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from downriver.core import InputError
from downriver.reproductions.domains import merlin as module
from downriver.reproductions.paper import catalogue
from downriver.study.claims import verdicts


def test_the_paper_is_the_catalogues_and_says_what_part_is_tested() -> None:
    listed = next(p for p in catalogue() if p.slug == module.paper.slug)
    mine = module.paper
    assert (listed.number, listed.title, listed.room, listed.date) == (mine.number, mine.title, mine.room, mine.date)
    assert "data-scaling part only" in mine.claim


def test_a_finding_changes_the_scan_where_its_organ_is() -> None:
    with_cyst = module.scans(400, "train", 0)
    middle = with_cyst.volumes[:, 0, 8:12, 5:10, 4:9].mean((1, 2, 3))
    has = with_cyst.present[:, 0]
    assert middle[has].mean() < middle[~has].mean() - 0.05
    assert has.float().mean() == pytest.approx(module.PREVALENCE, abs=0.08)
    assert not torch.equal(module.scans(2, "test", 0).volumes, with_cyst.volumes[:2])


def test_the_loss_is_the_same_both_ways_and_the_texts_differ_by_finding_and_presence() -> None:
    torch.manual_seed(0)
    model = module.Encoders()
    data = module.scans(8, "train", 1)
    loss = model(data.volumes, module.SENTENCES[torch.arange(6), data.present.long()])
    assert loss.item() > 0 and loss.requires_grad
    assert len({tuple(s.tolist()) for s in module.SENTENCES.flatten(0, 1)}) == 12


def test_the_forecast_is_the_power_through_the_first_three() -> None:
    scores = {n: 0.2 * n**0.15 for n in (64, 128, 256, 512)}
    assert {m.metric: m.value for m in module.forecast(scores)}["absolute error"] == pytest.approx(0, abs=1e-6)
    off = {m.metric: m.value for m in module.forecast(scores | {512: 0.3})}
    assert off["absolute error"] == pytest.approx(0.2 * 512**0.15 - 0.3, abs=1e-6)


def test_training_teaches_the_findings() -> None:
    train = module.scans(32, "train", 0)
    before, after = (module.macro_f1(module.trained(train, 32, steps, 0), train) for steps in (4, 80))
    assert after > before + 0.2


def test_a_tiny_run_is_whole_and_its_claims_can_fail(tmp_path) -> None:  # type: ignore[no-untyped-def]
    study = module.reproduction
    result = replace(study, scale="tiny").run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures and set(result.rows()["metric"]) >= {"macro F1", "exponent", "absolute error"}
    rows = result.rows()
    flat = rows.with_columns(value=np.full(len(rows), 0.5))
    worse = pl.concat([flat.with_columns(seed=pl.lit(s, flat["seed"].dtype)) for s in range(5)])
    assert {v.verdict for v in verdicts(study.claims, worse, result.arms, range(5))} == {"fails"}
    with pytest.raises(InputError, match="scale"):
        list(module.reproduction.function(0, None, "huge"))
