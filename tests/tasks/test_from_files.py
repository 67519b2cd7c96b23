"""The user's own files become tasks, and bad ones are refused by file, column, row and value."""

import json

import datasets
import numpy as np
import polars as pl
import pytest
from PIL import Image

from downriver.core import InputError
from downriver.tasks import from_files

ROWS = [{"body": f"message {i}", "topic": ["sea", "hill"][i % 2], "score": i / 10} for i in range(30)]


@pytest.fixture
def files(tmp_path):
    pl.DataFrame(ROWS).write_csv(tmp_path / "a.csv")
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_every_format_gives_the_same_task(files, ending):
    task = from_files(files / f"a.{ending}", text="body", label="topic")
    assert task.name == "a"
    assert task.labels == ("hill", "sea")
    assert task.fingerprint == from_files(files / "a.csv", text="body", label="topic").fingerprint
    found = {text: task.labels[y] for s in task.splits for text, y in zip(task.texts(s), task.targets(s), strict=True)}
    assert found == {row["body"]: row["topic"] for row in ROWS}


def test_a_file_a_split_is_left_as_it_is(files):
    task = from_files(files / "a.csv", test=files / "a.jsonl", text="body", label="score", name="both")
    assert (task.name, task.kind) == ("both", "text-regression")
    assert task.targets("test") == pytest.approx([row["score"] for row in ROWS])
    assert len(task.notes) == 1


def test_numeric_columns_are_the_features_of_a_table(tmp_path):
    rng = np.random.default_rng(0)
    pl.DataFrame(
        {"a": rng.normal(size=20), "b": rng.integers(0, 9, 20), "word": ["x"] * 20, "y": [0, 1] * 10}
    ).write_csv(tmp_path / "t.csv")
    task = from_files(tmp_path / "t.csv", label="y")
    assert (task.kind, task.inputs) == ("tabular-classification", ("a", "b"))


def test_pictures_are_read_from_the_folder_of_the_table(tmp_path):
    for i in range(6):
        Image.new("RGB", (5, 5), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    table = pl.DataFrame({"file": [f"{i}.png" for i in range(6)], "y": ["dark", "light"] * 3})
    table.write_csv(tmp_path / "t.csv")
    task = from_files(train=tmp_path / "t.csv", test=tmp_path / "t.csv", image="file", label="y")
    assert task.kind == "image-classification"
    assert task.rows("test")[3]["file"].getpixel((0, 0)) == (120, 0, 0)
    table.with_columns(file=pl.lit("none.png")).write_csv(tmp_path / "bad.csv")
    with pytest.raises(InputError, match=r"bad.csv, column 'file', row 1: there is no image file .*none.png"):
        from_files(tmp_path / "bad.csv", image="file", label="y")


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("body,topic\na,x\nb,y\n", {"text": "boddy", "label": "topic"}, r"a\.csv 'boddy': did you mean 'body'"),
        ("body,topic\na,x\nb,y\n", {"text": "body", "label": "tpic"}, r"'tpic': did you mean 'topic'"),
        ("body,topic\na,x\n,y\n", {"text": "body", "label": "topic"}, r"column 'body', row 2: an empty cell"),
        ("body,topic\na,x\nb,\n", {"text": "body", "label": "topic"}, r"column 'topic', row 2: None where a class"),
        ("body,topic\na,x\nb,x\n", {"text": "body", "label": "topic"}, "one class only"),
        (
            "body,y\na,1.5\nb,nan\n",
            {"text": "body", "label": "y", "kind": "text-regression"},
            r"row 2: 'nan' where a finite",
        ),
        (
            "body,y\na,1.5\nb,high\n",
            {"text": "body", "label": "y", "kind": "text-regression"},
            r"row 2: 'high' where a",
        ),
        ("a,y\n1,0\ninf,1\n", {"features": ["a"], "label": "y"}, r"column 'a', row 2: 'inf'"),
        ("body,topic\n", {"text": "body", "label": "topic"}, "is empty"),
        ("", {"text": "body", "label": "topic"}, "is empty"),
    ],
)
def test_bad_files_name_file_column_and_row(tmp_path, content, settings, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        from_files(tmp_path / "a.csv", **settings)


def test_no_file_at_all_is_refused():
    with pytest.raises(InputError, match="at least one of train, validation and test"):
        from_files(text="a", label="b")


def test_rows_come_out_as_datasets(files):
    assert isinstance(from_files(files / "a.csv", text="body").rows("train"), datasets.Dataset)
