"""``downriver data score``: scores for every document of a corpus, into a table that can be filled bit by bit."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from downriver.core.errors import InputError, unknown

if TYPE_CHECKING:
    from downriver.data.score import Scorer

KINDS = ("gopher", "c4", "redpajama", "dsir", "loss", "classifier", "lexicon", "pii", "pycodestyle", "rubric")
NEEDS = {
    "dsir": "the documents of the target",
    "loss": "a model",
    "classifier": "a model",
    "lexicon": "a file of words",
    "rubric": "a rubric",
}


class Executor(StrEnum):
    """Where the shards are scored."""

    serial = "serial"
    processes = "processes"
    ray = "ray"


def score(
    source: Annotated[list[str], typer.Argument(help="Files, folders or patterns: .jsonl[.gz|.zst], .parquet.")],
    table: Annotated[
        Path, typer.Option("--table", "-t", help="The folder of the score table; filled further if there.")
    ],
    scorers: Annotated[
        list[str],
        typer.Option(
            "--with",
            "-w",
            metavar="[NAME=]KIND[:ARGUMENT]",
            help="gopher, c4, redpajama, pii, pycodestyle, dsir:TARGET, loss:MODEL, classifier:MODEL, lexicon:WORDS, "
            "rubric:NAME. May be given several times; NAME (the kind by default) begins the columns.",
        ),
    ],
    text: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id: Annotated[str, typer.Option(help="The column that holds the id.")] = "id",
    executor: Annotated[
        Executor | None, typer.Option(help="By default processes, and serial for scorers with a model.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many shards at once. By default the cores.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens that loss reads at once.")] = 512,
    judge: Annotated[str | None, typer.Option(help="The model that rubric asks.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The OpenAI-compatible address of the judge; without, a local model.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where models run, like cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Score every document once for each --with; what is scored already is not scored again.

    Broken records and ids that come twice are set aside in quarantine.jsonl of the table; the exit code is then 1.
    """
    from downriver.data.score import ScoreTable

    made = [_scorer(each, text, context, judge, endpoint, device) for each in scorers]
    if len({name for name, _ in made}) < len(made):
        raise InputError("two scorers have the same name: give them different ones, like clean=rubric:cleanliness")
    scores = ScoreTable(table)
    found = []
    set_aside: dict[str, None] = {}
    for name, scorer in made:
        added = scores.add(
            name,
            scorer,
            source[0] if len(source) == 1 else source,
            executor=executor.value if executor else None,
            workers=workers,
            text=text,
            id=id,
            progress=not as_json,
        )
        set_aside |= dict.fromkeys(map(str, added.quarantined))
        columns = [column for column in scores.columns if column == name or column.startswith(f"{name}_")]
        found.append(
            {
                "name": name,
                "columns": columns,
                "documents": added.documents,
                "documents_kept": added.documents_kept,
                "seconds": round(added.cost.seconds, 3),
                "flops": added.cost.flops,
                "failures": getattr(scorer, "failures", 0),
            }
        )
        if not as_json:
            failed = f", {found[-1]['failures']} without a score" if found[-1]["failures"] else ""
            typer.echo(
                f"{name}: {added.documents:,} documents scored in {added.cost.seconds:.1f} s, {added.documents_kept:,}"
                f" known already{failed}; columns {', '.join(columns)}"
            )
    if as_json:
        said = {"table": str(table), "scorers": found, "quarantined": list(set_aside)}
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False))
    if set_aside:
        if not as_json:
            for line in list(set_aside)[:10]:
                typer.secho(f"set aside: {line}", fg="yellow", err=True)
            more = f" ({len(set_aside) - 10} not shown)" if len(set_aside) > 10 else ""
            where = table / "quarantine.jsonl"
            typer.secho(f"{len(set_aside)} records set aside{more}: {where}", fg="yellow", err=True)
        raise typer.Exit(1)


def _scorer(
    asked: str, text: str, context: int, judge: str | None, endpoint: str | None, device: str | None
) -> "tuple[str, Scorer]":
    """The scorer that ``[NAME=]KIND[:ARGUMENT]`` asks for, under its name."""
    from downriver.data import score as room

    head, _, argument = asked.partition(":")
    name, named, kind = head.rpartition("=")
    if kind not in KINDS:
        raise unknown("kind of scorer", kind, KINDS)
    if bool(argument) != (kind in NEEDS):
        wanted = f"{kind}:ARGUMENT, with {NEEDS[kind]}" if kind in NEEDS else f"{kind} alone"
        raise InputError(f"--with {asked}: {wanted}, is expected")
    name = name if named else kind
    match kind:
        case "gopher" | "c4" | "redpajama":
            return name, getattr(room.RuleScorer, kind)()
        case "pii":
            return name, room.RegexPIIScorer()
        case "pycodestyle":
            return name, room.PycodestyleScorer()
        case "lexicon":
            if not Path(argument).is_file():
                raise InputError(f"--with {asked}: {argument} is not there: a file with a word a line is expected")
            words = Path(argument).read_text(encoding="utf-8").split("\n")
            return name, room.LexiconScorer((word.strip() for word in words if word.strip()), name)
        case "dsir":
            from downriver.data.documents import read_documents

            return name, room.DSIRScorer(document["text"] for document in read_documents(argument, text=text))
        case "loss":
            from downriver.models import load

            return name, room.LossScorer(load(argument, device=device), context=context)
        case "classifier":
            return name, room.ClassifierScorer(argument, device=device)
        case _:
            from downriver.models import HFChat, OpenAIChat, load

            if judge is None:
                raise InputError(f"--with {asked} needs the model that is asked: --judge")
            chat = OpenAIChat(judge, endpoint) if endpoint else HFChat(load(judge, device=device), cache=True)
            return name, room.RubricScorer(chat, argument)
