"""A task checks its splits once; samples, halves and subsets keep what they promise."""

import itertools
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from downriver.core import InputError
from downriver.tasks import Task


def rows(n: int = 60, classes: int = 3) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": [f"text {i}" for i in range(n)], "label": [i % classes for i in range(n)]}
    )


def make(**changes) -> Task:
    settings = {"name": "t", "kind": "text-classification", "splits": {"train": rows(), "test": rows(12)}}
    return Task(**(settings | {"inputs": ("text",), "target": "label"} | changes))


def table(**columns) -> dict[str, datasets.Dataset]:
    return {"train": datasets.Dataset.from_dict(columns)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {}}, "has no split"),
        ({"splits": {"train": rows(), "dev": rows()}}, "unknown split of task 't' 'dev'"),
        ({"splits": {"train": rows(), "test": rows(0)}}, "split 'test' is empty"),
        ({"splits": {"train": rows(9, 1)}}, r"split 'train', column 'label': one class only \('0'\)"),
        ({"labels": ("a", "b")}, r"split 'train', column 'label', row 3: 2 where a class id from 0 to 1"),
        ({"splits": table(text=["a", "b"], label=[0, -1])}, r"row 2: -1 where a class id"),
        ({"splits": table(text=["a", "b"], label=[0, None])}, r"column 'label': 1 empty cell\(s\), the first in row 2"),
        ({"splits": table(text=["a", None], label=[0, 1])}, r"column 'text': 1 empty cell"),
        ({"splits": table(text=[1, 2], label=[0, 1])}, r"column 'text': text is expected, not int64"),
        ({"splits": table(text=["a", "b"], label=["x", "y"])}, r"class ids 0, 1, 2, ... are expected"),
        ({"inputs": ("txt",)}, "unknown column of task 't', split 'train' 'txt': did you mean 'text'"),
        ({"target": None}, "text-classification with target column None"),
        ({"kind": "text-clasification"}, "did you mean 'text-classification'"),
        ({"kind": "text-similarity"}, r"takes 2 input column\(s\)"),
        ({"kind": "image-classification"}, "column 'text': images are expected"),
        ({"splits": {"train": [{"text": "a"}]}}, "a datasets.Dataset is expected, not list"),
    ],
)
def test_bad_splits_name_the_split_and_the_column(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0], [3.0]], "column 'x': vectors of one length are expected, not of 1 to 2"),
        ([[1.0, 2.0], [3.0, float("inf")]], "column 'x', its vectors' 2 numbers .*row 4: inf where a finite number"),
        ([["a"], ["b"]], "column 'x'.*numbers are expected, not string"),
        ([{"a": 1.0}, {"a": 2.0}], "column 'x': numbers or vectors are expected, not struct"),
    ],
)
def test_a_column_of_vectors_is_checked(vectors, message):
    with pytest.raises(InputError, match=message):
        Task("t", "tabular-classification", table(x=vectors, y=[0, 1]), ("x",), "y")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(bad):
    with pytest.raises(InputError, match=r"split 'train', column 'x', row 2: (nan|inf) where a finite number"):
        Task("t", "tabular-regression", table(x=[1.0, bad], y=[1.0, 2.0]), ("x",), "y")
    with pytest.raises(InputError, match=r"column 'y', row 1"):
        Task("t", "tabular-regression", table(x=[1.0, 2.0], y=[bad, 2.0]), ("x",), "y")
    with pytest.raises(InputError, match="numbers are expected, not string"):
        Task("t", "tabular-regression", table(x=["1", "2"], y=[1.0, 2.0]), ("x",), "y")


def test_defaults_follow_the_kind():
    assert make().labels == ("0", "1", "2")
    assert make().metrics == ("accuracy", "macro_f1", "loss", "ece")
    assert Task("lm", "language-modelling", {"test": rows()}, ("text",), None).metrics == ("loss", "bits_per_byte")


def test_the_fingerprint_is_of_the_content_alone():
    task = make()
    assert task.fingerprint == make(name="other").fingerprint
    assert task.fingerprint == pickle.loads(pickle.dumps(task)).fingerprint
    shuffled = task.subset("train", range(60))  # the same rows behind an index
    assert shuffled.fingerprint == task.fingerprint
    assert task.subset("train", range(59)).fingerprint != task.fingerprint
    changed = rows().to_dict()
    changed["text"][5] += "!"
    other = make(splits={"train": datasets.Dataset.from_dict(changed), "test": rows(12)})
    assert other.fingerprint != task.fingerprint
    assert make(labels=("a", "b", "c")).fingerprint != task.fingerprint


def test_a_picture_counts_by_its_bytes_and_not_by_where_it_lies(tmp_path):
    prints = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files = [str(tmp_path / folder / f"{i}.png") for i in range(2)]
        for i, file in enumerate(files):
            Image.new("L", (4, 4), 100 * i).save(file)
        pictures = datasets.Dataset.from_dict({"image": files, "y": [0, 1]}).cast_column("image", datasets.Image())
        prints.append(Task("p", "image-classification", {"train": pictures}, ("image",), "y").fingerprint)
    assert prints[0] == prints[1]


def test_samples_are_stratified_nested_and_repeatable():
    skewed = datasets.Dataset.from_dict(
        {"text": ["x"] * 200, "label": [0] * 160 + [1] * 36 + [2] * 4, "i": list(range(200))}
    )
    task = make(splits={"train": skewed, "test": rows(12)})
    sizes = [3, 10, 50, 120, 200]
    samples = [task.sample("train", n, seed=1) for n in sizes]
    for n, sample in zip(sizes, samples, strict=True):
        counts = np.bincount(sample.targets("train"), minlength=3)
        assert counts.sum() == n
        assert counts.min() >= 1
        assert np.abs(counts - n * np.array([0.8, 0.18, 0.02])).max() <= 2
    chosen = [set(sample.rows("train")["i"]) for sample in samples]
    assert all(a <= b for a, b in itertools.pairwise(chosen))
    assert chosen[2] == set(task.sample("train", 50, seed=1).rows("train")["i"])
    assert chosen[2] != set(task.sample("train", 50, seed=2).rows("train")["i"])
    assert len(samples[0].rows("test")) == 12
    for n in (0, 201):
        with pytest.raises(InputError, match=f"a sample of {n} rows from train, which has 200"):
            task.sample("train", n, seed=0)


def test_halves_are_disjoint_complete_and_balanced():
    task = make(splits={"train": rows(61)})
    first, second = task.halves("train", seed=3)
    a, b = set(first.texts("train")), set(second.texts("train"))
    assert not a & b
    assert len(a | b) == 61
    difference = np.bincount(first.targets("train")) - np.bincount(second.targets("train"))
    assert np.abs(difference).max() <= 1
    assert np.abs(difference.sum()) <= 1
    assert a != set(task.halves("train", seed=4)[0].texts("train"))


def test_only_keeps_and_renumbers_classes():
    task = make(labels=("a", "b", "c")).only(["c", "a"])
    assert task.labels == ("c", "a")
    assert task.rows("test")["text"][:4] == ["text 0", "text 2", "text 3", "text 5"]
    assert task.targets("test").tolist()[:4] == [1, 0, 1, 0]
    assert make(labels=("a", "b", "c")).only([2, 0]).fingerprint == task.fingerprint
    with pytest.raises(InputError, match="unknown label of task 't' 'd'"):
        make(labels=("a", "b", "c")).only(["a", "d"])
    with pytest.raises(InputError, match="named twice"):
        make(labels=("a", "b", "c")).only(["a", 0])


def test_unknown_splits_and_rows_outside_are_refused():
    with pytest.raises(InputError, match=r"unknown split of task 't' 'tst': did you mean 'test'\?"):
        make().rows("tst")
    with pytest.raises(InputError, match="outside the 60 rows of train"):
        make().subset("train", [60])
