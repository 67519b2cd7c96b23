"""The built-in tasks hold what they say: real data, real splits, nothing of the answer in the input."""

import gzip

import numpy as np
import pytest

from downriver import tasks
from downriver.core import InputError
from downriver.tasks.builtin import passages


@pytest.mark.parametrize(
    ("name", "kind", "rows", "columns"),
    [
        ("breast_cancer", "tabular-classification", 569, 30),
        ("digits", "tabular-classification", 1797, 64),
        ("wine", "tabular-classification", 178, 13),
        ("diabetes", "tabular-regression", 442, 10),
    ],
)
def test_bundled_tables(name, kind, rows, columns):
    task = tasks.load(name)
    assert (task.kind, len(task.inputs)) == (kind, columns)
    assert sum(len(split) for split in task.splits.values()) == rows
    assert len(task.rows("test")) == pytest.approx(rows / 5, abs=3)


@pytest.mark.assets
def test_newsgroups_is_the_split_by_date(asset):
    asset("20newsgroups")
    task = tasks.load("20newsgroups")
    assert (len(task.rows("train")), len(task.rows("test")), len(task.labels)) == (11293, 7528, 20)
    assert task.labels[0] == "alt.atheism"
    assert np.bincount(task.targets("test")).min() > 200
    report = tasks.leakage(task.sample("train", 3000, seed=0).sample("test", 3000, seed=0))
    assert report.overlaps[0].rate < 0.01


@pytest.mark.assets
def test_fashion_mnist_decodes_to_the_packaged_pixels(asset):
    packaged = gzip.decompress((asset("fashion-mnist") / "t10k-images-idx3-ubyte.gz").read_bytes())
    task = tasks.load("fashion-mnist")
    assert np.bincount(task.targets("train")).tolist() == [6000] * 10
    assert np.bincount(task.targets("test")).tolist() == [1000] * 10
    for i in (0, 1, 4321, 9999):
        image = np.asarray(task.rows("test")[i]["image"])
        assert (image.shape, image.dtype) == ((28, 28), np.uint8)
        assert image.tobytes() == packaged[16 + 784 * i : 16 + 784 * (i + 1)]
    assert task.labels[task.targets("test")[0]] == "ankle boot"


@pytest.mark.assets
@pytest.mark.slow
def test_spam_is_split_by_campaign(asset):
    asset("spam-assassin")
    task = tasks.load("spam-assassin")
    assert len(task.rows("train")) + len(task.rows("test")) == 6046
    assert len(task.rows("test")) == pytest.approx(6046 / 5, abs=5)
    assert np.mean(task.targets("train")) == pytest.approx(np.mean(task.targets("test")), abs=0.01)
    assert tasks.leakage(task).clean


@pytest.mark.assets
@pytest.mark.slow
def test_wordnet_tasks(asset):
    asset("wordnet")
    classes = tasks.load("wordnet")
    assert (sum(map(len, classes.splits.values())), len(classes.labels)) == (117659, 45)
    assert not set(classes.texts("train")) & set(classes.texts("test"))
    pairs = tasks.load({"name": "wordnet-similarity", "pairs": 500})
    assert pairs.inputs == ("text_a", "text_b")
    assert 0 < pairs.targets("train").min() < pairs.targets("train").max() <= 0.5
    definitions = tasks.load({"name": "wordnet-definitions", "pairs": 500})
    assert set(definitions.targets("train")) == {0.0, 1.0}


@pytest.mark.assets
def test_corpora_keep_domains_and_files_apart(asset):
    asset("python-doc")
    task = tasks.load({"name": "corpora", "domains": ["code", "manual"], "documents": 40, "characters": 500})
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 80, "validation": 20, "test": 20}
    assert task.group == "domain"
    assert list(task.rows("test")["domain"]) == ["code"] * 10 + ["manual"] * 10
    assert max(len(text) for text in task.texts("train")) <= 500
    assert tasks.leakage(task).clean
    with pytest.raises(InputError, match=r"unknown domain of corpora 'codes': did you mean 'code'"):
        tasks.load({"name": "corpora", "domains": ["codes"]})
    with pytest.raises(InputError, match=r"corpora: manual has \d+ test documents, not 250000"):
        tasks.load({"name": "corpora", "domains": ["manual"], "documents": 1000000})


def test_passages_lose_nothing_but_the_last_crumb():
    text = "\n".join(f"line {i} of the text" for i in range(100))
    parts = list(passages(text, 100))
    assert max(map(len, parts)) <= 100
    assert text.startswith("\n".join(parts))
    assert len(text) - len("\n".join(parts)) < 30
