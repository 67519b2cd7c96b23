"""Seen and unseen cells: nothing unseen is trained on, and seen cells are drawn as asked."""

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from downriver.core.errors import InputError
from downriver.tasks.cells import CellBalancedSampler, CellGrid

SEEN = {("caption", "en"), ("caption", "de"), ("translate", "de"), ("translate", "es")}


def grid(**changed) -> CellGrid:
    return CellGrid(["caption", "translate"], ["en", "de", "es"], **({"seen": SEEN} | changed))


def rows(n: int = 600) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {
            "task": rng.choice(["caption", "translate"], n, p=[0.2, 0.8]).tolist(),
            "language": rng.choice(["en", "de", "es"], n, p=[0.7, 0.2, 0.1]).tolist(),
            "image": rng.integers(50, size=n).tolist(),
            "row": list(range(n)),
        }
    )


def cells(data: Dataset) -> set[tuple[str, str]]:
    return set(zip(data["task"], data["language"], strict=True))


def test_everything_not_seen_is_held_unless_said():
    assert grid().held == {("caption", "es"), ("translate", "en")}
    assert grid(held={("caption", "es")}).held == {("caption", "es")}


def test_a_cell_cannot_be_both_trained_on_and_unseen():
    with pytest.raises(InputError, match="but it is trained on"):
        grid(held={("caption", "de")})
    with pytest.raises(InputError, match="language of the grid 'fr'"):
        grid(held={("caption", "fr")})
    with pytest.raises(InputError, match="at least one seen cell"):
        grid(seen=set())


def test_split_trains_on_seen_cells_only_and_tests_every_cell():
    data = rows()
    parts = grid().split(data, test=0.2, seed=1)
    assert cells(parts.train) == SEEN
    assert set(parts.seen) == SEEN and set(parts.unseen) == {("caption", "es"), ("translate", "en")}
    tested = [r for part in (*parts.seen.values(), *parts.unseen.values()) for r in part["row"]]
    assert sorted([*tested, *parts.train["row"]]) == list(range(600))  # nothing is lost, nothing is there twice
    for cell, part in parts.seen.items():
        assert cells(part) == {cell}
        whole = sum(c == cell for c in zip(data["task"], data["language"], strict=True))
        assert len(part) == max(1, round(0.2 * whole))


def test_split_by_group_keeps_tested_groups_out_of_training():
    parts = grid().split(rows(), test=0.2, group="image")
    tested = {i for part in (*parts.seen.values(), *parts.unseen.values()) for i in part["image"]}
    assert len(tested) == 10 and not tested & set(parts.train["image"])


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(InputError, match="no row of the 3 is left"):
        grid().split(Dataset.from_dict({"task": ["caption"] * 3, "language": ["es"] * 3}))
    with pytest.raises(InputError, match="unknown column 'language'"):
        grid().split(Dataset.from_dict({"task": ["caption"]}))
    with pytest.raises(InputError, match="unknown column 'picture'"):
        grid().split(rows(), group="picture")
    with pytest.raises(InputError, match=r"test 1\.5"):
        grid().split(rows(), test=1.5)


def drawn(sampler: CellBalancedSampler, data: Dataset) -> dict[tuple[str, str], int]:
    names = list(zip(data["task"], data["language"], strict=True))
    found: dict[tuple[str, str], int] = {}
    for i in sampler:
        found[names[i]] = found.get(names[i], 0) + 1
    return found


def test_cells_are_drawn_alike_and_never_an_unseen_one():
    data, n = rows(), 8000
    found = drawn(CellBalancedSampler(data, grid(), n=n), data)
    assert set(found) == SEEN
    assert max(abs(count - n / 4) for count in found.values()) < 3 * np.sqrt(n * 0.25 * 0.75)


def test_cells_are_drawn_by_weight():
    data, n = rows(), 8000
    weights = {("caption", "en"): 3.0, ("translate", "es"): 1.0}
    found = drawn(CellBalancedSampler(data, grid(), weights, n=n), data)
    assert set(found) == set(weights)
    assert abs(found["caption", "en"] - 0.75 * n) < 3 * np.sqrt(n * 0.75 * 0.25)


def test_a_cell_s_rows_all_come_before_any_comes_again():
    data = Dataset.from_dict({"task": ["caption"] * 6, "language": ["de", "es"] * 3})
    one = CellGrid(["caption"], ["de", "es"], {("caption", "de")})
    sampler = CellBalancedSampler(data, one, n=6, seed=3)
    first = list(sampler)
    assert sorted(first[:3]) == sorted(first[3:]) == [0, 2, 4]
    assert list(CellBalancedSampler(data, one, n=6, seed=3)) == first


def test_it_is_a_sampler_for_a_data_loader():
    data = rows()
    loader = DataLoader(data.select_columns(["row"]), sampler=CellBalancedSampler(data, grid(), n=64), batch_size=16)
    assert len(loader) == 4 and sum(len(batch["row"]) for batch in loader) == 64


def test_bad_samplers_are_refused():
    data = rows()
    with pytest.raises(InputError, match="unknown seen cell"):
        CellBalancedSampler(data, grid(), {("caption", "es"): 1.0})
    with pytest.raises(InputError, match="non-negative numbers, not all 0"):
        CellBalancedSampler(data, grid(), {("caption", "en"): -1.0})
    with pytest.raises(InputError, match=r"seen cell \('translate', 'de'\) has no row"):
        CellBalancedSampler({"task": ["caption"] * 2, "language": ["en", "de"]}, grid())
