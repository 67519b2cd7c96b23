"""The k best of a stream: the same as sorting everything, whatever the portions; state that does not grow."""

import numpy as np
import polars as pl
import pytest

from downriver.core.errors import InputError
from downriver.data.select.top import _Held, best_rows, top_rows


@pytest.mark.parametrize("portion", [7, 64, 5000])
@pytest.mark.parametrize("k", [1, 50, 999, 1000])
def test_equal_to_a_sort(k, portion, tmp_path):
    scores = np.random.default_rng(k).normal(size=1000).astype(np.float32)
    order = np.sort(np.argsort(-scores)[:k])
    np.save(tmp_path / "s.npy", scores)
    pl.DataFrame({"id": [str(i) for i in range(1000)], "score": scores}).write_parquet(tmp_path / "s.parquet")
    for source in (scores, tmp_path / "s.npy", tmp_path / "s.parquet"):
        best = best_rows(source, k, portion=portion)
        assert best.rows.tolist() == order.tolist() and best.seen == 1000
        assert best.threshold == scores[order].min() and (best.scores == scores[order]).all()


def test_ties_go_by_id_and_not_by_order(tmp_path):
    frame = pl.DataFrame({"id": [f"d{i}" for i in range(300)], "score": np.repeat([1.0, 2.0, 3.0], 100)})
    chosen = []
    for seed in range(3):
        mixed = frame.sample(fraction=1, shuffle=True, seed=seed)
        mixed.write_parquet(tmp_path / "s.parquet")
        rows = best_rows(tmp_path / "s.parquet", 150, portion=17).rows
        assert rows.tolist() == top_rows(mixed["score"].to_numpy(), 150, mixed["id"].to_list()).tolist()
        chosen.append(set(mixed["id"].gather(rows)))
    assert chosen[0] == chosen[1] == chosen[2]
    constant = best_rows(np.zeros(10_000), 100, portion=100).rows
    assert constant.max() > 5000  # not the first ones


def test_state_is_bounded():
    held, rng = _Held(100), np.random.default_rng(0)
    for start in range(0, 100_000, 50):
        scores = rng.normal(size=50) + start / 1e4  # ever better: the hardest order
        held.add(scores, np.arange(50, dtype=np.uint64), np.arange(start, start + 50))
        assert len(held.scores) + held.waiting <= 2 * 100 + 50


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="row 2 of the scores is NaN"):
        best_rows(np.array([1.0, 2.0, np.nan]), 1)
    with pytest.raises(InputError, match="k is 4 and there are 3 scores"):
        best_rows(np.arange(3.0), 4)
    np.save(tmp_path / "s.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"one dimension of numbers"):
        best_rows(tmp_path / "s.npy", 1)
    (tmp_path / "t.npy").write_bytes(b"no array at all")
    with pytest.raises(InputError, match=r"is no \.npy file"):
        best_rows(tmp_path / "t.npy", 1)
    pl.DataFrame({"x": [1.0]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"unknown column of .* 'score'"):
        best_rows(tmp_path / "t.parquet", 1)
