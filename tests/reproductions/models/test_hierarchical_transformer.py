"""The reproduction of paper 31: it runs at tiny scale, its parts do what they say, and its claims can fail."""

import dataclasses

import polars as pl
import pytest

from downriver.core import generator
from downriver.core.errors import InputError
from downriver.reproductions import find
from downriver.reproductions.models import hierarchical_transformer as module
from downriver.study.claims import verdicts


def test_it_runs_at_tiny_scale(tmp_path):
    [listed] = find("hierarchical_transformer")
    assert (listed.number, listed.room, listed.title) == (31, "models", module.paper.title)
    tiny = dataclasses.replace(module.reproduction, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures, result.failures
    found = {(a, m): v for a, m, v in result.rows().select("arm", "metric", "value").iter_rows()}
    assert {arm for arm, _ in found} == {"HAT", "BPE"}
    assert found["BPE", module.OVER] == 1 and found["HAT", module.CLEAN] > 1
    assert found["HAT", module.STEPS] < 1 and found["BPE", module.STEPS] < 1
    with pytest.raises(InputError, match="'huge' is not one of"):
        dataclasses.replace(module.reproduction, scale="huge").arms()


def test_the_twins_count_the_same_bytes():
    size = module.SCALES["tiny"]
    texts = ["the river runs to the sea, past the mill"] * 2
    for twin in (module.hat(size, 0), module.bpe(size, 0, texts * 50)):
        head, rest = module.halves(texts[0])
        assert head + rest == texts[0] and rest.startswith(" ")
        bits, first, second = (
            twin.bits(*pair) * size
            for pair, size in (
                (([texts[0]],), len(texts[0])),
                (([head],), len(head)),
                (([rest], [head]), len(rest)),
            )
        )
        closing = 1 + len(twin.closing)  # the end of a text is counted once more when its first half is read alone
        assert bits == pytest.approx(first + second, abs=closing * 10)
        assert second < bits and first < bits + closing * 10


def test_perturbed_letters():
    text = "the river runs to the sea " * 40
    assert module.perturb(text, 0.0, generator("a")) == text
    changed = module.perturb(text, 0.1, generator("a"))
    assert changed != text and changed == module.perturb(text, 0.1, generator("a"))
    assert abs(len(changed) - len(text)) < 0.1 * len(text)
    assert module.perturb("123 !?", 1.0, generator("a")) == "123 !?"


def test_files_that_are_no_python_have_no_docstrings(tmp_path):
    (tmp_path / "old.py").write_text("print 'here'")
    (tmp_path / "new.py").write_text('"About."\n\ndef f():\n    "It runs."\n')
    assert module._documentation(tmp_path / "old.py") == ""
    assert module._documentation(tmp_path / "new.py") == "About.\n\nIt runs."


def test_training_and_held_out_passages_are_of_different_files():
    for sources, name in ((module.docstrings(), "docstrings"), (module.headers(), "headers")):
        train, held = module.passages(sources, name, 0, 12, 4)
        assert train and 0 < len(held) <= 4 and not set(train) & set(held)


def test_the_claims_fail_for_a_worse_model():
    rows = [
        {"arm": arm, "seed": seed, "task": "", "metric": metric, "value": value + 0.001 * seed, "direction": "lower"}
        for arm, value in (("HAT", 2.0), ("BPE", 1.0))
        for metric in (module.OVER, module.LOST, module.STEPS, module.SECONDS, module.NEW, module.FORGOTTEN)
        for seed in range(5)
    ]
    found = verdicts(module.reproduction.claims, pl.DataFrame(rows), ["HAT", "BPE"], range(5))
    assert [verdict.verdict for verdict in found] == ["fails"] * 6
