"""Mixtures of one batch: how many there are, each by its number, limits; and batches that hold them exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from downriver.core import InputError
from downriver.data.mix.batch import BatchMixtureSampler, BatchMixtureSpace


def compositions(m: int, b: int) -> list[tuple[int, ...]]:
    """By the definition, recursively."""
    if m == 1:
        return [(b,)]
    return [(k, *rest) for k in range(b + 1) for rest in compositions(m - 1, b - k)]


@pytest.mark.parametrize(("m", "b", "size"), [(2, 3, 4), (3, 2, 6), (12, 16, 13_037_895), (5, 7, math.comb(11, 4))])
def test_how_many_there_are(m, b, size):
    assert BatchMixtureSpace(m, b).size == size


@pytest.mark.parametrize(("m", "b", "chunk"), [(2, 3, 10), (3, 2, 1), (4, 6, 7), (5, 5, 1000)])
def test_chunks_are_all_mixtures_in_order(m, b, chunk):
    space = BatchMixtureSpace(m, b)
    chunks = list(space.iter(chunk))
    assert max(map(len, chunks)) <= chunk
    rows = np.concatenate(chunks)
    assert (rows * b).round().astype(int).tolist() == list(map(list, compositions(m, b)))
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    np.testing.assert_array_equal(space.unrank(len(rows) - 1), rows[-1])


def test_limits_leave_out_exactly_what_breaks_them():
    limits = {"b": (0.2, 0.5), "d": (0.0, 0.15)}
    space = BatchMixtureSpace("abcd", 10, limits)
    wanted = [k for k in compositions(4, 10) if 2 <= k[1] <= 5 and k[3] <= 1]
    rows = np.concatenate(list(space.iter()))
    assert (rows * 10).round().astype(int).tolist() == list(map(list, wanted)) and space.size == len(wanted)
    assert (
        rows[5] in space and np.array([0.5, 0.1, 0.4, 0.0]) not in space and np.array([0.5, 0.25, 0.25, 0]) not in space
    )


def test_samples_differ_and_are_even():
    space = BatchMixtureSpace(3, 4)
    everything = space.sample(15, seed=1)
    assert len(np.unique(everything, axis=0)) == 15
    np.testing.assert_array_equal(everything, space.sample(15, seed=1))
    counts = np.zeros(15)
    rows = np.concatenate(list(space.iter())).tolist()
    for seed in range(1500):
        counts[rows.index(space.sample(1, seed)[0].tolist())] += 1
    assert abs(counts - 100).max() < 50


def test_spaces_beyond_64_bits():
    space = BatchMixtureSpace(40, 64)
    assert space.size == math.comb(103, 39) > 2**64
    W = space.sample(300, seed=2)
    assert len(np.unique(W, axis=0)) == 300
    np.testing.assert_allclose(W.sum(axis=1), 1)
    assert space.unrank(space.size - 1).tolist() == [1.0] + [0.0] * 39
    assert abs(W.mean(axis=0) - 1 / 40).max() < 0.01


def test_the_nearest_mixture():
    space = BatchMixtureSpace("abc", 16, {"c": (0.125, 1.0)})
    assert (space.nearest({"a": 0.7, "b": 0.3, "c": 0.0}) * 16).tolist() == [10, 4, 2]
    W = np.concatenate(list(space.iter()))
    for seed in range(20):
        wish = np.random.default_rng(seed).dirichlet(np.ones(3))
        found = space.nearest(dict(zip("abc", wish, strict=True)))
        assert found in space
        assert np.abs(found - wish).sum() <= np.abs(W - wish).sum(axis=1).min() + 1e-9


def test_every_batch_holds_the_ratio_and_rows_come_once_an_epoch():
    counts = np.array([10, 5, 0, 1])
    sets = {"a": range(37), "b": range(11), "c": range(0), "d": range(3)}
    sampler = BatchMixtureSampler(sets, dict(zip("abcd", counts / 16, strict=True)), 16, batches=60, seed=4)
    ends = np.cumsum([37, 11, 0, 3])
    batches = list(sampler)
    assert len(batches) == len(sampler) == 60
    for batch in batches:
        assert np.bincount(np.searchsorted(ends, batch, side="right"), minlength=4).tolist() == counts.tolist()
    a = [row for batch in batches for row in batch if row < 37]
    for epoch in range(len(a) // 37):
        assert sorted(a[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert sampler.epochs(60)["d"] == 20 and [sampler.row(v) for v in range(16)] == batches[0]


def test_a_loader_takes_it_and_it_goes_on_where_it_stood():
    rows = torch.arange(20)
    sampler = BatchMixtureSampler({"a": 15, "b": 5}, {"a": 0.75, "b": 0.25}, 4, batches=9)
    whole = [batch.tolist() for batch in DataLoader(rows, batch_sampler=sampler)]
    assert [batch.tolist() for batch in DataLoader(rows, batch_sampler=sampler)] == whole
    begun = list(itertools.islice(iter(sampler), 4))
    again = BatchMixtureSampler({"a": 15, "b": 5}, {"a": 0.75, "b": 0.25}, 4, batches=9)
    again.load_state_dict(sampler.state_dict())
    assert begun + list(again) == whole


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BatchMixtureSpace(1, 4), "two different names"),
        (lambda: BatchMixtureSpace("aab", 4), "two different names"),
        (lambda: BatchMixtureSpace("ab", 0), "batch_size is 0"),
        (lambda: BatchMixtureSpace("ab", 4, {"c": (0, 1)}), "unknown domain in limits 'c'"),
        (lambda: BatchMixtureSpace("ab", 4, {"a": (0.5, 0.2)}), "the lower first"),
        (lambda: BatchMixtureSpace("ab", 4, {"a": (0.3, 0.4)}), "no batch of 4 keeps to them"),
        (lambda: BatchMixtureSpace("ab", 4).unrank(5), "from 0 to 4"),
        (lambda: BatchMixtureSpace("ab", 4).sample(6), "from 1 to 5"),
        (lambda: BatchMixtureSampler({"a": 9, "b": 9}, {"a": 0.7, "b": 0.3}, 4), "'a' has 2.8 of 4 rows a batch"),
        (lambda: BatchMixtureSampler({"a": 9, "b": 0}, {"a": 0.5, "b": 0.5}, 4), "and no rows"),
        (lambda: BatchMixtureSampler({"a": 9, "b": 9}, {"a": 0.5, "c": 0.5}, 4), "source in weights 'c'"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(InputError, match=said):
        make()
