import json
from importlib import import_module

import pytest

from downriver.core import InputError
from downriver.reproductions import paper as papers
from downriver.study import Study


def test_the_catalogue_is_whole():
    found = papers.catalogue()
    assert [p.number for p in found] == list(range(1, 93))
    assert len({p.slug for p in found}) == 92
    assert all(len(p.date) == 7 and p.title and p.room for p in found)


def test_search_wants_all_words():
    assert [p.slug for p in papers.find("53")] == ["ties"]
    assert "ties" in [p.slug for p in papers.find("merg model")]
    assert papers.find("merging zeppelin") == []


@pytest.mark.parametrize("slug", [p.slug for p in papers.catalogue() if p.module])
def test_every_reproduction_names_its_paper_and_declares_studies_with_claims(slug):
    module = papers.reproduction(slug)
    listed = next(p for p in papers.catalogue() if p.slug == slug)
    assert (module.paper.number, module.paper.slug, module.paper.room) == (listed.number, slug, listed.room)
    assert module.paper.claim.endswith(".")
    assert all(isinstance(study, Study) for study in module.studies)
    claiming = [study for study in module.studies if study.claims]
    assert claiming, "no study tests a claim"
    assert all(study.seeds >= 3 for study in claiming)


def test_an_unbuilt_reproduction_is_an_error_that_names_the_built_ones():
    with pytest.raises(InputError, match="unknown reproduction 'tie': did you mean 'ties'"):
        papers.reproduction("tie")


def test_the_evidence_table_holds_known_verdicts_of_known_papers():
    for slug, found in papers.evidence().items():
        assert slug in {p.slug for p in papers.catalogue()}
        assert found["verdict"] == papers.overall([c["verdict"] for c in found["claims"]])
        for claim in found["claims"]:
            assert claim["verdict"] in ("holds", "fails", "undecided")
            assert claim["low"] <= claim["mean"] <= claim["high"]


def test_recording_replaces_one_entry_and_leaves_the_others(tmp_path, monkeypatch):
    from downriver.study import Arm, better, study

    @study("coin", claims=[better("heads", than="tails", on="accuracy")], seeds=3)
    def coin(seed, budget, scale):
        yield Arm("heads", lambda: {"accuracy": 0.9 + seed / 100})
        yield Arm("tails", lambda: {"accuracy": 0.1})

    module = import_module("downriver.reproductions.reproduce")
    table = tmp_path / "evidence.json"
    table.write_text(json.dumps({"other": {"verdict": "fails", "claims": []}}))
    monkeypatch.setattr(papers, "EVIDENCE", table)
    monkeypatch.setattr(module, "EVIDENCE", table)
    fake = type("Reproduction", (), {"studies": (coin,)})
    monkeypatch.setattr(module, "reproduction", lambda slug: fake)
    module.reproduce("coin", folder=tmp_path / "runs", executor="serial", record=True, progress=False)
    found = json.loads(table.read_text())
    assert found["other"]["verdict"] == "fails"
    assert found["coin"]["verdict"] == "holds"
    assert found["coin"]["claims"][0]["n"] == 3

    before = table.read_text()
    module.reproduce("coin", folder=tmp_path / "runs", executor="serial", seeds=2, record=True, progress=False)
    assert table.read_text() == before, "a run with fewer seeds must not be recorded"
