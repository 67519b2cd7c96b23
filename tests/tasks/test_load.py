"""Tasks by name, path and specification."""

import pytest

from downriver import tasks
from downriver.core import InputError


@pytest.fixture
def table(tmp_path):
    (tmp_path / "mail.csv").write_text("text,label,body\n" + "".join(f"t {i},{'ab'[i % 2]},b {i}\n" for i in range(20)))
    return tmp_path / "mail.csv"


def test_a_path_is_read_with_the_usual_columns(table):
    assert tasks.load(table).fingerprint == tasks.from_files(table, text="text", label="label").fingerprint
    assert tasks.load(str(table)).name == "mail"


def test_a_specification_says_the_same_as_the_call(table):
    spec = {
        "train": str(table),
        "text": "body",
        "label": "label",
        "test_fraction": 0.5,
        "seed": 3,
        "sample": {"train": 4},
    }
    task = tasks.load(spec)
    assert len(task.rows("train")) == 4
    called = tasks.from_files(table, text="body", label="label", test_fraction=0.5, seed=3).sample("train", 4, seed=3)
    assert task.fingerprint == called.fingerprint
    assert spec["sample"] == {"train": 4}  # what was given is left alone


def test_built_in_tasks_take_parameters():
    assert tasks.load({"name": "wine", "seed": 1}).fingerprint != tasks.load("wine").fingerprint
    assert tasks.load({"name": "digits", "only": ["1", "7"]}).labels == ("1", "7")
    wine = tasks.load("wine")
    assert tasks.load(wine) is wine


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wien", r"unknown task 'wien': did you mean 'wine'"),
        ({"name": "wien"}, r"did you mean 'wine'"),
        ({"name": "wine", "sede": 1}, r"unknown parameter of task wine 'sede'"),
        ({"train": "a.csv", "txt": "a"}, r"unknown parameter of task from files 'txt': did you mean 'text'"),
        ({"train": "a.csv", "test_fraction": "half"}, r"'test_fraction' .* is 'half'"),
        ({"train": "none.csv", "text": "a"}, "none.csv is not there"),
        ({"train": "a.csv", "dataset": "b"}, "not both"),
        ({"text": "a"}, "one of 'name', 'train', 'test' and 'dataset'"),
        ("folder/none.csv", "no such file or folder"),
    ],
)
def test_bad_specifications_are_named(spec, message):
    with pytest.raises(InputError, match=message):
        tasks.load(spec)


def test_names_are_those_that_load():
    assert {"20newsgroups", "fashion-mnist", "spam-assassin", "wordnet", "corpora", "diabetes"} <= set(tasks.names())
