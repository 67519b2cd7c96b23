"""Scores of documents: the rules against datatrove's filters, losses against a bare forward pass.

    python benchmarks/score_documents.py [--megabytes 200] [--peer-megabytes 4] [--model small:causal-lm:small:0]

Rules: at least ``--megabytes`` of text from the packaged corpora (newsgroups, mail, kernel documentation, dictionary,
mathematics, Python's manual and library, quotations), in documents of at most 4000 characters as JSON lines; when that
is not enough they come again with the words of every line in another order, and the output says how much that is. Our
three families of rules read all of it. datatrove's filters (Gopher quality and repetition, C4 quality) read an even
sample of ``--peer-megabytes`` of the same files, once with their own word tokenizer for English (spaCy, where it is
installed) and once with our split of words, and we read that sample, too; the decisions with equal words are compared.
Each family stops at the first rule a document breaks; we always give all statistics. Both parse the same JSON lines.

Losses: ``--texts`` newsgroup posts, cut at 1000 characters, under ``--model``. The peers are the same forward passes
without anything around them, on the batches that the scorer makes (what is lost to the scorer itself) and on batches of
16 texts in the order they come (what a plain loop does). Times are CPU seconds of one thread (OMP_NUM_THREADS=1), so
that other work counts less.
"""

import argparse
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from downriver.core.cost import metered
from downriver.data.documents import read_documents, write_documents
from downriver.data.score import LossScorer, RuleScorer
from downriver.data.score.reading import by_length
from downriver.models import load
from downriver.tasks import load as load_task
from downriver.tasks.builtin import SOURCES, passages

SPLIT = re.compile(r"\w+|[^\w\s]+")


def corpus(megabytes: float) -> Iterator[dict]:
    """The packaged corpora in documents, then again with shuffled lines, until there is enough."""
    posts = [row["text"] for split in load_task("20newsgroups").splits.values() for row in split]
    whole = [posts, *(read() for read in SOURCES.values())]
    documents = [part for texts in whole for text in texts for part in passages(text, 4000) if part.strip()]
    rng = random.Random(0)
    rng.shuffle(documents)
    size = number = 0
    fresh = sum(len(text.encode()) for text in documents)
    print(f"corpora: {fresh / 1e6:.0f} MB of text in {len(documents):,} documents", flush=True)
    while size < megabytes * 1e6:
        if number >= len(documents):
            lines = [line.split(" ") for line in documents[number % len(documents)].split("\n")]
            text = "\n".join(" ".join(rng.sample(words, len(words))) for words in lines)
        else:
            text = documents[number]
        yield {"text": text, "id": f"d{number}"}
        size += len(text.encode())
        number += 1
    again = max(size - fresh, 0)
    print(f"read: {size / 1e6:.0f} MB in {number:,} documents, {again / size:.0%} of it shuffled again", flush=True)


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def batches(source: object) -> Iterator[list[dict]]:
    """What the score table hands to a scorer."""
    batch: list[dict] = []
    for document in read_documents(source):
        batch.append(document)
        if len(batch) == 4096:
            yield batch
            batch = []
    if batch:
        yield batch


def ours(source: object, families: tuple[str, ...]) -> tuple[float, np.ndarray]:
    """CPU seconds for all families, and which documents break no rule of each that has limits, (n, families)."""
    scorers = [getattr(RuleScorer, family)() for family in families]
    for scorer in scorers:
        scorer.score(["A first text, for the tables of characters."])
    limited = [bool(scorer.limits) for scorer in scorers]
    kept: list[np.ndarray] = []

    def work() -> None:
        for batch in batches(source):
            scores = [scorer.score(batch) for scorer in scorers]
            found = [s[:, -1] == 0 for s, has in zip(scores, limited, strict=True) if has]
            kept.append(np.stack(found or [np.ones(len(batch), bool)], axis=1))

    return timed(work), np.concatenate(kept)


def datatrove(source: Path, plain: bool) -> tuple[float, np.ndarray]:
    """CPU seconds of its filters, and which documents those of Gopher and that of C4 keep, (n, 2)."""
    from datatrove.data import Document
    from datatrove.pipeline.filters.c4_filters import C4QualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
    from datatrove.utils import text as texts
    from datatrove.utils import word_tokenizers

    class Plain:
        def word_tokenize(self, text: str) -> list[str]:
            return SPLIT.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in re.finditer(r"[.!?]+[\"')\]]*(?:\s|$)", text)]
            return [(0, end) for end in (ends if ends and ends[-1] == len(text) else [*ends, len(text)])]

    before = word_tokenizers.load_word_tokenizer
    if plain:
        word_tokenizers.load_word_tokenizer = lambda language: Plain()
    texts.split_into_parts.cache_clear()
    try:
        families = [[GopherQualityFilter(), GopherRepetitionFilter()], [C4QualityFilter()]]
        word_tokenizers.load_word_tokenizer("eng").word_tokenize("A first text.")
        kept: list[list[bool]] = []

        def work() -> None:
            for row in read_documents(source):
                document = Document(text=row["text"], id=row["id"])  # C4, the last, changes the text
                kept.append([all(each.filter(document) is True for each in filters) for filters in families])

        return timed(work), np.array(kept)
    finally:
        word_tokenizers.load_word_tokenizer = before


def rules(folder: Path, megabytes: float, peer_megabytes: float) -> None:
    write_documents(folder / "all", corpus(megabytes), like="jsonl", shard_rows=20_000)
    size = sum(len(d["text"].encode()) for d in read_documents(folder / "all")) / 1e6
    every = max(1, round(size / peer_megabytes))
    write_documents(
        folder / "sample", (d for i, d in enumerate(read_documents(folder / "all")) if i % every == 0), like="jsonl"
    )
    reading = timed(lambda: [None for _ in read_documents(folder / "all")])
    n = 0
    for families in (("gopher",), ("c4",), ("redpajama",), ("gopher", "c4", "redpajama")):
        seconds, kept = ours(folder / "all", families)
        n = len(kept)
        print(
            f"ours, {'+'.join(families):22} {n / seconds:8,.0f} documents/s {size / seconds:7.2f} MB/s/core", flush=True
        )
    rate = size / seconds
    raw = np.zeros(1 << 26, np.uint8)
    copy = 64 * 1.048576 / timed(lambda: raw.copy())
    print(f"limits: reading and parsing alone {size / reading:.0f} MB/s; memory copies at {copy / 1000:.1f} GB/s")
    print(f"        all rules run at {rate / (size / reading):.0%} of the rate of reading and parsing")
    sample = sum(len(d["text"].encode()) for d in read_documents(folder / "sample")) / 1e6
    seconds, kept = ours(folder / "sample", ("gopher", "c4"))
    print(f"sample of {sample:.1f} MB, {len(kept):,} documents; ours (gopher+c4) {sample / seconds:.2f} MB/s/core")
    for name, plain in (("our split of words", True), ("its own (spaCy)", False)):
        try:
            theirs, keep = datatrove(folder / "sample", plain)
        except ImportError as error:
            print(f"datatrove, {name}: left out, {str(error).splitlines()[0]}")
            continue
        print(
            f"datatrove, {name:20} {len(keep) / theirs:8,.0f} documents/s {sample / theirs:7.3f} MB/s/core; ours is"
            f" {theirs / seconds:.1f} times as fast",
            flush=True,
        )
        for family, mine, peer in zip(("Gopher", "C4"), kept.T, keep.T, strict=True):
            equal = np.mean(peer == mine)
            print(f"  {family}: keeps {peer.mean():.1%}, ours {mine.mean():.1%}; equal decisions {equal:.2%}")


def losses(name: str, texts: int) -> None:
    model = load(name)
    scorer = LossScorer(model)
    posts = [
        row["text"] for row in load_task("20newsgroups").splits["test"].select(range(texts)) if row["text"].strip()
    ]
    posts = [post[:1000] for post in posts]
    scorer.score(posts[:4])
    with metered() as meter:
        seconds = timed(lambda: scorer.score(posts))
    windows, _ = scorer._windows(posts)
    lengths = [len(window) for window in windows]
    pad = model.processor.pad_token_id or 0

    def forward(groups: list[np.ndarray], mask: bool) -> Callable[[], None]:
        inputs = []
        for rows in groups:
            longest = max(lengths[row] for row in rows)
            ids = torch.tensor([[*windows[row], *[pad] * (longest - lengths[row])] for row in rows])
            real = torch.arange(longest) < torch.tensor([lengths[row] for row in rows])[:, None]
            inputs.append({"input_ids": ids, "attention_mask": real.long()} if mask else {"input_ids": ids})

        def work() -> None:
            with torch.inference_mode():
                for batch in inputs:
                    model.backbone(**batch, use_cache=False)

        return work

    bare = timed(forward(list(by_length(lengths, scorer.batch_tokens)), mask=False))
    plain_groups = [np.arange(at, min(at + 16, len(windows))) for at in range(0, len(windows), 16)]
    plain = timed(forward(plain_groups, mask=True))
    tokens = sum(lengths)
    square = torch.rand(1024, 1024)
    peak = 2 * 1024**3 * 5 / timed(lambda: [square @ square for _ in range(5)])
    print(f"losses of {len(posts)} posts under {name}: {tokens:,} tokens in {len(windows)} windows")
    print(f"  LossScorer                  {tokens / seconds:10,.0f} tokens/s (encoding and cross-entropy included)")
    print(f"  bare forward, its batches   {tokens / bare:10,.0f} tokens/s: the scorer runs at {bare / seconds:.1%}")
    print(f"  bare forward, plain loop    {tokens / plain:10,.0f} tokens/s: {plain / seconds:.1%}")
    print(
        f"  limit: {meter.cost.flops / seconds / 1e9:.1f} GFLOP/s of {peak / 1e9:.1f} in a product of large matrices"
        f" ({meter.cost.flops / seconds / peak:.0%}), padding included"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--peer-megabytes", type=float, default=4)
    parser.add_argument("--model", default="small:causal-lm:small:0")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--only", choices=("rules", "losses"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "losses":
        with tempfile.TemporaryDirectory() as folder:
            rules(Path(folder), arguments.megabytes, arguments.peer_megabytes)
    if arguments.only != "rules":
        losses(arguments.model, arguments.texts)


if __name__ == "__main__":
    main()
