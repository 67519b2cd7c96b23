"""Paper 49: a regression from many small runs finds a mixture that is better than the natural one.

The paper's small runs are models of 1M parameters on the Pile. Here they are bigram models of words, which take
milliseconds, on six domains of packaged text; the loss to lower is the mean over three of them, which were chosen
beforehand. 64 mixtures are fitted, 32 others ranked, and one is proposed. A small transformer is then trained on the
proposed mixture and on those it must beat: what bigrams say of a mixture is only worth something if it carries over.
Looked at beforehand on another seed (100): of the regressors the paper's trees rank best by cross-validation, and they
are what proposes; the exponential law ranks worse here than on the paper's tables, because a mixture without a target's
domain costs far more than the law can bend to, so that only the trees' rank is claimed.
The public study (with ``DOWNRIVER_SHARED_DATA`` naming a folder that holds the paper's tables) fits 400 of the 512
published runs, drawn anew by each seed, and ranks the 256 held out.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from downriver.core import Budget, InputError, Measurement, generator
from downriver.data import MixtureRegressor, MixtureSpace, propose, sample_mixtures
from downriver.pretrain.proxy import NgramProxy, ProxyTrainer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, above, better, shared, study
from downriver.tasks.builtin import corpora

paper = Paper(
    number=49,
    slug="regmix",
    title="RegMix: Data Mixture as Regression for Language Model Pre-training",
    date="2024-07",
    room="data",
    claim="Many small runs on random mixtures, and a regression on them, find a mixture that beats the natural one.",
)

DOMAINS = ("dictionary", "kernel", "mail", "manual", "mathematics", "quotations")
TARGET = ("kernel", "mail", "manual")
FITTED, HELD, REPEAT = 64, 32, 15.0
LOSS = "target loss"
# documents a domain, steps of the transformer
SCALES = {"small": (300, 150), "tiny": (40, 2)}
REGRESSORS = ("linear", "lightgbm", "exp", "exp+lightgbm")


class Sweep:
    """The domains of a seed, its small runs, and what was proposed after them."""

    def __init__(self, seed: int, documents: int) -> None:
        self.seed = seed
        task = corpora(domains=DOMAINS, documents=documents, seed=seed)
        self.train, self.held = (
            {
                name: [text for text, domain in zip(rows["text"], rows["domain"], strict=True) if domain == name]
                for name in DOMAINS
            }
            for rows in (task.rows("train"), task.rows("validation"))
        )
        self.proxy = NgramProxy(self.train, self.held)
        self.space = MixtureSpace(DOMAINS, self.proxy.available, max_repeat=REPEAT)
        designed = sample_mixtures(self.space, FITTED + HELD, seed=seed)
        self.mixtures, self.others = designed[:FITTED], designed[FITTED:]
        self.losses, self.true = (np.array([self.loss(w) for w in some]) for some in (self.mixtures, self.others))
        self.regressor = MixtureRegressor("lightgbm").fit(dict(zip(DOMAINS, self.mixtures.T, strict=True)), self.losses)

    def loss(self, weights: np.ndarray) -> float:
        """The mean loss over the target domains after a small run on the mixture."""
        return target(self.proxy(self.named(weights)).losses)

    def named(self, weights: np.ndarray) -> dict[str, float]:
        """Weights by domain."""
        return dict(zip(DOMAINS, weights.tolist(), strict=True))

    def candidates(self) -> dict[str, np.ndarray]:
        """The proposed mixture, and those it must beat: natural, equal, and the median of the sweep."""
        proposed = propose(self.regressor, self.space, seed=self.seed)
        middle = self.mixtures[np.argsort(self.losses)[FITTED // 2]]
        uniform = np.minimum(np.full(len(DOMAINS), 1 / len(DOMAINS)), self.space.caps)
        return {
            "proposed": np.array([proposed.weights[name] for name in DOMAINS]),
            "natural": self.space.prior,
            "uniform": uniform / uniform.sum(),
            "median": middle,
        }


@study(
    "regmix",
    title="Six domains of text, 64 bigram runs, one proposed mixture",
    claims=[
        above("lightgbm", on="rho", value=0.85),
        *(better("proposed", than=other, on=LOSS) for other in ("natural", "uniform", "median")),
        *(better("proposed", than=other, on=f"transformer's {LOSS}") for other in ("natural", "uniform", "median")),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the documents, the mixtures of the sweep, and the transformers' weights anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    documents, steps = SCALES[scale]

    @shared
    def sweep() -> Sweep:
        return Sweep(seed, documents)

    @shared
    def transformer() -> ProxyTrainer:
        return ProxyTrainer(sweep().train, sweep().held, steps=steps)

    def ranked(kind: str) -> list[Measurement]:
        fitted = MixtureRegressor(kind).fit(sweep().mixtures, sweep().losses)  # type: ignore[arg-type]
        return [Measurement("rho", float(spearmanr(fitted.predict(sweep().others), sweep().true).statistic))]

    def trained(name: str) -> list[Measurement]:
        weights = sweep().candidates()[name]
        result = transformer()(sweep().named(weights), seed)
        return [
            Measurement(LOSS, sweep().loss(weights), direction="lower"),
            Measurement(f"transformer's {LOSS}", target(result.losses), direction="lower"),
        ]

    for kind in REGRESSORS:
        yield Arm(kind, partial(ranked, kind))
    for name in ("proposed", "natural", "uniform", "median"):
        yield Arm(name, partial(trained, name))


def target(losses: Mapping[str, float]) -> float:
    """What is to be lowered."""
    return float(np.mean([losses[name] for name in TARGET]))


@study(
    "regmix-public",
    title="The paper's 1M runs: 400 of 512 fitted, 256 others ranked by their loss on Pile-CC",
    claims=[above("lightgbm", on="rho", value=0.97), better("lightgbm", than="linear", on="rho")],
    seeds=3,
)
def public(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """The published tables; a seed draws the runs that are fitted."""

    @shared
    def tables() -> list[pl.DataFrame]:
        folder = _data()
        if folder is None:
            raise InputError("DOWNRIVER_SHARED_DATA names no folder that holds regmix")
        names = ("train_mixture", "train_pile_loss", "test_mixture", "test_pile_loss")
        return [pl.read_csv(folder / f"{name}_1m.csv").drop("index") for name in names]

    def ranked(kind: str) -> list[Measurement]:
        mixtures, losses, others, true = tables()
        [column] = [name for name in losses.columns if "pile_cc" in name.lower()]
        rows = generator(paper.slug, "public", seed).permutation(len(mixtures))[:400]
        fitted = MixtureRegressor(kind).fit(mixtures[rows], losses[column].gather(rows))  # type: ignore[arg-type]
        rho = spearmanr(fitted.predict(others), true[column].to_numpy()).statistic
        return [Measurement("rho", float(rho))]

    for kind in REGRESSORS:
        yield Arm(kind, partial(ranked, kind))


def _data() -> Path | None:
    folder = Path(os.environ.get("DOWNRIVER_SHARED_DATA", "")) / "regmix"
    return folder if "DOWNRIVER_SHARED_DATA" in os.environ and folder.is_dir() else None


studies = (reproduction, public) if _data() else (reproduction,)
