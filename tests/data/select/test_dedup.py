"""Duplicates: the smallest id stays, shuffling changes nothing, every near copy is confirmed by its similarity."""

import random

import pytest

from downriver.core.errors import InputError
from downriver.core.minhash import jaccard, shingles
from downriver.data.documents import write_documents
from downriver.data.select.dedup import dedup


def pool(seed=0, families=30):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(500)]
    rows = []
    for _ in range(families):
        text = rng.choices(words, k=120)
        for _ in range(rng.randint(1, 4)):
            copy = list(text)
            if rng.random() < 0.6:
                copy[rng.randrange(120)] = "changed"
            rows.append({"id": "", "text": " ".join(copy)})
    names = rng.sample(range(10_000), len(rows))
    return [row | {"id": f"d{name:05d}"} for row, name in zip(rows, names, strict=True)]


def test_what_stays_and_why(tmp_path):
    rows = pool()
    texts = {row["id"]: row["text"] for row in rows}
    found = dedup(rows)
    kept = [name for name in texts if name not in found.reasons]
    assert len(kept) == 30 and found.documents == len(rows) == 30 + found.exact + found.near
    assert found.exact > 3 < found.near
    for name, reason in found.reasons.items():
        kind, _, original = reason.rpartition(" of ")
        assert original in kept and original < name
        if kind == "duplicate":
            assert texts[name] == texts[original]
        else:
            assert jaccard(shingles(texts[name]), shingles(texts[original])) >= 0.8
    random.Random(1).shuffle(rows)
    assert dedup(rows) == found
    write_documents(tmp_path / "in", rows, like="jsonl", shard_rows=7)
    assert dedup(tmp_path / "in") == found


def test_agrees_with_all_pairs():
    rows = sorted(pool(3, families=12), key=lambda row: row["id"])
    sets = {row["id"]: shingles(row["text"]) for row in rows}
    kept: list[str] = []
    for name in sets:
        if not any(jaccard(sets[name], sets[other]) >= 0.8 for other in kept):
            kept.append(name)
    assert sorted(set(sets) - set(dedup(rows).reasons)) == kept


def test_exact_only_and_bad_input():
    rows = pool()
    exact = dedup(rows, near=False)
    assert exact.near == 0 and all(reason.startswith("duplicate of") for reason in exact.reasons.values())
    assert len({row["text"] for row in rows}) == len(rows) - exact.exact
    with pytest.raises(InputError, match="id 'a' stands for several documents"):
        dedup([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])
    with pytest.raises(InputError, match="threshold 0"):
        dedup(rows, threshold=0)
