"""The reproduction of paper 2: the benchmark it generates, and the study at tiny scale."""

import dataclasses
import warnings

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.reproductions.forecast import cod as module


def test_paper_and_claims():
    assert (module.paper.number, module.paper.slug) == (2, "cod")
    assert module.reproduction.seeds == 8 and [c.kind for c in module.reproduction.claims] == ["better", "better"]
    assert [arm.name for arm in module.reproduction.arms()] == list(module.FORECASTS)


def test_benchmark_grows_and_hides_the_target():
    rates, anchor, truth = module.generate(600, np.random.default_rng(0))
    assert rates.shape == (600, 7) and anchor.shape == (600,)
    score = [*rates.mean(axis=0), anchor.mean(), truth]
    assert (np.diff(score) > 0).all() and 0.5 < truth < 0.9
    assert 50 * module.COMPUTE[-1] < module.TARGET
    assert (rates[:, -1] < 0.1).sum() > 100  # items that no small model solves


def test_study_at_tiny_scale_and_a_claim_that_fails(tmp_path):
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = tiny.run(tmp_path, executor="serial", seeds=2, progress=False)
    assert not result.failures and set(result.rows()["arm"]) == set(module.FORECASTS)
    assert result.rows()["value"].is_between(0, 0.5).all()
    # the claim turned round gets the opposite answer: it can fail
    claim = dataclasses.replace(tiny.claims[0], arm="end to end", than="cod")
    (turned,) = dataclasses.replace(tiny, claims=(claim,)).result(tmp_path, seeds=2).verdicts()
    assert turned.mean == pytest.approx(-result.verdicts()[0].mean) and turned.mean != 0


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.reproduction, scale="huge").arms()
