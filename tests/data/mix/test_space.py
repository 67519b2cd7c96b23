"""Mixtures keep to the simplex and to their caps; names count, positions do not."""

import numpy as np
import polars as pl
import pytest

from downriver.core import InputError
from downriver.data import MixtureSpace, sample_mixtures
from downriver.data.mix.space import dirichlet, shares

PILE = {"web": 0.6, "code": 0.2, "books": 0.1, "wiki": 0.06, "mail": 0.04}


def test_samples_are_mixtures_below_their_caps_and_whole_multiples() -> None:
    space = MixtureSpace(tuple(PILE), PILE, max_repeat=3)
    W = sample_mixtures(space, 512, seed=3)
    assert W.shape == (512, 5)
    np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)
    assert (space.caps + 1e-12 >= W).all()
    np.testing.assert_allclose(W / 2e-4, np.round(W / 2e-4), atol=1e-8)
    assert len(np.unique(W, axis=0)) == 512
    assert (W == 0).any() and W.std(axis=0).min() > 0.02
    np.testing.assert_array_equal(W, sample_mixtures(space, 512, seed=3))
    assert not np.array_equal(W, sample_mixtures(space, 512, seed=4))


def test_a_tempered_prior_is_flatter() -> None:
    space = MixtureSpace(tuple(PILE), PILE, max_repeat=1e9)
    flat, natural = (sample_mixtures(space, 512, temperature=t).mean(axis=0) for t in (0.0, 1.0))
    assert np.abs(flat - 0.2).max() < 0.05
    assert np.abs(natural - space.prior).max() < 0.06


def test_caps_come_from_tokens_where_they_are_known() -> None:
    space = MixtureSpace(("a", "b"), max_repeat=4, token_budget=1000, available_tokens={"b": 100, "a": 900})
    np.testing.assert_allclose(space.prior, [0.9, 0.1])
    np.testing.assert_allclose(space.caps, [1.0, 0.4])
    assert space.epochs(np.array([0.6, 0.4])) == pytest.approx({"a": 600 / 900, "b": 4.0})
    assert MixtureSpace(("a", "b")).epochs(np.array([0.5, 0.5])) is None


def test_draws_below_tight_caps_are_still_found() -> None:
    space = MixtureSpace(("a", "b", "c"), max_repeat=1.3)
    W = dirichlet(space, 200, 1.0, np.random.default_rng(0))
    assert len(W) == 200 and (space.caps + 1e-12 >= W).all()


def test_columns_are_taken_by_name() -> None:
    frame = pl.DataFrame({"b": [0.25, 0.0], "a": [0.75, 1.0]})
    rows, names = shares(frame, ("a", "b"))
    assert names == ("a", "b") and rows.tolist() == [[0.75, 0.25], [1.0, 0.0]]


def test_rounded_rows_are_scaled_and_said() -> None:
    with pytest.warns(RuntimeWarning, match="1 rows do not sum to 1"):
        rows, _ = shares([[0.5, 0.497], [0.5, 0.5]])
    np.testing.assert_allclose(rows.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shares([[0.5, 0.6]]), r"row 1 sums to 1.1"),
        (lambda: shares([[0.5, 0.5], [1.5, -0.5]]), r"row 2, domain 'domain 1': -0.5"),
        (lambda: shares([[0.5, float("nan")]]), "nan where a share is expected"),
        (lambda: shares({"a": [1.0]}, ("a", "b")), "domain 'b' is missing"),
        (lambda: shares({"a": [0.5], "b": [0.5], "cc": [0.0]}, ("a", "b")), "unknown domain in mixtures 'cc'"),
        (lambda: MixtureSpace(("a",)), "two different names"),
        (lambda: MixtureSpace(("a", "a")), "two different names"),
        (lambda: MixtureSpace(("a", "b"), {"a": 1}), "says nothing of domain 'b'"),
        (lambda: MixtureSpace(("a", "b"), {"a": 1, "b": 1, "aa": 1}), "unknown domain in prior 'aa'"),
        (lambda: MixtureSpace(("a", "b"), (0.5, 0.0)), "prior: a positive number"),
        (lambda: MixtureSpace(("a", "b"), max_repeat=0.5), "no mixture keeps to them"),
        (lambda: MixtureSpace(("a", "b"), token_budget=10), "beside available_tokens"),
        (lambda: sample_mixtures(MixtureSpace(("a", "b")), 4, minimum=0.3), "whole fraction"),
        (lambda: sample_mixtures(MixtureSpace(("a", "b")), 8, minimum=0.25), "only 5 different mixtures"),
    ],
)
def test_bad_input_is_named(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()
