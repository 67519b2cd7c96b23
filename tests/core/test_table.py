"""Tables of every format are read alike, and refused with the column, the row and the value."""

import json
from pathlib import Path

import polars as pl
import pytest

from downriver.core import InputError
from downriver.core.table import read_table

ROWS = [{"params": 1e6, "loss": 3.5, "group": "a"}, {"params": 2e6, "loss": 3.25, "group": "b"}]


def write(folder: Path, ending: str) -> Path:
    file, frame = folder / f"runs{ending}", pl.DataFrame(ROWS)
    match ending:
        case ".csv":
            frame.write_csv(file)
        case ".tsv":
            frame.write_csv(file, separator="\t")
        case ".parquet":
            frame.write_parquet(file)
        case ".json":
            file.write_text(json.dumps(ROWS))
        case _:
            frame.write_ndjson(file)
    return file


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"])
def test_every_format_gives_the_same_table(tmp_path, ending):
    table = read_table(write(tmp_path, ending), ["group"], numeric=["params", "loss"], text=["group"])
    assert table.select("params", "loss", "group").to_dicts() == ROWS


def test_text_keeps_its_spelling_and_whole_numbers_become_floats(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("code,n\n007,1\n1e3,2\n")
    table = read_table(file, numeric=["n"], text=["code"])
    assert table["code"].to_list() == ["007", "1e3"]
    assert table["n"].dtype == pl.Float64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "params,loss\n1,2\n2,abc\n", r"a\.csv, column 'loss', row 2: 'abc' where a finite number"),
        ("a.csv", "params,loss\n1,2\n2,NaN\n", r"column 'loss', row 2: 'nan'"),
        ("a.csv", "params,loss\n1,-inf\n2,3\n", r"column 'loss', row 1: '-inf'"),
        ("a.csv", "params,loss\n1,2\n2,\n", r"column 'loss', row 2: an empty cell"),
        (
            "a.csv",
            "params,Loss\n1,2\n",
            r"unknown column of .*a\.csv 'loss': did you mean 'Loss'\? \(known: Loss, params\)",
        ),
        ("a.csv", "", r"a\.csv is empty$"),
        ("a.csv", "params,loss\n", r"a header alone"),
        ("a.csv", "\n\n", r"cannot be read as csv"),
        ("a.jsonl", '{"loss": 1}\n{"loss": "x"}\n', r"column 'loss', row 2: 'x'"),
        ("a.jsonl", '{"loss": 1}\n{"loss": NaN}\n', r"column 'loss', row 2: 'nan'"),
        ("a.jsonl", '{"loss": 1}\n{"loss":\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"loss": 1}\n[NaN]\n', r"line 2: an object with named columns"),
        ("a.jsonl", '{"loss": true}\n', r"numbers are expected, not Boolean"),
        ("a.parquet", "no parquet at all", r"cannot be read as parquet"),
        ("a.xlsx", "x", r"a table ending in \.csv"),
    ],
)
def test_bad_tables_name_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / name, numeric=["loss"])


def test_missing_file_binary_file_and_empty_text(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"a,b\n1,\xff\xfe\n")
    with pytest.raises(InputError, match="cannot be read as csv"):
        read_table(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text,n\nhello,1\n,2\n")
    with pytest.raises(InputError, match=r"column 'text', row 2: an empty cell where text"):
        read_table(tmp_path / "c.csv", text=["text"])
