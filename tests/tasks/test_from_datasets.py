"""Hugging Face data sets become tasks from memory and from disk, with their class names."""

import datasets
import pytest

from downriver.core import InputError
from downriver.tasks import from_datasets, load


@pytest.fixture
def both() -> datasets.DatasetDict:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))

    def make(n: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(n)], "label": [0, 1] * (n // 2)}, features)

    return datasets.DatasetDict(train=make(10), dev=make(4), test=make(6), unsupervised=make(2))


def test_memory_and_disk_give_the_same_task(both, tmp_path):
    both.save_to_disk(tmp_path / "saved")
    task = from_datasets(both, text="text", label="label", name="both")
    assert task.labels == ("no", "yes")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 10, "validation": 4, "test": 6}
    saved = from_datasets(tmp_path / "saved", text="text", label="label")
    assert (saved.name, saved.fingerprint) == ("saved", task.fingerprint)
    assert load(tmp_path / "saved").fingerprint == task.fingerprint


def test_splits_can_be_renamed(both):
    task = from_datasets(both, text="text", label="label", splits={"train": "dev", "test": "unsupervised"})
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 4, "test": 2}
    with pytest.raises(InputError, match="unknown split of datasets 'deev': did you mean 'dev'"):
        from_datasets(both, text="text", label="label", splits={"train": "deev"})
    with pytest.raises(InputError, match="say which is which"):
        from_datasets({"all": both["train"]}, text="text", label="label")


def test_one_dataset_is_split(both):
    task = from_datasets(both["train"], text="text", label="label", test_fraction=0.4)
    assert len(task.rows("test")) == 4


def test_unreadable_sources_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be read as a folder written by save_to_disk"):
        from_datasets(tmp_path / "folder", text="text")
    with pytest.raises(InputError, match="not int"):
        from_datasets(3)  # type: ignore[arg-type]
