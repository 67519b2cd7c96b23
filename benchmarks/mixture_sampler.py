"""What drawing rows by a mixture costs: visits a second, and its share of a training step of a small model.

    python benchmarks/mixture_sampler.py [--visits 200000] [--steps 20]

The peers of the first figure are a plain loop over rows (what no sampler can beat) and interleaving by
``datasets.interleave_datasets`` with the same probabilities, which realises them only on average. The second figure is
the sampler's CPU time for one batch of 16 over that of one training step (forward, backward, AdamW) of the built-in
``tiny`` causal model at 128 tokens: the target is below 1 %. CPU seconds of one thread.
"""

import argparse
import time

import torch
from datasets import Dataset, interleave_datasets

from downriver.data import MixtureSampler, MixtureStream
from downriver.models import small

SOURCES = {"web": 60_000, "code": 30_000, "mail": 9_000, "mathematics": 1_000}
WEIGHTS = {"web": 0.4, "code": 0.3, "mail": 0.2, "mathematics": 0.1}
BATCH, LENGTH = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: [f"{name} {i}" for i in range(size)] for name, size in SOURCES.items()}
    sampler = MixtureSampler(SOURCES, WEIGHTS, seed=0)

    everything = [row for part in rows.values() for row in part]
    plain = timed(lambda: sum(len(everything[i % len(everything)]) for i in range(arguments.visits)))
    ours = timed(lambda: sum(len(row) for row in MixtureStream(rows, sampler, visits=arguments.visits)))
    report("plain loop over rows", plain, arguments.visits, plain)
    report("MixtureStream", ours, arguments.visits, plain)

    parts = [Dataset.from_dict({"text": part}) for part in rows.values()]
    shares = list(WEIGHTS.values())
    made = time.process_time()
    mixed = interleave_datasets(parts, probabilities=shares, seed=0, stopping_strategy="all_exhausted")
    made = time.process_time() - made
    peer = made + timed(lambda: sum(len(mixed[i % len(mixed)]["text"]) for i in range(arguments.visits)))
    report("datasets.interleave_datasets", peer, arguments.visits, plain)

    counts = sampler.counts(arguments.visits)
    worst = max(abs(counts[name] - WEIGHTS[name] * arguments.visits) for name in SOURCES)
    print(f"largest distance of a source from its share after {arguments.visits:,} visits: {worst:.0f} rows")

    model = small("causal-lm", "tiny").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(4, 200, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimiser.zero_grad()
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)["loss"].backward()
        optimiser.step()

    step()
    one = timed(lambda: [step() for _ in range(arguments.steps)]) / arguments.steps
    share = ours / arguments.visits * BATCH / one
    print(f"one step of {BATCH} x {LENGTH} tokens: {one * 1e3:.0f} ms; drawing its rows: {share:.3%} of that")


def timed(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def report(name: str, seconds: float, visits: int, plain: float) -> None:
    print(f"{name:<30} {visits / seconds:>12,.0f} rows a second, {seconds / plain:.1f} times the plain loop")


if __name__ == "__main__":
    main()
