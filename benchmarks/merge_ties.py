"""TIES of three checkpoints against mergekit and a plain copy, and the exact k-th magnitude against sorting.

    python benchmarks/merge_ties.py [--megabytes 1000] [--values 16] [--max-memory 512] [--mergekit PYTHON]

``--mergekit`` is the Python of an environment that has mergekit; without it the peer is left out, and said to be. Every
merge runs in a process of its own, whose largest resident set is printed beside that of a process that only does
its imports. Both merge by mergekit's arithmetic with density 0.2, and the results are compared; the paper's arithmetic
and a plain average stand beside. Times are wall seconds; processor seconds, which other work on the machine disturbs
less, stand in brackets.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import yaml

from downriver.core.tensors import open_checkpoint
from downriver.merge import kth_magnitude

OURS = """
import json, sys, time
from downriver.merge import Average, Ties, merge
method = {"average": Average(), "ties": Ties(), "ties, mergekit's": Ties(compat="mergekit")}[sys.argv[3]]
def peak():  # of this program alone: ru_maxrss would start from that of the process which started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
import importlib.util, torch, transformers
if importlib.util.find_spec("numba"):
    import numba
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
models = [f"{sys.argv[1]}/{m}" for m in "abc"]
merge(models, f"{sys.argv[1]}/base", method, sys.argv[2], max_bytes=int(sys.argv[4]) * 2**20)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, (peak() - before) / 1024]))
"""
THEIRS = """
import json, sys, time, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
def peak():  # of this program alone: ru_maxrss would start from that of the process which started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
with open(f"{sys.argv[1]}/run.yaml") as file:
    config = MergeConfiguration.model_validate(yaml.safe_load(file))
run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, (peak() - before) / 1024]))
"""


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def selection(millions: int) -> None:
    x = torch.randn(millions << 20, generator=torch.Generator().manual_seed(0))
    k = x.numel() - x.numel() // 5
    chunks = x.split(1 << 18)
    kth_magnitude(chunks[:1], 1)  # compiles
    peers: dict[str, Callable[[], float]] = {
        "radix select": lambda: kth_magnitude(chunks, k),
        "kthvalue": lambda: x.abs().kthvalue(k).values.item(),
        "topk": lambda: x.abs().topk(x.numel() - k + 1).values[-1].item(),
        "argsort": lambda: x.abs()[x.abs().argsort(descending=True)[x.numel() - k]].item(),
    }
    print(f"k-th magnitude of {millions} Mi values")
    first, found = 0.0, set()
    for name, peer in peers.items():
        wall, cpu = timed(lambda peer=peer: found.add(peer()))  # type: ignore[misc]
        first = first or cpu
        print(f"  {name:14} {wall:7.2f} s ({cpu:.2f} s), {cpu / first:.1f} times the radix select's processor time")
    print(f"  all give the same value: {len(found) == 1}")


def checkpoints(folder: Path, megabytes: int) -> None:
    """A Llama and three perturbed copies of it."""
    layer = 4 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) / 1e6
    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=12_000,
        num_hidden_layers=max(1, round((megabytes - 4 * 12_000 * 768 / 1e6) / layer)),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("base", *"abc"):
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(start[key] + (0 if name == "base" else 1e-3) * torch.randn_like(p))
        model.save_pretrained(folder / name)
    models = [{"model": str(folder / m), "parameters": {"weight": 1.0, "density": 0.2}} for m in "abc"]
    run = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def merged(python: str, script: str, *arguments: str) -> list[float] | None:
    os.sync()  # what was written before is not to be paid for here
    done = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        print(f"  left out: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def differences(a: Path, b: Path) -> tuple[int, int, float]:
    """How many values differ between two checkpoints, of how many, and by how much at most."""
    one, other = open_checkpoint(a), open_checkpoint(b)
    off = [(one.read(n) - other.read(n)).abs() for n in one.names() if n in other]
    return sum(int((x > 0).sum()) for x in off), sum(x.numel() for x in off), max(float(x.max()) for x in off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of each checkpoint")
    parser.add_argument("--values", type=int, default=16, help="millions of values to select from")
    parser.add_argument("--max-memory", type=int, default=512, help="our bound in MiB")
    parser.add_argument("--mergekit", default="", help="the Python of an environment that has mergekit")
    options = parser.parse_args()
    selection(options.values)
    folder = Path(tempfile.mkdtemp(prefix="merge-ties-"))
    try:
        checkpoints(folder, options.megabytes)
        size = (folder / "base" / "model.safetensors").stat().st_size / 1e6
        print(f"TIES of three checkpoints of {size:.0f} MB, our bound {options.max_memory} MiB")
        os.sync()
        copy, _ = timed(lambda: [shutil.copytree(folder / m, folder / f"copy-{m}") for m in ("base", *"abc")])
        for m in ("base", *"abc"):
            shutil.rmtree(folder / f"copy-{m}")
        print(f"  plain copy of all four      {copy:7.1f} s")
        ours: dict[str, list[float] | None] = {}
        for kind in ("average", "ties", "ties, mergekit's"):
            out = str(folder / f"ours, {kind}")
            ours[kind] = merged(sys.executable, OURS, str(folder), out, kind, str(options.max_memory))
            if found := ours[kind]:
                wall, cpu, peak = found
                print(
                    f"  downriver, {kind:16} {wall:7.1f} s ({cpu:.1f} s), peak {peak:.0f} MiB, {wall / copy:.1f} copies"
                )
        if not options.mergekit:
            print("  mergekit left out: give its Python with --mergekit")
        elif found := merged(options.mergekit, THEIRS, str(folder), str(folder / "theirs")):
            wall, cpu, peak = found
            print(f"  mergekit                    {wall:7.1f} s ({cpu:.1f} s), peak {peak:.0f} MiB")
            if own := ours["ties, mergekit's"]:
                differ, total, most = differences(folder / "ours, ties, mergekit's", folder / "theirs")
                print(f"  mergekit / downriver: wall {wall / own[0]:.1f}, processor {cpu / own[1]:.1f}, ", end="")
                print(f"memory {peak / own[2]:.1f}; {differ} of {total:,} values differ, by {most:g} at most")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
