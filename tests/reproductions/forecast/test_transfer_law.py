"""The reproduction of paper 1: its text, its model, what it measures, and the study at tiny scale."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from downriver.core.errors import InputError
from downriver.reproductions.forecast import transfer_law as module
from downriver.reproductions.forecast.transfer_law import Reached


def test_paper_and_claims():
    assert (module.paper.number, module.paper.slug) == (1, "transfer_law")
    assert module.reproduction.seeds == 3 and len(module.reproduction.claims) == 5
    assert [arm.name for arm in module.reproduction.arms()] == ["no pretraining", "aligned", "misaligned"]


def test_law_is_judged_on_the_amount_that_it_has_not_seen():
    score = lambda d: 2 + 3 * np.log(d)  # noqa: E731
    series = [Reached(d, score(d), 3 - 0.1 * i) for i, d in enumerate((20, 40, 80, 160, 320))]
    rows = {row.metric: row.value for row in module.measured(Reached(0, 5.0, 3.5), series)}
    assert rows["law error"] < 0.05 and rows["judged aligned"] == 1
    assert rows["chrF"] == score(320) and rows["chrF after 20 steps"] == score(20)
    off = [*series[:-1], dataclasses.replace(series[-1], chrf=score(320) - 6)]
    assert {r.metric: r.value for r in module.measured(Reached(0, 5.0, 3.5), off)}["law error"] > 5


def test_corruption_can_be_undone():
    rng = np.random.default_rng(0)
    window = torch.arange(module.WINDOW) % 256 + module.SHIFT
    for _ in range(20):
        source, target = module.corrupted(window, rng)
        sentinel = module.SHIFT + 256
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= sentinel:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        whole = [t for token in source[:-1] for t in (spans[token] if token >= sentinel else [token])]
        assert whole == window.tolist()
        assert sum(map(len, spans.values())) == 6 and source[-1] == target[-1] == module.END


def test_bytes_go_there_and_back():
    assert module.decoded([module.PAD, *module.encoded("Löschen"), 7, 7]) == "Löschen"
    assert module.stacked([[1, 2], [3]]).tolist() == [[1, 2], [3, module.PAD]]


def test_tested_messages_are_in_no_training_text(asset):
    asset("django-catalogues")
    train, test, allowed = module.parted(0)
    assert (len(train), len(test)) == (module.PAIRS, module.TESTED)
    assert not {s for s, _ in train} & {s for s, _ in test} and not {t for _, t in train} & {t for _, t in test}
    assert not {s for s, _ in test} & allowed
    for languages in (module.ALIGNED, module.MISALIGNED):
        text = module.decoded(module.text_of(languages, 0).tolist()).split("\n")
        assert not {t for _, t in test} & set(text)
    assert module.text_of(module.MISALIGNED, 0).max() > 200 + module.SHIFT  # other scripts
    assert module.parted(1)[1] != test


def test_study_at_tiny_scale(asset, tmp_path):
    asset("django-catalogues")
    pytest.importorskip("sacrebleu")
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == {"no pretraining", "aligned", "misaligned"} and rows["value"].is_finite().all()
    loss = dict(rows.filter(rows["metric"] == "cross-entropy").select("arm", "value").iter_rows())
    assert len(set(loss.values())) == 3 and max(loss.values()) < 12  # three different starts
    assert [v.verdict for v in result.verdicts()] == ["undecided"] * 5


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()
