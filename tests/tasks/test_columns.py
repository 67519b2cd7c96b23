"""Raw columns become a task: kinds inferred and said, classes numbered, a test part held out without overlap."""

import datasets
import numpy as np
import pytest

from downriver.core import InputError
from downriver.tasks import from_columns
from downriver.tasks.columns import grouped_split


def of(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


N = 40
TEXTS = [f"text number {i}" for i in range(N)]


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (["a", "b"] * 20, "classification"),
        ([True, False] * 20, "classification"),
        ([1, 5] * 20, "classification"),
        (list(range(N)), "regression"),
        ([i / 7 for i in range(N)], "regression"),
    ],
)
def test_the_kind_is_inferred_from_the_label_and_said(label, kind):
    task = from_columns({"train": of(text=TEXTS, y=label)}, name="t", text="text", label="y")
    assert task.kind == f"text-{kind}"
    assert task.notes[0].startswith(f"kind text-{kind} was inferred: column 'y' holds")
    numbers = from_columns({"train": of(a=list(range(N)), y=label)}, name="t", label="y")
    assert (numbers.kind, numbers.inputs) == (f"tabular-{kind}", ("a",))


def test_other_kinds_are_inferred_from_the_inputs():
    pairs = from_columns(
        {"train": of(a=TEXTS, b=TEXTS, y=[i / N for i in range(N)])}, name="t", text=["a", "b"], label="y"
    )
    assert (pairs.kind, pairs.inputs) == ("text-similarity", ("a", "b"))
    plain = from_columns({"train": of(text=TEXTS)}, name="t", text="text")
    assert (plain.kind, plain.target) == ("language-modelling", None)
    with pytest.raises(InputError, match="no label column is named"):
        from_columns({"train": of(a=[1.0, 2.0])}, name="t")
    with pytest.raises(InputError, match="no column but the label is numeric"):
        from_columns({"train": of(a=["x", "y"], y=[1, 2])}, name="t", label="y")
    with pytest.raises(InputError, match="one of text, image and features"):
        from_columns({"train": of(a=TEXTS)}, name="t", text="a", features=["a"])


def test_classes_are_numbered_in_order_over_all_splits():
    splits = {"train": of(text=TEXTS[:4], y=[10, 9, 100, 9]), "test": of(text=TEXTS[4:6], y=[100, 10])}
    task = from_columns(splits, name="t", text="text", label="y", kind="text-classification")
    assert task.labels == ("9", "10", "100")
    assert task.targets("train").tolist() == [1, 0, 2, 0]
    assert task.targets("test").tolist() == [2, 1]
    splits["test"] = of(text=TEXTS[4:6], y=[100, 11])
    with pytest.raises(InputError, match=r"split 'test', column 'y', row 2: class 11 is met in no row of train"):
        from_columns(splits, name="t", text="text", label="y", kind="text-classification")


def test_bad_labels_are_named():
    with pytest.raises(InputError, match=r"split 'train', column 'y', row 2: None where a class"):
        from_columns({"train": of(text=TEXTS[:3], y=["a", None, "b"])}, name="t", text="text", label="y")
    with pytest.raises(InputError, match=r"row 1: 0.5 where a class"):
        from_columns(
            {"train": of(text=TEXTS[:2], y=[0.5, 1.0])}, name="t", text="text", label="y", kind="text-classification"
        )
    with pytest.raises(InputError, match="one class only"):
        from_columns({"train": of(text=TEXTS, y=["a"] * N)}, name="t", text="text", label="y")
    with pytest.raises(InputError, match="split 'train' is empty"):
        from_columns({"train": of(text=[], y=[])}, name="t", text="text", label="y")
    with pytest.raises(InputError, match="unknown task kind"):
        from_columns({"train": of(text=TEXTS)}, name="t", text="text", kind="words")  # type: ignore[arg-type]


def test_the_held_out_part_is_stratified_seeded_and_apart_from_train():
    texts = [f"text {i // 2}" for i in range(200)]  # every text stands there twice
    label = ["rare" if i // 2 % 10 == 0 else "common" for i in range(200)]
    splits = {"train": of(text=texts, y=label)}
    task = from_columns(splits, name="t", text="text", label="y")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 160, "test": 40}
    assert np.bincount(task.targets("test")).tolist() == [36, 4]
    assert not set(task.texts("train")) & set(task.texts("test"))
    assert task.fingerprint == from_columns(splits, name="t", text="text", label="y").fingerprint
    assert task.fingerprint != from_columns(splits, name="t", text="text", label="y", seed=1).fingerprint
    assert set(from_columns(splits, name="t", text="text", label="y", test_fraction=0.0).splits) == {"train"}
    with pytest.raises(InputError, match=r"test_fraction 1.5"):
        from_columns(splits, name="t", text="text", label="y", test_fraction=1.5)


def test_a_stratum_of_one_group_stays_in_train():
    strata, groups = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3])
    for seed in range(20):
        held = grouped_split(strata, groups, 0.5, np.random.default_rng(seed))
        assert not held[3]
        assert 1 <= held[:3].sum() <= 2
