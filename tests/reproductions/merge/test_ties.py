"""The study of the TIES paper: its parts are what the card says, and one seed of it runs."""

import pytest
import torch

from downriver.reproductions.merge import ties as reproduction

ONE, SEVEN = reproduction.studies


def test_the_paper_and_its_claims() -> None:
    assert (reproduction.paper.number, reproduction.paper.slug, reproduction.paper.room) == (53, "ties", "merge")
    assert [c.text for c in ONE.claims] == [
        "TIES is better than task arithmetic on accuracy",
        "TIES is better than average on accuracy",
        "TIES, λ searched is better than task arithmetic, λ searched on accuracy",
        "trimmed to 20 % keeps the accuracy of fine-tuned to within 0.01",
    ]
    assert ONE.seeds == SEVEN.seeds == 8


def test_five_questions_about_a_digit() -> None:
    assert len(reproduction.LABELS) == 5 and len(reproduction.DOMAINS) == 7
    assert [d for d in range(10) if reproduction.LABELS["prime"](d)] == [2, 3, 5, 7]
    views = [view(torch.rand(3, 8, 8)) for view in reproduction.DOMAINS.values()]
    assert all(view.shape == (3, 8, 8) for view in views)


def test_a_split_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    a, b, c = (reproduction.digits(seed) for seed in (0, 0, 1))
    assert torch.equal(a.train, b.train) and not torch.equal(a.train, c.train)
    assert len(a.train) + len(a.test) == 1797 and a.train.min() >= 0 and a.train.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("study", reproduction.studies, ids=lambda s: s.name)
def test_one_seed_runs_whole(study, tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = study.run(tmp_path, executor="serial", seeds=1, progress=False)
    assert not result.failures
    rows = result.rows()
    found = dict(zip(*(rows.filter(metric="accuracy")[c].to_list() for c in ("arm", "value")), strict=True))
    assert all(0.1 <= lam <= 2.5 for lam in rows.filter(metric="λ")["value"])
    assert found.keys() == set(result.arms) and all(0.3 < v <= 1 for v in found.values())
