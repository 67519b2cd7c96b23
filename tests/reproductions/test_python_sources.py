"""Passages of the standard library."""

from downriver.reproductions.python_sources import python_sources


def test_splits_share_no_passage_and_seeds_draw_anew():
    task = python_sources("name", 0, texts=200, characters=100, held=50)
    assert len(task.rows("train")) == 200 and len(task.rows("validation")) == 50
    assert {len(text) for text in task.rows("train")["text"]} == {100}
    assert not set(task.rows("train")["text"]) & set(task.rows("validation")["text"])
    assert python_sources("name", 0, texts=200, characters=100, held=50).fingerprint == task.fingerprint
    others = [python_sources(*which, texts=200, characters=100) for which in (("name", 1), ("other", 0))]
    assert task.fingerprint not in {other.fingerprint for other in others}
