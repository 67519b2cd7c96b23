import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from downriver.core.errors import InputError
from downriver.core.tensors import DTYPES, open_checkpoint, weights_file


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    state = {"a.weight": torch.randn(7, 5, generator=generator), "b": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    for dtype in set(DTYPES.values()):
        values = torch.randint(0, 2, (3, 2, 2), generator=generator) if dtype != torch.bool else torch.ones(3, 2, 2)
        state[f"t.{dtype}"] = values.to(dtype)
    return state


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def test_every_type_reads_as_the_library_reads_it(folder):
    mine, theirs = open_checkpoint(folder), load_file(folder / "model.safetensors")
    assert set(mine.names()) == set(mine) == theirs.keys() and len(mine) == len(theirs) and "b" in mine
    for name, tensor in theirs.items():
        read = mine.read(name)
        assert (mine.shape(name), mine.dtype(name), mine.numel(name)) == (tensor.shape, tensor.dtype, tensor.numel())
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and bits(read).equal(bits(tensor))
        assert mine.file(name) == folder / "model.safetensors"


def test_pieces_are_those_of_the_whole(folder, tensors):
    weights, whole = open_checkpoint(folder), tensors["a.weight"]
    for start, stop in ((0, 35), (3, 11), (35, 35), (0, 0)):
        assert weights.read_flat("a.weight", start, stop).equal(whole.flatten()[start:stop])
    for rows in (slice(None), slice(2, 5), slice(-2, None), slice(5, 2), slice(0, 100)):
        assert weights.read_rows("a.weight", rows).equal(whole[rows])
    assert weights.read_rows("empty", slice(0, 0)).shape == (0, 4)
    for bad in ((-1, 2), (4, 3), (0, 36)):
        with pytest.raises(InputError, match=r"a\.weight"):
            weights.read_flat("a.weight", *bad)
    with pytest.raises(InputError, match="'b'"):
        weights.read_rows("b", slice(0, 1))
    with pytest.raises(InputError, match="no tensor 'c'"):
        weights.read("c")


def test_what_is_read_is_a_copy_and_may_be_read_from_threads(folder, tensors):
    weights = open_checkpoint(folder)
    weights.read("a.weight").zero_()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(weights.read, ["a.weight"] * 64))
    assert all(tensor.equal(tensors["a.weight"]) for tensor in read)


def shards(folder, tensors):
    """Two shards and their index."""
    names = list(tensors)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_read_as_one(tmp_path, tensors):
    shards(tmp_path, tensors)
    weights = open_checkpoint(tmp_path)
    assert weights.names()[:2] == ["a.weight", "b"] and set(weights) == set(tensors)
    assert weights.read("a.weight").equal(tensors["a.weight"])
    assert weights.file("empty") == tmp_path / "model-2.safetensors"


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path, tensors):
    index = shards(tmp_path, tensors)
    index["weight_map"]["ghost"] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-2\.safetensors has no tensor 'ghost'"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"names the shard model-1\.safetensors \(tensor 'a\.weight'\)"):
        open_checkpoint(tmp_path)
    for text in ("[]", "{", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="no index of shards"):
            open_checkpoint(tmp_path)


def test_truncated_files_are_refused_at_every_length(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.safetensors is (corrupt|truncated)"):
            open_checkpoint(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated: tensor '"):
        open_checkpoint(folder)


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header("{not json"), "no safetensors header"),
        (header("[1]"), "no safetensors header"),
        (header('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"\0" * 4), "tensor 'w'"),
        (header('{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4), "tensor 'w'.*F99"),
        (header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"\0" * 8), "tensor 'w'"),
        (header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 9), "5 bytes after"),
        ((10**15).to_bytes(8, "little") + b"{}", "header would be"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=says):
        open_checkpoint(tmp_path)


def test_a_file_cut_while_it_is_open_is_named(folder):
    weights = open_checkpoint(folder)
    last = weights.names()[-1]
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"ends inside tensor '{last}'"):
        weights.read(last)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "net.pth", "net.pt"])
@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_are_read_without_running_code(tmp_path, tensors, name, new):
    state = {"state_dict": {"w": tensors["a.weight"].T, "b": tensors["b"]}}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
    weights = open_checkpoint(tmp_path / name)
    assert weights.names() == ["w", "b"] and weights.read("w").equal(tensors["a.weight"].T)
    assert weights.read_flat("w", 3, 9).equal(tensors["a.weight"].T.flatten()[3:9])
    weights.read("w").zero_()
    assert weights.read("w").equal(tensors["a.weight"].T)


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle that needs code"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Trap()}))
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(1000)])
def test_a_broken_state_dict_is_refused(tmp_path, content):
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"net\.pth"):
        open_checkpoint(tmp_path / "net.pth")


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    torch.save({"w": torch.ones(1), "step": 3}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="entry 'step' is a int"):
        open_checkpoint(tmp_path / "net.pth")
    torch.save([torch.ones(1)], tmp_path / "net.pth")
    with pytest.raises(InputError, match="holds a list"):
        open_checkpoint(tmp_path / "net.pth")


def test_which_file_of_a_folder(folder, tmp_path):
    assert weights_file(folder).name == "model.safetensors"
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match="holds no weights"):
        open_checkpoint(other)
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    shutil.copy(folder / "model.safetensors", other / "adapter_model.safetensors")
    shutil.copy(folder / "model.safetensors", other / "downriver_head.safetensors")
    assert weights_file(other).name == "adapter_model.safetensors"
    shutil.copy(folder / "model.safetensors", other / "second.safetensors")
    with pytest.raises(InputError, match=r"several weight files \(adapter_model\.safetensors, second\.safetensors\)"):
        open_checkpoint(other)
    (other / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="is no checkpoint"):
        open_checkpoint(other / "notes.txt")


def test_a_big_tensor_is_read_by_pieces_in_little_memory(tmp_path):
    """Reading here and there in 2 GB (a file of holes) leaves the process where it was."""
    import resource

    big = tmp_path / "big.safetensors"
    entry = {"w": {"dtype": "F32", "shape": [500_000_000], "data_offsets": [0, 2_000_000_000]}}
    text = json.dumps(entry)
    with big.open("wb") as file:
        file.write(header(text))
        file.truncate(8 + len(text) + 2_000_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = open_checkpoint(big)
    assert all(weights.read_flat("w", i, i + 1000).abs().sum() == 0 for i in range(0, 500_000_000 - 1000, 5_000_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
