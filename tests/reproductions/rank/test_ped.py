"""The reproduction of paper 79: its parts are what it says, it runs, and its claims can fail."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from downriver.core import InputError
from downriver.rank import PED
from downriver.reproductions.rank import ped as module
from downriver.study.claims import verdicts


def test_the_paper_and_its_claims():
    assert (module.paper.number, module.paper.slug, module.paper.room) == (79, "ped", "rank")
    assert [c.text for c in module.hubs.claims] == [
        "LogME is above 0.2 on weighted tau",
        "LogME + PED is better than LogME on weighted tau",
        "SFDA + PED is better than SFDA on weighted tau",
    ]
    assert module.hubs.seeds == 5 and len(module.OBJECTIVES) * len(module.LENGTHS) + 1 == 15
    default = PED()
    for _, pre in module.ARMS.values():
        assert pre is None or {name: getattr(pre, name) for name in vars(default)} == vars(default)


def test_new_digits_are_not_among_the_old():
    data, again, other = (module.digits(seed) for seed in (0, 0, 1))
    assert torch.equal(data.train, again.train) and not torch.equal(data.train, other.train)
    assert torch.bincount(data.train_labels).tolist() == [20] * 5
    assert len(data.source) + len(data.train) + len(data.test) == 1797
    seen = {tuple(image.tolist()) for image in data.source}
    assert not any(tuple(image.tolist()) in seen for image in data.test)
    assert set(data.source_labels.tolist()) == set(data.test_labels.tolist()) == set(range(5))


def test_pretraining_and_fine_tuning_teach():
    torch.manual_seed(0)
    data = module.digits(0)
    net = module.OBJECTIVES["supervised"](data, 100)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    untrained, tuned = module.fine_tune(net, data, 1), module.fine_tune(net, data, 60)
    assert tuned > 0.6 > untrained
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_one_seed_runs_at_tiny_scale(tmp_path):
    tiny = dataclasses.replace(module.hubs, scale="tiny")
    result = tiny.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    assert set(rows["arm"]) == set(module.ARMS) and rows["value"].is_finite().all()
    taus = rows.filter(pl.col("metric") == "weighted tau")
    assert taus["value"].is_between(-1, 1).all() and taus["value"].n_unique() > 1
    assert rows["examples"].n_unique() == 1 and rows["examples"][0] > 0
    assert {v.verdict for v in result.verdicts()} == {"undecided"}  # one seed decides nothing


def test_its_claims_can_fail():
    means = {"LogME": 0.1, "LogME + PED": 0.0, "SFDA": 0.3, "SFDA + PED": 0.5}
    same = {"task": "", "metric": "weighted tau", "direction": "higher"}
    rows = pl.DataFrame(
        [{"arm": arm, "seed": i, "value": mean + i / 100, **same} for arm, mean in means.items() for i in range(5)]
    )
    found = verdicts(module.hubs.claims, rows, list(module.ARMS), list(range(5)))
    assert [v.verdict for v in found] == ["fails", "fails", "holds"]


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="'huge' is not one of small, tiny"):
        dataclasses.replace(module.hubs, scale="huge").arms()


def test_the_hub_is_whole():
    made = module.make(module.digits(0), 0.02)
    assert len(made.features) == len(made.general) == len(made.accuracy) == 15
    assert made.features[0].shape == (100, 64) and np.ptp(made.accuracy) > 0
