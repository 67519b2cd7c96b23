"""The whole loop over your own domains: lay out mixtures, train small models on them, fit, propose, and prove it.

Reach for it before a large run on several sources. Liu et al. 2024, «RegMix: Data Mixture as Regression for Language
Model Pre-training», arXiv:2407.01492, with its defaults for the design and the proposal; the small runs are those of
``pretrain.proxy``, each a cell of a study, so that none is ever trained twice. Departures: 64 runs by default, not 512;
documents are taken by their hash, and identical ones once, so that no text is in both halves.
"""

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from downriver.core import Budget, DownriverError, InputError, Measurement
from downriver.core.errors import unknown
from downriver.core.io import atomic_write, fingerprint
from downriver.data import CrossValidation, Mixture, MixtureRegressor, MixtureSpace, propose, sample_mixtures
from downriver.data.documents import SUFFIXES, Quarantined, content_hash, read_documents
from downriver.data.mix.propose import baselines
from downriver.data.mix.regress import Kind
from downriver.data.mix.space import Array
from downriver.pretrain.proxy import NgramProxy, ProxyTrainer
from downriver.study.block import Arm
from downriver.study.claims import Claim, better
from downriver.study.study import Result, Study

Proxy = Literal["ngram", "transformer"]
Texts = Mapping[str, Sequence[str]]
LOSS, TARGET = "loss", "target"
FOLDS = 5


@dataclass(frozen=True)
class Domains:
    """Texts to train and to measure on by domain, all characters that each domain has, and what could not be read."""

    train: dict[str, list[str]]
    validation: dict[str, list[str]]
    characters: dict[str, int]
    quarantined: list[Quarantined] = field(default_factory=list)


def read_domains(
    source: str | Path, *, text: str = "text", column: str = "domain", documents: int = 2000, share: float = 0.1
) -> Domains:
    """Read a folder with a file or a folder a domain, or one file with a column that names it.

    Parameters
    ----------
    source
        ``web.jsonl.gz``, ``code.parquet``, ``wiki/`` ... in one folder: the names before the first dot are the domains.
        Or a file: its ``column``, or that of its ``metadata``, is the domain.
    documents
        At most so many of each domain are kept, those whose hash comes first: a draw that depends on nothing but the
        texts. Identical texts count once. Memory grows with what is kept.
    share
        Of those kept, for validation; one at least. 1 takes all, and a single domain will do.

    Records that cannot be read are set aside (``quarantined``). Raises ``InputError`` for fewer than two domains, and
    for a domain with fewer than two different documents.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("river", "road"):
    ...     lines = [json.dumps({"text": f"{name} {i}"}) for i in range(20)]
    ...     _ = (folder / f"{name}.jsonl").write_text("\\n".join(lines))
    >>> found = read_domains(folder)
    >>> {name: len(texts) for name, texts in found.train.items()}, len(found.validation["road"])
    ({'river': 18, 'road': 18}, 2)
    """
    path = Path(source)
    fewest = 2 if share < 1 else 1
    if documents < fewest or not 0 < share <= 1:
        raise InputError(f"documents {documents}, share {share}: {fewest} at least, and a share up to 1 are expected")
    if not path.exists():
        raise InputError(f"{path} is not there: a folder with a file a domain, or a file, is expected")
    broken: list[Quarantined] = []
    kept: dict[str, dict[int, str]] = {}
    heaps: dict[str, list[int]] = {}
    characters: dict[str, int] = {}
    for name, content in _named(path, text, column, broken):
        characters[name] = characters.get(name, 0) + len(content)
        texts, heap = kept.setdefault(name, {}), heaps.setdefault(name, [])
        number = int(content_hash(content), 16)
        if number in texts:
            continue
        texts[number] = content
        heapq.heappush(heap, -number)
        if len(heap) > documents:
            del texts[-heapq.heappop(heap)]
    if len(kept) < fewest:
        raise InputError(f"{path} holds {len(kept)} domains: {fewest} at least are expected")
    train, validation = {}, {}
    for name in sorted(kept):
        texts = kept[name]
        if len(texts) < fewest:
            raise InputError(f"{path}: domain {name!r} has {len(texts)} different documents: two at least are expected")
        ordered = [texts[number] for number in sorted(texts)]
        held = max(1, round(share * len(ordered)))
        validation[name], train[name] = ordered[:held], ordered[held:]
    return Domains(train, validation, {name: characters[name] for name in train}, broken)


@dataclass(frozen=True)
class MixtureSweep:
    """A sweep over domains, as far as its settings go; ``run`` does it, or what is left of it.

    Args:
        train, validation: texts by domain, as ``read_domains`` gives them. Validation domains may be others.
        prior: natural share by domain, scaled to sum to 1. By default that of its characters in ``train``.
        targets: the validation domains whose mean loss is to be lowered; by default all.
        runs: how many mixtures are trained on.
        proxy: ``"ngram"`` (milliseconds a run) or ``"transformer"``; ``settings`` go to ``NgramProxy`` or
            ``ProxyTrainer``.
        regressor: a kind of ``MixtureRegressor``. max_repeat: how often a domain may be repeated, relative to its
            natural share, or really where ``token_budget`` and ``available_tokens`` say what the run to come has.
        seed: of the design, the small models and the proposal.

    >>> import tempfile
    >>> texts = {"river": ["the river runs to the sea"] * 9, "road": ["a road goes up"] * 9, "noise": ["x y z"] * 9}
    >>> sweep = MixtureSweep(texts, texts, targets=("river", "road"), runs=32, regressor="exp")
    >>> found = sweep.run(tempfile.mkdtemp(), progress=False)
    >>> found.proposal.weights["noise"] < 0.1, found.proposal.predicted < found.proposal.alternatives["natural"]
    (True, True)
    """

    train: Texts
    validation: Texts
    prior: Mapping[str, float] | None = None
    targets: Sequence[str] = ()
    runs: int = 64
    proxy: Proxy = "ngram"
    settings: Mapping[str, Any] = field(default_factory=dict)
    regressor: Kind = "lightgbm"
    max_repeat: float = 15.0
    token_budget: float | None = None
    available_tokens: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.proxy not in get_args(Proxy):
            raise unknown("proxy", self.proxy, get_args(Proxy))
        for name in self.targets:
            if name not in self.validation:
                raise unknown("validation domain in targets", name, self.validation)
        if self.runs < 2 * FOLDS:
            raise InputError(f"runs is {self.runs}: {2 * FOLDS} at least are expected")
        if self.prior is not None and (missing := set(self.train) - set(self.prior)):
            raise InputError(f"prior says nothing of domain {min(missing)!r}")

    @cached_property
    def space(self) -> MixtureSpace:
        """The mixtures that may be trained on."""
        prior = self.prior or {name: sum(map(len, texts)) for name, texts in self.train.items()}
        return MixtureSpace(tuple(self.train), prior, self.max_repeat, self.token_budget, self.available_tokens)

    @cached_property
    def mixtures(self) -> Array:
        """The design, (runs, d)."""
        return sample_mixtures(self.space, self.runs, seed=self.seed)

    @cached_property
    def study(self) -> Study:
        """The small runs: each mixture is one cell."""
        trained = _Trained(self.train, self.validation, self.proxy, dict(self.settings))

        def body(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
            weights = self.space.named(self.mixtures[seed])
            yield Arm("proxy", lambda: trained(weights, self.seed), {"weights": weights, "seed": self.seed})

        return Study("mixture-sweep", body, seeds=self.runs, title="Small runs", parameters=trained.asked)

    def run(
        self,
        folder: str | Path,
        executor: str | None = None,
        workers: int | None = None,
        progress: bool = True,
    ) -> "Swept":
        """Train what is not in ``folder`` yet, fit, and propose.

        ``executor`` is by default ``processes`` for transformers, and ``serial`` for what takes milliseconds. Raises
        ``DownriverError`` when small runs fail; those that are done stay.
        """
        executor = executor or ("serial" if self.proxy == "ngram" else "processes")
        result = self.study.run(folder, executor, workers, progress=progress)
        if result.failures:
            raise DownriverError(
                f"{len(result.failures)} of {self.runs} small runs failed, the first with: {result.failures[0].error}"
            )
        losses = result.rows().pivot("task", index="seed", values="value").sort("seed").drop("seed")
        target = losses.select(pl.mean_horizontal(*(self.targets or losses.columns))).to_series().to_numpy()
        regressor = MixtureRegressor(self.regressor)
        named = dict(zip(self.space.domains, self.mixtures.T, strict=True))
        report = regressor.cross_validate(named, {TARGET: target}, FOLDS)
        best = propose(regressor.fit(named, {TARGET: target}), self.space, seed=self.seed)
        return Swept(self, losses, target, report, best)


@dataclass(frozen=True)
class Swept:
    """What a sweep has found: losses (a column a validation domain), their mean over the targets, how well runs left
    out are predicted, and the proposal."""

    sweep: MixtureSweep
    losses: pl.DataFrame
    target: Array
    report: CrossValidation
    proposal: Mixture

    def candidates(self) -> dict[str, Array]:
        """The proposal and what it must beat: natural, uniform, the best single domain, the sweep's median and best."""
        space, order = self.sweep.space, np.argsort(self.target, kind="stable")
        obvious = baselines(space)
        single = next(name for name in self.proposal.alternatives if name.startswith("only "))
        return {
            "proposed": np.array([self.proposal.weights[name] for name in space.domains]),
            "natural": obvious["natural"],
            "uniform": obvious["equal shares"],
            single: obvious[single],
            "median sampled": self.sweep.mixtures[order[len(order) // 2]],
            "best sampled": self.sweep.mixtures[order[0]],
        }

    def verify(
        self,
        folder: str | Path,
        proxy: Proxy | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        seeds: int = 3,
        executor: str | None = None,
        workers: int | None = None,
        progress: bool = True,
    ) -> Result:
        """Train on the proposal and on what it must beat, and measure: a study with a claim for each of the latter.

        By default with the sweep's own proxy, which has to be ``"transformer"`` for seeds to differ; give another proxy
        or larger ``settings`` to see whether the proposal carries over.
        """
        sweep, proxy = self.sweep, proxy or self.sweep.proxy
        if settings is None:
            settings = sweep.settings if proxy == sweep.proxy else {}
        trained = _Trained(sweep.train, sweep.validation, proxy, dict(settings))
        mixtures = {name: sweep.space.named(w) for name, w in self.candidates().items()}
        chosen = tuple(sweep.targets) or tuple(sweep.validation)

        def measure(weights: Mapping[str, float], seed: int) -> list[Measurement]:
            each = trained(weights, seed)
            mean = float(np.mean([m.value for m in each if m.task in chosen]))
            return [*each, Measurement(f"{TARGET} {LOSS}", mean, direction="lower")]

        def body(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
            for name, weights in mixtures.items():
                yield Arm(name, _later(measure, weights, seed), {"weights": weights, "targets": chosen})

        beaten = ("natural", "uniform", "median sampled")
        claims: tuple[Claim, ...] = tuple(better("proposed", than=n, on=f"{TARGET} {LOSS}") for n in beaten)
        study = Study("mixture-proof", body, claims, seeds, title="The proposal, trained", parameters=trained.asked)
        executor = executor or ("serial" if proxy == "ngram" else "processes")
        return study.run(folder, executor, workers, progress=progress)

    def write(self, folder: str | Path) -> None:
        """Write ``mixtures.csv``, ``outcomes.csv`` (both with ``index``) and ``proposal.json``."""
        out, space = Path(folder), self.sweep.space
        out.mkdir(parents=True, exist_ok=True)
        index = pl.Series("index", np.arange(len(self.target)))
        tables = {
            "mixtures.csv": pl.DataFrame([index, *map(pl.Series, space.domains, self.sweep.mixtures.T)]),
            "outcomes.csv": self.losses.with_columns(pl.Series(TARGET, self.target)).insert_column(0, index),
        }
        for name, table in tables.items():
            with atomic_write(out / name) as file:
                table.write_csv(file)
        with atomic_write(out / "proposal.json", "w") as file:
            json.dump(self.summary(), file, indent=1, ensure_ascii=False, allow_nan=False)

    def summary(self) -> dict[str, Any]:
        """The proposal, what it is compared with, and how far to trust it, in plain values."""
        sweep = self.sweep
        rho = float(self.report.rho[0])
        return {
            "targets": list(sweep.targets or sweep.validation),
            "runs": sweep.runs,
            "proxy": sweep.proxy,
            "regressor": sweep.regressor,
            "cv": {"rho": rho if np.isfinite(rho) else None, "mse": float(self.report.mse[0]), "folds": FOLDS},
            **asdict(self.proposal),
            "natural": sweep.space.named(sweep.space.prior),
            "sampled": {"best": float(self.target.min()), "median": float(np.median(self.target))},
        }


@dataclass(frozen=True)
class _Trained:
    """The proxy, made once a process, and its losses as measurements."""

    train: Texts
    validation: Texts
    kind: Proxy
    settings: dict[str, Any]

    def __call__(self, weights: Mapping[str, float], seed: int) -> list[Measurement]:
        losses = self.made(weights, seed).losses
        return [Measurement(LOSS, value, task=name, direction="lower") for name, value in losses.items()]

    @property
    def asked(self) -> dict[str, Any]:
        """What the losses depend on beside weights and seed."""
        texts = [
            [name, *map(content_hash, some)] for half in (self.train, self.validation) for name, some in half.items()
        ]
        return {"texts": fingerprint(texts), "proxy": self.kind, "settings": self.settings}

    @cached_property
    def made(self) -> NgramProxy | ProxyTrainer:
        make = {"ngram": NgramProxy, "transformer": ProxyTrainer}[self.kind]
        return make(self.train, self.validation, **self.settings)

    def __getstate__(self) -> dict[str, Any]:  # the proxy is made anew in every process
        return {name: value for name, value in self.__dict__.items() if name != "made"}


def _later(measure: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: measure(*arguments)


def _named(path: Path, text: str, column: str, broken: list[Quarantined]) -> Iterator[tuple[str, str]]:
    """Every text with the name of its domain."""
    if path.is_file():
        for document in read_documents(path, text=text, quarantine=broken):
            name = document.get(column, document["metadata"].get(column))
            if name is None:
                raise InputError(f"{path}, document {document['id']}: no column {column!r} names its domain")
            yield str(name), document["text"]
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith(".") and (child.is_dir() or child.name.endswith(tuple(f".{s}" for s in SUFFIXES))):
            for document in read_documents(child, text=text, quarantine=broken):
                yield child.name.split(".")[0], document["text"]
