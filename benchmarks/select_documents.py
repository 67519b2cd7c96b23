"""Choosing documents: the best 1 % of many scores in bounded memory, and duplicates against datatrove's MinHash.

    OMP_NUM_THREADS=1 python benchmarks/select_documents.py [--scores 100_000_000] [--megabytes 20] [--peer-megabytes 2]

Top: float32 scores in a .npy file are read in portions; the peers load the file whole (numpy's partition, polars'
top_k). Each runs in a process of its own, whose largest resident set is printed beside that of a process that only
imports the same modules. The rows that are found must be the same.

Duplicates: newsgroup posts as JSON lines, a tenth of them again with a word changed. datatrove's MinHash (signatures,
buckets, cluster; its defaults of 14 buckets of 8, five words) reads a smaller corpus of the same make, and so do we. It
gets our split of words instead of its tokenizer for English (spaCy, which is several times slower). Times are CPU
seconds of one process.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from downriver.core.minhash import WORD

TOP = """
import json, resource, sys, time
import numpy as np, polars as pl
from downriver.data.select.top import best_rows
how, path, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
started = time.process_time()
if how == "ours":
    rows = best_rows(path, k).rows
elif how == "numpy":
    scores = np.load(path)
    rows = np.sort(np.argpartition(scores, len(scores) - k)[len(scores) - k:])
elif how == "polars":
    frame = pl.DataFrame({"score": np.load(path)}).with_row_index()
    rows = np.sort(frame.top_k(k, by="score")["index"].to_numpy())
else:
    rows = np.arange(0)
seconds = time.process_time() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak": peak, "sum": int(rows.astype(np.int64).sum()), "rows": len(rows)}))
"""


def top(n: int, folder: Path) -> None:
    path = folder / "scores.npy"
    rng = np.random.default_rng(0)
    scores = np.lib.format.open_memmap(path, "w+", np.float32, (n,))
    for start in range(0, n, 1 << 22):
        scores[start : start + (1 << 22)] = rng.random(min(1 << 22, n - start), np.float32)
        # distinct enough: ties at the threshold go by a hash here, and by place in the peers
    scores.flush()
    del scores
    found = {}
    for how in ("imports", "ours", "numpy", "polars"):
        command = [sys.executable, "-c", TOP, how, str(path), str(n // 100)]
        found[how] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"best 1 % of {n:,} scores ({4 * n / 1e6:,.0f} MB):")
    base = found.pop("imports")["peak"]
    for how, row in found.items():
        ratio = row["seconds"] / found["ours"]["seconds"]
        same = row["rows"] == found["ours"]["rows"] and abs(row["sum"] / found["ours"]["sum"] - 1) < 1e-5
        print(
            f"  {how:7} {row['seconds']:6.2f} CPU s ({ratio:.2f} x ours), peak {row['peak']:,.0f} MB of which imports"
            f" {base:,.0f} MB; the same rows up to ties: {same}"
        )
    path.unlink()


def corpus(folder: Path, megabytes: float) -> int:
    """Newsgroup posts as files of 1 MB, until there are so many megabytes; bytes of text."""
    from downriver.data.documents import write_documents
    from downriver.tasks import load

    rng = random.Random(0)
    posts = list(load("20newsgroups").texts("train"))
    rows: list[dict[str, str]] = []
    size = turn = 0
    while size < megabytes * 1e6:
        for post in posts:
            words = post.split()
            if turn:
                rng.shuffle(words)  # the posts are used up: other texts of the same words
            copies = 2 if rng.random() < 0.1 else 1
            for copy in range(copies):
                text = " ".join([*words[:-1], f"changed{len(rows)}"] if copy else words)
                rows.append({"id": f"d{len(rows):08d}", "text": text})
                size += len(text)
            if size >= megabytes * 1e6:
                break
        turn += 1
    write_documents(folder, rows, like="jsonl", shard_rows=1000)
    return size


def copies(megabytes: float, peer_megabytes: float, folder: Path) -> None:
    from downriver.data.select.dedup import dedup

    for name, size in (("all", megabytes), ("sample", peer_megabytes)):
        read = corpus(folder / name, size)
        started = time.process_time()
        found = dedup(folder / name)
        ours = time.process_time() - started
        print(
            f"dedup, {name}: {found.documents:,} documents, {read / 1e6:.1f} MB in {ours:.1f} CPU s:"
            f" {found.documents / ours:,.0f} documents/s, {read / 1e6 / ours:.2f} MB/s; {found.exact} exact,"
            f" {found.near} near"
        )
    try:
        kept, theirs = datatrove(folder / "sample", folder / "peer")
    except Exception as error:  # a peer that does not run here is a row with its reason
        print(f"datatrove: skipped ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
        return
    print(
        f"datatrove, sample: {read / 1e6:.1f} MB in {theirs:.1f} CPU s: {read / 1e6 / theirs:.2f} MB/s, that is"
        f" {theirs / ours:.1f} x our time; {found.documents - kept} dropped"
    )


class Plain:
    """Our split of words where datatrove has a tokenizer."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)


def datatrove(source: Path, out: Path) -> tuple[int, float]:
    """Documents that stay, and CPU seconds."""
    import logging

    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature, minhash
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.logging import logger

    logger.remove()
    logging.disable(logging.WARNING)
    minhash.load_word_tokenizer = lambda language: Plain()
    config = MinhashConfig()
    sig, buckets, removed = (str(out / name) for name in ("sig", "buckets", "removed"))
    started = time.process_time()
    signature = MinhashDedupSignature(output_folder=sig, config=config)
    hashed = signature._hash_func
    signature._hash_func = lambda text: hashed(text.encode())  # newer versions of xxhash take bytes only
    signature.run(JsonlReader(str(source))(rank=0, world_size=1), 0, 1)
    for bucket in range(config.num_buckets):
        step = MinhashDedupBuckets(input_folder=sig, output_folder=buckets, config=config)
        step.run(None, bucket, config.num_buckets)
    MinhashDedupCluster(input_folder=buckets, output_folder=removed, config=config).run(None, 0, 1)
    step = MinhashDedupFilter(input_folder=removed)
    kept = sum(1 for _ in step.run(JsonlReader(str(source))(rank=0, world_size=1), 0, 1))
    return kept, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=int, default=100_000_000)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--peer-megabytes", type=float, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top(asked.scores, Path(folder))
        copies(asked.megabytes, asked.peer_megabytes, Path(folder))


if __name__ == "__main__":
    main()
