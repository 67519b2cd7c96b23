"""The reproduction of paper 36: it runs at tiny scale, its rows are what they say, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.models.rope import critical_dim
from downriver.reproductions import find
from downriver.reproductions.evaluate import longllada as module
from downriver.study.claims import verdicts

ARMS = ["diffusion", "diffusion, scaled", "causal", "causal, scaled"]
METRICS = (module.KNOWN, module.TWICE, module.FAR, module.GROWTH)


@pytest.fixture(scope="module")
def words():
    return module.Words(0)


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("longllada")
    assert (listed.number, listed.room, listed.title) == (36, "evaluate", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == set(ARMS)
    for arm in ARMS:
        assert 0 <= found[arm, module.KNOWN] <= 1
        assert found[arm, "perplexity at 128"] > 100  # some 330 words, next to nothing learnt
    scaled, plain = (found[f"diffusion{end}", module.GROWTH] for end in (", scaled", ""))
    assert scaled != plain  # the positions are others
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_models_differ_in_their_mask_alone(words):
    causal, diffusion = (module.untrained(kind, words.tokenizer, 0).backbone for kind in ("causal", "diffusion"))
    ours, theirs = dict(causal.named_parameters()), dict(diffusion.named_parameters())
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    theta = causal.config.rope_parameters["rope_theta"]
    assert diffusion.config.rope_parameters["rope_theta"] == theta
    assert critical_dim(theta, 32, module.TRAINED) == 16


def test_rows_of_pairs_count_second_values_alone(words):
    rows = words.rows(3, 4).rows("train").with_format("numpy")
    assert [len(ids) for ids in rows["input_ids"][:]] == [64] * 3 + [128] * 4
    keys = set(words._ids(" ".join(words.keys)))
    for ids, labels in zip(rows["input_ids"][:], rows["labels"][:], strict=True):
        if not keys & set(ids.tolist()):
            assert (ids == labels).all()
            continue
        places = np.flatnonzero(np.isin(ids, list(keys)))
        assert len(places) == 2 * module.PAIRS
        first: dict[int, int] = {}
        for place in places:
            key, value = int(ids[place]), int(ids[place + 1])
            assert first.setdefault(key, value) == value
            assert labels[place + 1] == (value if (ids[:place] == key).any() else module.IGNORED)
        assert (labels != module.IGNORED).sum() == module.PAIRS
    assert words.rows(1, 1).fingerprint == words.rows(1, 1).fingerprint != module.Words(1).rows(1, 1).fingerprint


def test_needles_and_texts_are_single_known_words(words):
    needle = words.needle(np.random.default_rng(0))
    assert needle.text == f"{needle.question} {needle.answer}"
    assert len(words._ids(needle.text)) == 2
    assert needle.answer in words.values[words.keys.index(needle.question)]
    assert len(words.long(3 * module.TRAINED)) >= max(scale[3] for scale in module.SCALES.values())
    assert words.tokenizer.unk_token_id not in words.train
    assert not {*words.keys, *words.values.ravel()} & set(" ".join(words.held).split())


def test_the_claims_fail_where_diffusion_is_worse():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": way}
        for arm, value in zip(ARMS, (0.5, 0.4, 0.8, 0.8), strict=True)
        for metric, way in [(name, "higher") for name in METRICS[:3]] + [(module.GROWTH, "lower")]
        for seed in range(5)
    ]
    rows = [row | {"value": 2 - row["value"]} if row["direction"] == "lower" else row for row in rows]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ARMS, range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 5
