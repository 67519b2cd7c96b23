"""``downriver data select``: the chosen documents of a scored corpus, and one reason for every other one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from downriver.core.errors import InputError


def select(
    source: Annotated[list[str], typer.Argument(help="Files, folders or patterns: .jsonl[.gz|.zst], .parquet.")],
    table: Annotated[Path, typer.Option("--table", "-t", help="The folder of the score table.")],
    rule: Annotated[
        str,
        typer.Option("--by", help="A column, 'prior - conditional', '0.3*edu + 0.7*dsir', random or 'resample(dsir)'."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the chosen documents.")],
    audit: Annotated[Path | None, typer.Option(help="A Parquet file with the reason of every document.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="So many documents.")] = None,
    tau: Annotated[float | None, typer.Option(help="One document of so many.")] = None,
    budget_tokens: Annotated[float | None, typer.Option(help="So many tokens, of the column --tokens.")] = None,
    quantile: Annotated[float | None, typer.Option(help="All from this quantile of the scores on.")] = None,
    per_group: Annotated[
        str | None, typer.Option(help="Spend the budget in each group of this column, such as shard.")
    ] = None,
    quota: Annotated[
        list[str] | None, typer.Option(help="So many documents of one group, GROUP=N; again for every group.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="The column with the tokens of a document.")] = "tokens",
    dedup: Annotated[bool, typer.Option("--dedup", help="Drop copies and near copies first.")] = False,
    similarity: Annotated[float, typer.Option(help="From which similarity on two texts are near copies.")] = 0.8,
    text: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id: Annotated[str, typer.Option(help="The column that holds the id.")] = "id",
    seed: Annotated[int, typer.Option(help="Of random and resample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Choose documents by their scores and copy them, unchanged, into new shards.

    A killed run goes on with the shards that are missing.
    """
    from collections import Counter

    from downriver.data.score import ScoreTable
    from downriver.data.select import dedup as find_copies
    from downriver.data.select import select as choose

    if not table.is_dir():
        raise InputError(f"{table} is not there: the folder of a score table (downriver data score) is expected")
    files = source[0] if len(source) == 1 else source
    copies = find_copies(files, threshold=similarity, text=text, id=id).reasons if dedup else {}
    chosen = choose(
        ScoreTable(table),
        rule,
        k=k,
        tau=tau,
        budget_tokens=budget_tokens,
        quantile=quantile,
        quotas=_quotas(quota) if quota else None,
        per_group=per_group,
        tokens=tokens,
        drop=copies,
        seed=seed,
    )
    paths = chosen.apply(files, out, text=text, id=id)
    if audit is not None:
        chosen.audit(audit)
    kinds = Counter(reason.split(" of ")[0] for reason in chosen.reasons.values())
    said = {
        "documents": len(chosen.scores),
        "chosen": len(chosen.indices),
        "threshold": chosen.threshold,
        "dropped": dict(sorted(kinds.items())),
        "files": [str(path) for path in paths],
    }
    if as_json:
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False))
        return
    typer.echo(f"{len(chosen.indices):,} of {len(chosen.scores):,} documents in {len(paths)} files: {out}")
    for reason, number in sorted(kinds.items()):
        typer.echo(f"{number:>12,}  {reason}")


def _quotas(given: list[str]) -> dict[str, int]:
    """Documents by group from ``GROUP=N``."""
    found: dict[str, int] = {}
    for text in given:
        group, sign, number = text.rpartition("=")
        if not sign or not number.isdecimal() or group in found:
            raise InputError(f"--quota {text!r}: GROUP=N with a whole number is expected, once a group")
        found[group] = int(number)
    return found
