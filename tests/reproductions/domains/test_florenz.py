"""The study of captions in languages that were only translated into: nothing leaks, and its claims can fail."""

from dataclasses import replace

import polars as pl
import pytest
import torch

from downriver.core import InputError
from downriver.reproductions.domains import florenz as module
from downriver.reproductions.paper import catalogue
from downriver.study.claims import verdicts

STUDY = module.reproduction


def test_the_paper_is_the_catalogues() -> None:
    listed, mine = next(p for p in catalogue() if p.slug == module.paper.slug), module.paper
    assert (listed.number, listed.title, listed.room, listed.date) == (mine.number, mine.title, mine.room, mine.date)


def test_tested_scenes_are_not_trained_on_and_captions_tell_scenes_apart() -> None:
    train, test = module.parted(0, module.SCALES["small"])
    assert len(train) + len(test) == 81 and not set(train) & set(test) and len(test) == 21
    for language in module.ORDERS:
        assert len({module.said(scene, language) for scene in train}) == len(train)
    assert len({module.said(train[0], language) for language in module.ORDERS}) == 4
    assert module.parted(1, module.SCALES["small"])[1] != test


def test_images_show_the_scene() -> None:
    scene = (("red", "square"), ("blue", "cross"))
    image = module.drawn(scene, 2)
    assert image[0, :8, :8].sum() == 25 and image[2, 8:, 8:].sum() == 9 and image.sum() == 34
    assert len({module.drawn(scene, k).numpy().tobytes() for k in range(4)}) == 4


def test_the_image_of_a_translation_keeps_one_object_so_that_the_text_must_be_read() -> None:
    rows = [
        module.row(scene, k, "translate", "L3")
        for scene in module.parted(0, module.SCALES["small"])[0]
        for k in range(4)
    ]
    captions = [
        module.row(scene, k, "caption", "L3") for scene in module.parted(0, module.SCALES["small"])[0] for k in range(4)
    ]
    same = [torch.equal(a["image"], b["image"]) for a, b in zip(rows, captions, strict=True)]
    left = [torch.equal(a["image"][:, :, :8], b["image"][:, :, :8]) for a, b in zip(rows, captions, strict=True)]
    assert all(left) and 0 < sum(same) < 0.25 * len(same)
    assert all(a["target"] == b["target"] and a["source"].startswith("L1") for a, b in zip(rows, captions, strict=True))


def test_captions_in_unseen_languages_are_never_trained_on() -> None:
    assert module.grid().held == {("caption", "L3"), ("caption", "L4")}
    assert ("translate", "L3") in module.grid().seen
    assert module.grid(without=module.UNSEEN).seen == {("caption", "L1"), ("caption", "L2"), ("translate", "L2")}


def test_the_law_is_over_all_checkpoints_and_missing_where_there_is_no_front() -> None:
    def run(gmacs: list[float], unseen: list[float]) -> module.Run:
        return module.Run(gmacs, unseen, 0.0, 0.0, None)  # type: ignore[arg-type]

    falling = [run([10.0, 20], [2.0, 1.8]), run([40.0, 80], [1.7, 1.5])]
    found = {m.metric: m.value for m in module.pareto(falling)}
    assert found["slope"] < found["upper end of the slope"] < 0
    rising = module.pareto([run([10.0, 20], [1.0, 1.8]), run([40.0, 80], [1.7, 2.5])])
    assert all(m.value != m.value for m in rising)


def test_a_tiny_run_is_whole_and_its_claims_can_fail(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = replace(STUDY, scale="tiny").run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    losses = rows.filter(metric="UC cross-entropy")
    assert losses["arm"].to_list() == ["small", "medium", "large", "large, opening forced", "control"]
    assert (losses["value"] > 0).all() and (rows.filter(arm="large")["flops"] > 0).all()
    worse = rows.with_columns(
        value=pl.when(pl.col("metric").str.contains("slope")).then(0.1).when(arm="small").then(0.0).otherwise(0.5)
    )
    worse = pl.concat([worse.with_columns(seed=pl.lit(s, worse["seed"].dtype)) for s in range(5)])
    assert {v.verdict for v in verdicts(STUDY.claims, worse, result.arms, range(5))} == {"fails"}
    with pytest.raises(InputError, match="scale"):
        list(STUDY.function(0, None, "huge"))
