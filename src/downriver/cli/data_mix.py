"""``downriver data mix``: fit small runs, propose the mixture of the large one, or do the whole loop over domains."""

import json
import math
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    import polars as pl

    from downriver.study.mixture_sweep import Swept
    from downriver.study.study import Result

mix = typer.Typer(
    help="Mixtures of domains: fit small runs, propose the mixture of the large one.", no_args_is_help=True
)


class Kind(StrEnum):
    """The regressors."""

    lightgbm = "lightgbm"
    linear = "linear"
    exp = "exp"
    both = "exp+lightgbm"
    gp = "gp"
    mlp = "mlp"


class Proxy(StrEnum):
    """The small models."""

    ngram = "ngram"
    transformer = "transformer"


class Executor(StrEnum):
    """Where small models are trained."""

    serial = "serial"
    processes = "processes"
    ray = "ray"


MIXTURES = Annotated[Path, typer.Argument(help="A table: index, and a column of shares a domain.")]
OUTCOMES = Annotated[Path, typer.Argument(help="A table: index, and a column a loss or score.")]
TARGET = Annotated[str, typer.Option(help="The column of OUTCOMES to predict.")]
MODEL = Annotated[Kind, typer.Option("--model", help="Which regressor.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@mix.command()
def fit(
    mixtures: MIXTURES,
    outcomes: OUTCOMES,
    target: TARGET,
    model: MODEL = Kind.lightgbm,
    predict: Annotated[Path | None, typer.Option(help="Further mixtures to predict, in a table like MIXTURES.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    group: Annotated[str | None, typer.Option(help="A column of OUTCOMES: rows alike in it stay together.")] = None,
    seed: Annotated[int, typer.Option(help="Of the trees.")] = 42,
    as_json: JSON = False,
) -> None:
    """Fit TARGET to the mixtures of finished runs, and say how well runs left out are predicted.

    The tables are joined on their column index. Runs with the same mixture are never split between fit and test.
    """
    from downriver.data import MixtureRegressor

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        domains, y, extra = _joined(mixtures, outcomes, target, group)
        regressor = MixtureRegressor(model.value, seed=seed)
        report = regressor.cross_validate(domains, y, folds, None if group is None else extra)
        found: dict[str, Any] = {
            "target": target,
            "model": model.value,
            "runs": domains.height,
            "cv": {
                "rho": _finite(report.rho[0]),
                "mse": float(report.mse[0]),
                "folds": report.folds,
                "groups": report.groups,
            },
        }
        if predict:
            new = _mixtures(predict)
            predicted = regressor.fit(domains, y).predict(new.drop("index"))
            found["predictions"] = [
                {"index": index, target: float(value)} for index, value in zip(new["index"], predicted, strict=True)
            ]
    found["warnings"] = _said(caught)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        return
    typer.echo(
        f"{model.value} on {domains.height} runs of {domains.width} domains: {target} of runs left out is ranked with a"
        f" correlation of {report.rho[0]:.3f} (Spearman), mean squared error {report.mse[0]:.4g}"
    )
    for row in found.get("predictions", ()):
        typer.echo(f"{row['index']}\t{row[target]:.5g}")
    _warn(found["warnings"])


@mix.command()
def propose(
    mixtures: MIXTURES,
    outcomes: OUTCOMES,
    target: TARGET,
    model: MODEL = Kind.lightgbm,
    prior: Annotated[
        Path | None, typer.Option(help="A table: domain, share[, tokens]. Without: the mean of MIXTURES.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of the run to come; needs tokens in --prior.")
    ] = None,
    max_repeat: Annotated[float, typer.Option(help="How often a domain may be repeated.")] = 15.0,
    draws: Annotated[int, typer.Option(min=1000, help="Mixtures to try.")] = 100_000,
    pull: Annotated[float, typer.Option("--kl-to-prior", min=0, help="Pull towards the natural mixture.")] = 0.0,
    higher: Annotated[bool, typer.Option("--higher", help="A higher target is better.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Solve instead of draw (linear and exp).")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: JSON = False,
) -> None:
    """Propose the mixture with the best predicted TARGET, beside the natural one and the best single domain."""
    from dataclasses import asdict

    from downriver.data import MixtureRegressor, MixtureSpace
    from downriver.data import propose as best

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        domains, y, _ = _joined(mixtures, outcomes, target, None)
        names = tuple(domains.columns)
        share, available = _prior(prior, names) if prior else (domains.mean().row(0, named=True), None)
        if tokens and available is None:
            raise InputError(f"--tokens needs the column tokens in {prior or '--prior'}")
        space = MixtureSpace(names, share, max_repeat, tokens, available if tokens else None)
        regressor = MixtureRegressor(model.value).fit(domains, y)
        found = best(
            regressor,
            space,
            n=draws,
            top_k=min(128, draws),
            kl_to_prior=pull,
            direction="higher" if higher else "lower",
            exact=exact,
            seed=seed,
        )
    said = {"target": target, "model": model.value} | asdict(found) | {"warnings": _said(caught)}
    if as_json:
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False))
        return
    for name, weight in sorted(found.weights.items(), key=lambda item: -item[1]):
        epochs = "" if found.epochs_per_domain is None else f"\t{found.epochs_per_domain[name]:.2f} epochs"
        typer.echo(f"{weight:.4f}\t{name}{epochs}")
    others = ", ".join(f"{name} {value:.4g}" for name, value in found.alternatives.items())
    typer.echo(f"predicted {target}: {found.predicted:.4g} (spread {found.spread:.2g}); {others}")
    _warn(said["warnings"])


@mix.command()
def sweep(
    source: Annotated[
        Path, typer.Argument(help="A folder with a file or folder a domain, or one file with a column domain.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the results; a second run continues there.")],
    target: Annotated[
        list[str] | None, typer.Option(help="A domain whose loss is to be lowered; several times for their mean.")
    ] = None,
    runs: Annotated[int, typer.Option(min=10, help="How many mixtures to train on.")] = 64,
    proxy: Annotated[Proxy, typer.Option(help="The small model: bigram counts, or a transformer.")] = Proxy.ngram,
    model: MODEL = Kind.lightgbm,
    validation: Annotated[
        Path | None, typer.Option(help="Texts to measure on, laid out like SOURCE; by default a tenth of each domain.")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option(help="A table: domain, share[, tokens]. Without: the characters of each domain.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of the run to come; needs tokens in --prior.")
    ] = None,
    max_repeat: Annotated[float, typer.Option(help="How often a domain may be repeated.")] = 15.0,
    documents: Annotated[int, typer.Option(min=2, help="Documents of each domain for the small runs.")] = 2000,
    text: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    domain: Annotated[str, typer.Option(help="The column that names the domain, where SOURCE is a file.")] = "domain",
    steps: Annotated[int, typer.Option(min=1, help="Steps of a transformer.")] = 200,
    width: Annotated[int, typer.Option(min=4, help="Width of a transformer.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of a transformer.")] = 1,
    verify: Annotated[
        Proxy | None, typer.Option(help="Train this small model on the proposal and on what it must beat.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of --verify.")] = 3,
    executor: Annotated[
        Executor | None, typer.Option(help="By default processes for transformers, serial for counts.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many at once. By default the cores.")] = None,
    seed: Annotated[int, typer.Option(help="Of the design, the small models and the proposal.")] = 0,
    as_json: JSON = False,
) -> None:
    """Train small models on random mixtures of your domains, fit their losses, and propose a mixture.

    Writes mixtures.csv, outcomes.csv and proposal.json into --out. No small model is ever trained twice: run it again
    after an interruption, or with more to verify. Broken records are left out and named; the exit code is then 1.
    """
    from downriver.study.mixture_sweep import MixtureSweep, read_domains

    read = read_domains(source, text=text, column=domain, documents=documents)
    train, held, broken = read.train, read.validation, read.quarantined
    if validation:
        train = {name: held[name] + texts for name, texts in train.items()}
        other = read_domains(validation, text=text, column=domain, documents=max(2, documents // 10), share=1.0)
        held, broken = other.validation, [*broken, *other.quarantined]
    shaped = {"steps": steps, "width": width, "layers": layers}
    share, available = _prior(prior, tuple(train)) if prior else (read.characters, None)
    if tokens and available is None:
        raise InputError(f"--tokens needs the column tokens in {prior or '--prior'}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        asked = MixtureSweep(
            train,
            held,
            share,
            targets=tuple(target or ()),
            runs=runs,
            proxy=proxy.value,
            settings=shaped if proxy == Proxy.transformer else {},
            regressor=model.value,
            max_repeat=max_repeat,
            token_budget=tokens,
            available_tokens=available if tokens else None,
            seed=seed,
        )
        where: dict[str, Any] = {
            "executor": executor.value if executor else None,
            "workers": workers,
            "progress": not as_json,
        }
        swept = asked.run(out / "runs", **where)
        swept.write(out)
        proof = None
        if verify:
            settings = shaped if verify == Proxy.transformer else {}
            proof = swept.verify(out / "runs", verify.value, settings, seeds=seeds, **where)
    said = _said(caught)
    set_aside = list(map(str, broken))
    if as_json:
        found = swept.summary() | {"warnings": said, "quarantined": set_aside}
        if proof:
            found["verified"] = [
                {"mixture": r["arm"], "seed": r["seed"], "loss": r["value"]} for r in _target_losses(proof).to_dicts()
            ]
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _tell(swept, proof)
        _warn(said)
        _warn([f"set aside: {line}" for line in set_aside[:10]])
    if broken or (proof and proof.failures):
        raise typer.Exit(1)


def _tell(swept: "Swept", proof: "Result | None") -> None:
    """The proposal, what is predicted of it and of the alternatives, and what was measured."""
    found, space = swept.proposal, swept.sweep.space
    natural = space.named(space.prior)
    typer.echo("proposed\tnatural\tdomain")
    for name, weight in sorted(found.weights.items(), key=lambda item: -item[1]):
        epochs = "" if found.epochs_per_domain is None else f"\t{found.epochs_per_domain[name]:.2f} epochs"
        typer.echo(f"{weight:.4f}\t\t{natural[name]:.4f}\t{name}{epochs}")
    others = ", ".join(f"{name} {value:.4f}" for name, value in found.alternatives.items())
    typer.echo(
        f"predicted loss: {found.predicted:.4f} (spread {found.spread:.2g}); {others}; sampled mixtures, measured: best"
        f" {swept.target.min():.4f}, median {float(sorted(swept.target)[len(swept.target) // 2]):.4f}"
    )
    typer.echo(f"runs left out are ranked with a correlation of {swept.report.rho[0]:.3f} (Spearman)")
    if proof:
        losses = _target_losses(proof)
        for arm in proof.arms:
            each = losses.filter(arm=arm)["value"].to_list()
            typer.echo(f"measured loss of {arm}: {', '.join(f'{value:.4f}' for value in each)}")
        for verdict in proof.verdicts():
            typer.echo(f"{verdict.claim.text}: {verdict.verdict}")


def _target_losses(proof: "Result") -> "pl.DataFrame":
    return proof.rows().filter(metric="target loss")


def _mixtures(path: Path) -> "pl.DataFrame":
    from downriver.core.table import read_table

    found = read_table(path, ["index"])
    return read_table(path, ["index"], numeric=[name for name in found.columns if name != "index"])


def _joined(
    mixtures: Path, outcomes: Path, target: str, group: str | None
) -> "tuple[pl.DataFrame, pl.Series, pl.Series]":
    """The shares, the target and the group of the runs that both tables have, in the order of the mixtures."""
    from downriver.core.table import read_table

    shares = _mixtures(mixtures)
    table = read_table(outcomes, ["index", *([group] if group else [])], numeric=[target])
    for path, index in ((mixtures, shares["index"]), (outcomes, table["index"])):
        if index.is_duplicated().any() and not (group and path == outcomes):
            raise InputError(f"{path}, column 'index': {index.filter(index.is_duplicated())[0]} is there twice")
    if shares["index"].dtype != table["index"].dtype:
        raise InputError(
            f"column 'index' holds {shares['index'].dtype} in {mixtures} and {table['index'].dtype} in {outcomes}"
        )
    wanted = list(dict.fromkeys(["index", target, *([group] if group else [])]))
    if clash := (set(wanted) - {"index"}) & set(shares.columns):
        raise InputError(f"column {min(clash)!r} is in both {mixtures} and {outcomes}")
    both = shares.join(table.select(wanted), on="index", how="inner", maintain_order="left")
    if both.height == 0:
        raise InputError(f"no index is in both {mixtures} and {outcomes}")
    if missing := table.height - both.height + shares.height - shares.join(table, on="index", how="semi").height:
        warnings.warn(
            f"{missing} rows of one table have no partner in the other: left out", RuntimeWarning, stacklevel=2
        )
    return both.drop(wanted), both[target], both[group] if group else both["index"]


def _prior(path: Path, names: tuple[str, ...]) -> "tuple[dict[str, float], dict[str, float] | None]":
    from downriver.core.table import read_table

    table = read_table(path, numeric=["share"], text=["domain"])
    if strange := [name for name in table["domain"] if name not in names]:
        raise unknown(f"domain in {path}", strange[0], names)
    with_tokens = "tokens" in table.columns
    table = read_table(path, numeric=["share", *(["tokens"] if with_tokens else [])], text=["domain"])
    share = dict(zip(table["domain"], table["share"], strict=True))
    return share, dict(zip(table["domain"], table["tokens"], strict=True)) if with_tokens else None


def _said(caught: "list[warnings.WarningMessage]") -> list[str]:
    return list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)))


def _warn(said: list[str]) -> None:
    for line in said:
        typer.secho(f"warning: {line}", fg="yellow", err=True)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
