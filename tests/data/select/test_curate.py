"""Curation: the rule language, one reason a dropped row, the repaired mix, duplicates, profiles."""

import collections

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.annotate import HeuristicAnnotator
from downriver.data.annotate.magpie import QUALITIES
from downriver.data.select.curate import TULUTALK, Curator, Rule, TaskBalance, compare, profile


def table(n=1200, seed=0):
    """Quality is high in math and low in editing; rewards of the two sources lie on different numbers."""
    rng = np.random.default_rng(seed)
    task = rng.choice(["math", "editing", "planning"], n, p=[0.5, 0.3, 0.2])
    high = {"math": 0.7, "editing": 0.2, "planning": 0.5}
    quality = [("excellent" if rng.random() < high[t] else rng.choice(["good", "good", "poor"])) for t in task]
    source = rng.choice(["A", "B"], n)
    single = rng.random(n) < 0.7
    return pl.DataFrame(
        {
            "id": [f"r{i:04d}" for i in rng.permutation(n)],
            "source": source,
            "turns": np.where(single, 1, 3),
            "task": task,
            "quality": quality,
            "safety": np.where(rng.random(n) < 0.02, "unsafe", "safe"),
            "st_reward": [float(x) if s else None for x, s in zip(rng.normal(size=n), single, strict=True)],
            "mt_reward": [float(x) if not s else None for x, s in zip(rng.integers(3, 6, n), single, strict=True)],
        }
    )


def kept(selection):
    return set(selection.ids)


def hold(text, frame):
    return frame.select(Rule(text).expression(frame))[:, 0].to_list()


def test_without_rules_every_row_stays():
    frame = table()
    chosen = Curator().fit(frame)
    assert chosen.indices.tolist() == list(range(frame.height)) and chosen.reasons == {}


def test_every_dropped_row_has_one_reason_and_the_counts_add_up(tmp_path):
    frame = table()
    frame = frame.with_columns(pl.when(pl.int_range(pl.len()) % 50 == 0).then(None).otherwise("task").alias("task"))
    chosen = Curator(TULUTALK, TaskBalance(), drop=("failed", "unsafe"), target_size=200).fit(frame)
    assert set(chosen.indices) | set(chosen.reasons) == set(range(frame.height))
    assert not set(chosen.indices) & set(chosen.reasons) and len(chosen.indices) == 200
    counts = collections.Counter(reason.split(":")[0] for reason in chosen.reasons.values())
    assert counts["annotation failed"] == 24 and set(counts) == {"annotation failed", "unsafe", "rule", "target size"}
    parts = {reason for reason in chosen.reasons.values() if reason.startswith("rule")}
    assert "rule: quality>=excellent" in parts and len(parts) == 2
    chosen.audit(tmp_path / "audit.parquet")
    assert pl.read_parquet(tmp_path / "audit.parquet").height == frame.height


@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("target_size", [None, 400])
def test_the_repaired_mix_is_within_tolerance_of_the_source(tolerance, target_size):
    frame = table()
    shares = profile(frame, by=["task"]).shares["task"]
    core = Curator("quality>=excellent").fit(frame)
    starved = profile(frame[core.indices], by=["task"]).shares["task"]
    assert max(abs(starved[t] - s) for t, s in shares.items()) > 0.15
    balance = TaskBalance(tolerance=tolerance)
    chosen = Curator("quality>=excellent", balance, target_size=target_size).fit(frame)
    repaired = profile(frame[chosen.indices], by=["task"]).shares["task"]
    assert max(abs(repaired[t] - s) for t, s in shares.items()) <= tolerance + 0.5 / len(chosen.indices)
    if target_size is None:
        assert kept(core) < kept(chosen)  # rows only come back
        assert set(frame[chosen.indices]["quality"]) == {"good", "excellent"}


def test_a_reference_given_as_shares_and_the_best_candidates_first():
    frame = table()
    reference = {"math": 0.5, "editing": 0.25, "planning": 0.25}
    chosen = Curator("quality>=excellent", TaskBalance(reference)).fit(frame)
    shares = profile(frame[chosen.indices], by=["task"]).shares["task"]
    assert all(abs(shares[t] - s) <= 0.03 for t, s in reference.items())
    back = frame.with_row_index().filter(pl.col("index").is_in(chosen.indices.tolist()) & (pl.col("quality") == "good"))
    out = frame.with_row_index().filter(~pl.col("index").is_in(chosen.indices.tolist()) & (pl.col("quality") == "good"))
    mine, other = (f.filter((pl.col("task") == "editing") & (pl.col("turns") == 1))["st_reward"] for f in (back, out))
    assert mine.mean() > other.mean()


def test_rescaling_one_sources_reward_monotonously_changes_nothing():
    frame = table()
    bent = frame.with_columns(
        st_reward=pl.when(pl.col("source") == "A").then((pl.col("st_reward") * 3).exp() + 7).otherwise("st_reward")
    )
    curator = Curator("st_reward>=q(.6, by='source')", TaskBalance(), target_size=300)
    assert kept(curator.fit(frame)) == kept(curator.fit(bent))
    assert kept(Curator("st_reward>=q(.6)").fit(frame)) != kept(Curator("st_reward>=q(.6)").fit(bent))


def test_planted_duplicates_go_and_the_kept_id_is_stable_under_shuffling():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 16))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points[40:] = points[:20] + 0.005 * rng.normal(size=(20, 16))  # paraphrases, about 0.02 away
    frame = pl.DataFrame({"id": [f"x{i:02d}" for i in rng.permutation(60)]})
    chosen = Curator(dedup=0.05).fit(frame, points)
    ids = frame["id"].to_list()
    assert len(chosen.ids) == 40 and kept(chosen) == {min(ids[i], ids[40 + i]) for i in range(20)} | set(ids[20:40])
    assert all(reason.startswith("duplicate of x") for reason in chosen.reasons.values())
    order = rng.permutation(60)
    assert kept(Curator(dedup=0.05).fit(frame[order], points[order])) == kept(chosen)


def test_shuffling_the_table_changes_nothing():
    frame = table()
    curator = Curator(TULUTALK, TaskBalance(), target_size=300, seed=1)
    assert kept(curator.fit(frame)) == kept(curator.fit(frame.sample(fraction=1.0, shuffle=True, seed=1)))


def test_the_rule_language():
    frame = pl.DataFrame(
        {
            "quality": ["poor", "good", None, "excellent"],
            "turns": [1, 2, 3, 4],
            "task": ["math", "role playing", "x", "y"],
        }
    )
    assert hold("quality>=good", frame) == [False, True, False, True]
    assert hold("quality < good", frame) == [True, False, False, False]
    assert hold("quality=='very poor' | turns>=3", frame) == [False, False, True, True]
    assert hold("turns==1 | turns==2 & task==math", frame) == [True, False, False, False]
    assert hold("(turns==1 | turns==2) & task!=math", frame) == [False, True, False, False]
    assert hold("~(turns>1) | task=='role playing'", frame) == [True, True, False, False]
    assert hold("turns > q(.5)", frame) == [False, False, False, True]
    assert Rule("a==1 & (b>2 | c==q(.5, by='d'))").columns == {"a", "b", "c", "d"}
    by = pl.DataFrame({"x": [1.0, 2, 10, 20], "s": ["a", "a", "b", "b"]})
    assert hold("x>=q(.9, by='s')", by) == hold("x>=q(.9, by=s)", by) == [False, True, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quality>=", r"at '' \(character 10\): a number, a word or q\(...\) is expected"),
        ("quality good", "a comparison is expected"),
        ("quality>=good)", "the end or an operator is expected"),
        ("(quality>=good", r"\) is expected"),
        ("turns>=q(2)", r"q\(2\): a share from 0 to 1"),
        ("turns>=q(.5, per='a')", "by='column' is expected"),
        ("__import__('os').system('ls')", "this is no part of a rule"),
        ("exec('x')", "a comparison is expected"),
        ("turns>=1; drop", "this is no part of a rule"),
        ("", "the rule is empty"),
    ],
)
def test_texts_that_are_no_rules(text, said):
    with pytest.raises(InputError, match=said):
        Rule(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": "qualty>=good"}, "unknown column in the rule .*did you mean 'quality'"),
        ({"keep": "quality>=superb"}, "unknown quality in the rule"),
        ({"keep": "turns==many"}, "column 'turns' holds numbers and is compared with 'many'"),
        ({"keep": "task==3"}, "column 'task' holds words"),
        ({"keep": "task>=q(.5)"}, "holds no numbers to take a quantile of"),
        ({"keep": "st_reward>=1"}, r"compares st_reward over several scales \(a, b\)"),
        ({"keep": "st_reward>=q(.5)"}, "a quantile by source"),
        ({"keep": "quality>=excellent", "target_size": 10_000}, "target_size 10000 is above the 6.. rows"),
        ({"dedup": 0.05}, "needs an embedding of each of the 1200 rows: none given"),
    ],
)
def test_bad_input_to_fit(settings, said):
    frame = table().with_columns(reward_scale=pl.when(pl.col("source") == "A").then(pl.lit("a")).otherwise(pl.lit("b")))
    with pytest.raises(InputError, match=said):
        Curator(**settings).fit(frame)
    assert Curator("st_reward>=q(.5, by='source')").fit(frame).ids


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Curator(drop=("bad",)), "unknown kind of row to drop"),
        (lambda: Curator(dedup=0), "dedup is 0"),
        (lambda: Curator(target_size=0), "target_size is 0"),
        (lambda: TaskBalance(min_quality="fine"), "unknown min_quality"),
        (lambda: TaskBalance(tolerance=0), "tolerance is 0"),
        (lambda: TaskBalance({"a": 0.4}), "reference shares sum to 0.4"),
        (lambda: TaskBalance("pool"), "unknown reference"),
    ],
)
def test_bad_settings(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_ids_must_be_unique_and_columns_there():
    with pytest.raises(InputError, match="id 'a' stands for several rows"):
        Curator().fit(pl.DataFrame({"id": ["a", "a"]}))
    with pytest.raises(InputError, match="unknown column that curation needs 'safety'"):
        Curator(drop=("unsafe",)).fit(pl.DataFrame({"id": ["a"]}))
    with pytest.raises(InputError, match="unknown column that the repair needs 'task'"):
        Curator(repair=TaskBalance()).fit(pl.DataFrame({"id": ["a"]}))


def test_profiles_and_their_divergence(tmp_path):
    frame = table()
    whole = profile(frame, by=["source", "turns", "task"], name="all")
    assert sum(whole.shares["task"].values()) == pytest.approx(1) and set(whole.shares["turns"]) == {"1", "3"}
    assert whole.quantiles["mt_reward"] == (3, 3, 4, 5, 5)
    math = profile(frame.filter(pl.col("task") == "math"), by=["task", "source"], name="math")
    found = compare(whole, math)
    assert (
        set(found.divergences) == {"task", "source"} and found.divergences["task"] > 0.1 > found.divergences["source"]
    )
    assert compare(math, whole).divergences == pytest.approx(found.divergences)
    assert found.plot(tmp_path / "mix.png").stat().st_size > 5000
    apart = [profile(pl.DataFrame({"t": [t]}), by=["t"]) for t in "ab"]
    assert compare(*apart).divergences["t"] == pytest.approx(1)
    with pytest.raises(InputError, match="unknown column to profile"):
        profile(frame, by=["tsk"])
    with pytest.raises(InputError, match="no column in common"):
        compare(whole, apart[0])


def test_from_conversations_to_a_selection():
    chats = [
        [
            {"role": "user", "content": f"Explain why {i} is {'odd' if i % 2 else 'even'}."},
            {"role": "assistant", "content": a},
        ]
        for i, a in enumerate(["Divide it by two and look at the rest.", "I'm sorry, I can't help with that."] * 5)
    ]
    annotated = HeuristicAnnotator().annotate(chats)
    chosen = Curator("quality>=excellent & st_reward==5").fit(annotated)
    assert chosen.indices.tolist() == [0, 2, 4, 6, 8] and QUALITIES[-1] == "excellent"
