"""The sweep: domains from files, cells that are never run twice, files that can be fitted again, a proof, bad input."""

import gzip
import json

import numpy as np
import polars as pl
import pytest

from downriver.core import DownriverError, InputError
from downriver.data import MixtureRegressor
from downriver.study.mixture_sweep import MixtureSweep, read_domains

WORDS = {
    "river": ["the", "river", "runs", "to", "the", "sea", "and", "the", "sea", "takes", "it"],
    "road": ["a", "road", "goes", "up", "the", "hill", "where", "a", "town", "stands"],
    "noise": [f"x{i}" for i in range(40)],
}


SHORT = {"tokens": 200.0, "beta": 20.0}  # a run so short that its mixture matters


def texts(name, n=60):
    rng = np.random.default_rng(len(name))
    return [" ".join(rng.choice(WORDS[name], 30)) for _ in range(n)]


def folder(path):
    path.mkdir()
    with gzip.open(path / "river.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": t}) + "\n" for t in [*texts("river"), *texts("river")]))
    pl.DataFrame({"text": texts("road")}).write_parquet(path / "road.parquet")
    (path / "noise").mkdir()
    for half in range(2):
        lines = [json.dumps({"text": t}) for t in texts("noise")[half::2]]
        (path / "noise" / f"{half}.jsonl").write_text("\n".join(["{broken", *lines]))
    (path / "README.md").write_text("not a domain")
    return path


def sweep(**settings):
    halves = [{name: texts(name)[a:b] for name in WORDS} for a, b in ((0, 50), (50, 60))]
    return MixtureSweep(
        *halves, **({"runs": 40, "regressor": "gp", "targets": ("river", "road"), "settings": SHORT} | settings)
    )


def test_domains_are_read_split_and_told_apart(tmp_path):
    found = read_domains(folder(tmp_path / "data"))
    assert list(found.train) == list(found.validation) == ["noise", "river", "road"]
    for name in WORDS:
        assert sorted(found.train[name] + found.validation[name]) == sorted(set(texts(name)))
        assert len(found.validation[name]) == 6
    assert found.characters["river"] == 2 * sum(map(len, texts("river")))
    assert [problem.record for problem in found.quarantined] == [1, 1]
    few = read_domains(tmp_path / "data", documents=10)
    assert {len(few.train[n]) + len(few.validation[n]) for n in WORDS} == {10}
    assert set(few.validation["road"]) <= set(found.validation["road"])
    rows = [{"text": t, "source": name} for name in WORDS for t in texts(name)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    assert read_domains(tmp_path / "one.jsonl", column="source").train == found.train


def test_no_run_is_done_twice_and_the_files_say_what_was_found(tmp_path, monkeypatch):
    first = sweep().run(tmp_path, progress=False)
    monkeypatch.setattr("downriver.pretrain.proxy.NgramProxy.__call__", None)  # whoever calls it again fails
    again = sweep().run(tmp_path, progress=False)
    assert again.proposal == first.proposal and again.losses.equals(first.losses)
    with pytest.raises(DownriverError, match="40 of 40 small runs failed, the first with"):
        sweep(settings={"kappa": 7.0}).run(tmp_path, progress=False)
    first.write(tmp_path / "out")
    mixtures, outcomes = (pl.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("mixtures", "outcomes"))
    assert mixtures.columns == ["index", *WORDS] and outcomes.columns == ["index", *WORDS, "target"]
    np.testing.assert_allclose(outcomes.select("river", "road").mean_horizontal(), outcomes["target"])
    refitted = MixtureRegressor("gp").fit(mixtures.drop("index"), outcomes["target"])
    assert refitted.predict({n: [w] for n, w in first.proposal.weights.items()})[0] == pytest.approx(
        first.proposal.predicted, rel=1e-6
    )
    said = json.loads((tmp_path / "out" / "proposal.json").read_text())
    assert said["weights"] == first.proposal.weights and said["targets"] == ["river", "road"]


def test_the_proposal_is_good_and_the_proof_says_so(tmp_path):
    swept = sweep().run(tmp_path, progress=False)
    assert swept.report.rho[0] > 0.7
    candidates = swept.candidates()
    assert list(candidates)[:3] == ["proposed", "natural", "uniform"] and len(candidates) == 6
    assert all(w.sum() == pytest.approx(1) for w in candidates.values())
    proof = swept.verify(tmp_path, seeds=3, progress=False)
    assert not proof.failures and [verdict.verdict for verdict in proof.verdicts()] == ["holds"] * 3
    found = dict(proof.rows().filter(metric="target loss", seed=0).select("arm", "value").iter_rows())
    assert found["median sampled"] == pytest.approx(np.sort(swept.target)[20])
    noise = [sweep(targets=(name,)).run(tmp_path, progress=False).proposal.weights["noise"] for name in WORDS]
    assert noise[2] > max(noise[:2]) + 0.2


def test_the_proof_can_fail(tmp_path):
    swept = sweep().run(tmp_path, progress=False)
    worse = dict.fromkeys(WORDS, 0.01) | {"noise": 0.98}
    object.__setattr__(swept.proposal, "weights", worse)
    assert [v.verdict for v in swept.verify(tmp_path, progress=False).verdicts()] == ["fails"] * 3


def transformers():
    tokens = {"river": 1000.0, "road": 1000.0, "noise": 50.0}
    small = {"steps": 2, "width": 16, "context": 16, "batch_size": 4}
    return sweep(
        proxy="transformer", settings=small, runs=10, max_repeat=2.0, token_budget=1000.0, available_tokens=tokens
    )


def test_transformers_and_caps_from_tokens(tmp_path):
    asked = transformers()
    swept = asked.run(tmp_path, executor="serial", progress=False)
    assert asked.mixtures[:, 2].max() <= 0.1 and swept.losses.shape == (10, 3)
    assert swept.proposal.epochs_per_domain["noise"] <= 2 + 1e-9


@pytest.mark.slow
def test_processes_do_what_one_does(tmp_path):
    found = [
        transformers().run(tmp_path / executor, executor, workers=2, progress=False).losses
        for executor in ("serial", "processes")
    ]
    assert found[0].equals(found[1])


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda path: read_domains(path / "none"), "is not there"),
        (lambda path: read_domains(path / "empty"), "holds 0 domains"),
        (lambda path: read_domains(path / "plain.jsonl"), "no column 'domain' names its domain"),
        (lambda path: read_domains(path / "pair"), "domain 'b' has 1 different documents"),
        (lambda path: read_domains(path / "pair", share=1.5), "share 1.5"),
        (lambda path: sweep(proxy="gpt"), "unknown proxy 'gpt'"),
        (lambda path: sweep(targets=("rivr",)), "did you mean 'river'"),
        (lambda path: sweep(runs=5), "runs is 5"),
        (lambda path: sweep(prior={"river": 1, "road": 1}), "nothing of domain 'noise'"),
        (lambda path: sweep(max_repeat=0.5).run(path), "no mixture keeps to them"),
    ],
)
def test_bad_input_is_named(tmp_path, act, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "pair" / "b.jsonl").write_text('{"text": "a"}\n{"text": "a"}')
    (tmp_path / "plain.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match=said):
        act(tmp_path)
