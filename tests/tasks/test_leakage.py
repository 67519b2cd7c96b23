"""Planted duplicates are found, unrelated rows are not; nothing of the text is shown."""

import datasets
import numpy as np
import pytest
from PIL import Image

from downriver.core import InputError
from downriver.core.minhash import jaccard, shingles
from downriver.tasks import Task, leakage
from downriver.tasks.leakage import duplicate_groups

rng = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(5000)]


def document(n: int = 120) -> list[str]:
    return rng.choice(WORDS, n).tolist()


def task_of(train: list[str], test: list[str]) -> Task:
    split = lambda texts: datasets.Dataset.from_dict({"text": texts, "y": [i % 2 for i in range(len(texts))]})  # noqa: E731
    return Task("planted", "text-classification", {"train": split(train), "test": split(test)}, ("text",), "y")


def test_planted_duplicates_are_found_and_nothing_else():
    train = [document() for _ in range(400)]
    test = [document() for _ in range(100)]
    expected = {}
    for i in range(10):  # word for word, but for case and punctuation
        test[i] = [w.upper() + "," for w in train[3 * i]]
        expected[i] = 3 * i
    for i in range(10, 25):  # two words changed far apart: similarity of 106 / 126 = 0.84
        test[i] = list(train[100 + i])
        test[i][30], test[i][80] = "changed", "also"
        expected[i] = 100 + i
    for i in range(25, 40):  # half of the document: similarity well under the threshold
        test[i] = train[200 + i][:60] + document(60)
    report = leakage(task_of([" ".join(t) for t in train], [" ".join(t) for t in test]))
    (overlap,) = report.overlaps
    assert (overlap.rows, overlap.exact, overlap.near) == (100, 10, 15)
    assert overlap.rate == 0.25
    assert all(expected[i] == j for i, j in overlap.examples)
    assert not report.clean
    assert "10 (10.00%) also stand in train and 15 (15.00%) nearly so" in report.text
    assert "w1" not in report.text


def test_the_threshold_is_the_true_jaccard_similarity():
    a = document(60)
    b = list(a)
    b[30] = "changed"
    similarity = jaccard(shingles(" ".join(a)), shingles(" ".join(b)))
    assert similarity == pytest.approx(51 / 61)
    task = task_of([" ".join(a), "x"], [" ".join(b), "y"])
    assert leakage(task, threshold=0.8).overlaps[0].near == 1
    assert leakage(task, threshold=0.85).overlaps[0].near == 0


def test_unrelated_and_short_texts_are_clean():
    train = [" ".join(document(4)) for _ in range(200)]
    test = [" ".join(document(4)) for _ in range(200)]
    report = leakage(task_of(train, test))
    assert report.clean
    assert report.text == "planted: of 200 test rows 0 (0.00%) also stand in train"
    assert leakage(task_of(["a short one", ""], ["A SHORT ONE!", "?"])).overlaps[0].exact == 1


def test_many_copies_count_once_each():
    report = leakage(task_of(["the same few words", "other"] * 50, ["the same few words", "new"] * 30))
    assert (report.overlaps[0].exact, report.overlaps[0].near) == (30, 0)


def test_pictures_and_tables_are_compared_by_content(tmp_path):
    shades = {"train": [0, 50, 100, 150], "test": [50, 51, 100]}
    splits = {}
    for split, found in shades.items():
        for i, shade in enumerate(found):
            Image.new("L", (6, 6), shade).save(tmp_path / f"{split}{i}.png")
        files = [str(tmp_path / f"{split}{i}.png") for i in range(len(found))]
        rows = datasets.Dataset.from_dict({"image": files, "y": [i % 2 for i in range(len(found))]})
        splits[split] = rows.cast_column("image", datasets.Image())
    overlap = leakage(Task("p", "image-classification", splits, ("image",), "y")).overlaps[0]
    assert (overlap.exact, overlap.examples) == (2, ((0, 1), (2, 2)))
    table = lambda a: datasets.Dataset.from_dict({"a": a, "b": [0.5] * len(a), "y": [0.0] * len(a)})  # noqa: E731
    splits = {"train": table([1.0, 2.0]), "validation": table([3.0]), "test": table([2.0, 3.0, 4.0])}
    found = leakage(Task("t", "tabular-regression", splits, ("a", "b"), "y")).overlaps
    assert [(o.earlier, o.later, o.exact) for o in found] == [
        ("train", "validation", 0),
        ("train", "test", 1),
        ("validation", "test", 1),
    ]


def test_groups_join_near_duplicates_only():
    base = [document() for _ in range(50)]
    copies = []
    for words in base[:20]:
        changed = list(words)
        changed[10] = "changed"
        copies.append(changed)
    groups = duplicate_groups([" ".join(t) for t in base + copies])
    assert len(set(groups[:50])) == 50
    assert groups[50:].tolist() == groups[:20].tolist()


def test_a_threshold_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"threshold 1\.5"):
        leakage(task_of(["a", "b"], ["c", "d"]), threshold=1.5)
