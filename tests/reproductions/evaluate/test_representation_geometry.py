"""The study of activations and geometry: pairs start alike, a tiny run is whole, and its claims can fail."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from downriver.evaluate.geometry_task import random_task
from downriver.reproductions.evaluate import representation_geometry as module
from downriver.reproductions.paper import catalogue
from downriver.study.claims import verdicts

STUDY = module.reproduction


def test_the_paper_is_the_catalogues() -> None:
    listed = next(p for p in catalogue() if p.slug == module.paper.slug)
    assert (listed.number, listed.title, listed.room, listed.date) == (
        module.paper.number, module.paper.title, module.paper.room, module.paper.date,
    )  # fmt: skip


def test_pairs_start_from_the_same_weights() -> None:
    task = random_task(16, 1, spectrum="flat", dim=32, noise=0.5)
    one, other = (module.train(task, f, 0, 1)[0] for f in (torch.tanh, torch.tanh))
    assert torch.equal(one.first.weight, other.first.weight)
    assert not torch.equal(one.first.weight, module.train(task, torch.tanh, 1, 1)[0].first.weight)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(module.ACTIVATIONS, "softplus")
        patch.delitem(module.ACTIVATIONS, "hard tanh")
        result = replace(STUDY, scale="tiny").run(folder, executor="serial", seeds=1, progress=False)
    assert not result.failures
    return result.rows()


def test_a_tiny_run_is_whole(rows: pl.DataFrame) -> None:
    assert len(rows) == 2 * 2 * 7
    assert np.isfinite(rows["value"].to_numpy()).all()
    found = rows.filter(arm="tanh", metric="training loss")["value"]
    assert (found < 0.8).all()


def test_the_claims_can_fail(rows: pl.DataFrame) -> None:
    several = pl.concat([rows.with_columns(seed=pl.lit(s, rows["seed"].dtype)) for s in range(5)])
    wrong = pl.when(pl.col("metric").is_in(["target alignment", "ccgp"])).then(pl.col("arm") == "ReLU")
    several = several.with_columns(value=wrong.otherwise(pl.col("arm") == "tanh").cast(pl.Float64))
    found = verdicts(STUDY.claims, several, list(module.ACTIVATIONS), range(5))
    assert {v.verdict for v in found} == {"fails"} and len(found) == 6
