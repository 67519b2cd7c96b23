"""The studies of pretraining's advantage: one seed of each runs at a tiny scale, and their claims can fail."""

from dataclasses import replace

import polars as pl
import pytest

from downriver.reproductions.paper import catalogue
from downriver.reproductions.pretrain import pretraining_advantage as module
from downriver.study.claims import verdicts


def test_the_paper_is_the_catalogues() -> None:
    listed = next(p for p in catalogue() if p.slug == module.paper.slug)
    assert (listed.number, listed.title, listed.room, listed.date) == (
        module.paper.number, module.paper.title, module.paper.room, module.paper.date,
    )  # fmt: skip


@pytest.mark.parametrize("study", [module.simulation, module.off_model], ids=lambda s: s.name)
def test_a_tiny_simulation_runs_and_its_claims_can_fail(study, tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = replace(study, scale="tiny").run(tmp_path, executor="serial", seeds=3, progress=False)
    assert not result.failures
    rows = result.rows()
    assert len(rows) == 3 * 3 * len(result.arms) and (rows["value"] > 0).all() and set(rows["direction"]) == {"lower"}
    assert {v.verdict for v in result.verdicts()} == {"holds"}
    swapped = rows.with_columns(value=1 / pl.col("value"))
    assert {v.verdict for v in verdicts(study.claims, swapped, result.arms, result.seeds)} == {"fails"}


def test_a_tiny_table_runs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    study = replace(module.tables, scale="tiny", claims=())
    result = study.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["task"]) == {f"{name}, {k} a class" for name in ("wine", "all three") for k in module.EACH}
    assert rows["value"].is_between(0.3, 1).all()
