"""The table of graph networks: decoded as published, and nothing of a foreign pickle is ever run."""

import pickle

import numpy as np
import pytest

from downriver.core import InputError
from downriver.tasks.architectures import OPERATIONS, WIRINGS, nas_bench_graph

ROW = {"valid_perf": 0.8, "perf": 0.75, "latency": 0.01, "para": 0.1}


@pytest.mark.assets
def test_the_packaged_table(asset) -> None:  # type: ignore[no-untyped-def]
    folder = asset("nas-bench-graph")
    cora, photo, proteins = (nas_bench_graph(folder / f"{name}.bench") for name in ("cora", "photo", "proteins"))
    assert len(cora) == len(photo) == 26_206 and (cora.keys == photo.keys).all() and len(proteins) == 2021
    assert ((cora.score > 0.05) & (cora.score < 1)).all() and (cora.params > 0).all() and (cora.latency > 0).all()
    assert {OPERATIONS[i] for i in np.unique(proteins.operations)} == {"gcn", "sage", "arma", "fc", "skip"}
    assert np.corrcoef(cora.score, cora.validation)[0, 1] > 0.9
    row = int(np.flatnonzero(cora.keys == 10_002)[0])
    assert cora.links[row].tolist() == [0, 0, 0, 1] and cora.operations[row].tolist() == [0, 0, 0, 2]


def test_numpy_numbers_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.bench").write_bytes(pickle.dumps({81234: {**ROW, "para": np.float64(0.125)}}, protocol=3))
    table = nas_bench_graph(tmp_path / "t.bench")
    assert table.params.tolist() == [0.125] and table.links.tolist() == [list(WIRINGS[8])]
    assert table.operations.tolist() == [[1, 2, 3, 4]]


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_nothing_a_pickle_names_is_run(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.bench").write_bytes(pickle.dumps({0: ROW, 1: Evil(str(tmp_path / "was-here"))}))
    with pytest.raises(InputError, match=r"must not name .*open"):
        nas_bench_graph(tmp_path / "t.bench")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        pickle.dumps({99_999: ROW}),
        pickle.dumps({-1: ROW}),
        pickle.dumps({0: {"perf": 0.5}}),
        pickle.dumps({0: {**ROW, "perf": float("nan")}}),
        pickle.dumps({0: {**ROW, "para": np.int64(1)}}),
    ],
)
def test_other_files_are_refused(content: bytes, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.bench").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.bench is no table"):
        nas_bench_graph(tmp_path / "t.bench")
    with pytest.raises(InputError, match="does not exist"):
        nas_bench_graph(tmp_path / "none.bench")
