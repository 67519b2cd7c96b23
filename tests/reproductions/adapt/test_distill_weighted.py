"""The study of distilling from similar tasks: its parts are what the card says, and its claims can fail."""

from dataclasses import replace

import polars as pl
import torch

from downriver.reproductions.adapt import distill_weighted as module
from downriver.reproductions.paper import catalogue
from downriver.study.claims import verdicts

STUDY = module.reproduction


def test_the_paper_is_the_catalogues() -> None:
    listed = next(p for p in catalogue() if p.slug == module.paper.slug)
    assert (listed.number, listed.title, listed.room, listed.date) == (
        module.paper.number, module.paper.title, module.paper.room, module.paper.date,
    )  # fmt: skip


def test_the_rows_do_not_overlap_and_differ_between_seeds() -> None:
    data = module.digits(0)
    assert data.few[1].tolist() == [c for c in range(5) for _ in range(4)]
    assert data.many.shape == (250, 64) and len(data.test[0]) > 100
    parts = [data.source[0], data.few[0], data.many, data.test[0]]
    rows = [row.numpy().tobytes() for part in parts for row in part]
    assert len(set(rows)) > 0.99 * len(rows)  # a few images of the bundle are there twice
    assert not torch.equal(module.digits(1).many, data.many)


def test_augmentations_move_and_damage_images() -> None:
    torch.manual_seed(0)
    image = torch.zeros(500, 8, 8)
    image[:, 4, 4] = 1
    moved = module.shifted(image.flatten(1)).view(-1, 8, 8)
    assert torch.equal(moved.sum((1, 2)), torch.ones(500)) and moved[:, 3:6, 3:6].sum() == 500
    assert len({tuple(m.nonzero()[0].tolist()) for m in moved}) == 9
    assert (module.damaged(torch.ones(50, 64)) == 0).sum(1).min() == 9


def test_a_tiny_run_is_whole_and_its_claims_can_fail(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = replace(STUDY, scale="tiny").run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    accuracy = rows.filter(metric="accuracy")
    assert accuracy["arm"].to_list() == result.arms and accuracy["value"].is_between(0.1, 1).all()
    assert len(rows.filter(arm="weighted")) == 7
    worse = pl.concat([accuracy.with_columns(seed=pl.lit(s, accuracy["seed"].dtype)) for s in range(5)])
    order = ["weighted", "nearest", "random teacher", "supervised", "transfer", "FixMatch", "uniform"]
    ranks = worse["arm"].replace_strict({arm: i / 10 for i, arm in enumerate(order)}, return_dtype=pl.Float64)
    found = verdicts(STUDY.claims, worse.with_columns(value=ranks), result.arms, range(5))
    assert {v.verdict for v in found} == {"fails"}
