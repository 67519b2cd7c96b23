"""``downriver papers`` and ``downriver reproduce``: the catalogue with verdicts, and a run of one reproduction."""

from pathlib import Path
from typing import Annotated

import typer


def papers(words: Annotated[list[str] | None, typer.Argument(help="Only papers with all these words.")] = None) -> None:
    """List the papers downriver is built from, with what our reproductions found."""
    from rich.console import Console
    from rich.table import Table

    from downriver.reproductions.paper import evidence, find

    found, known = find(" ".join(words or [])), evidence()
    table = Table("no", "name", "paper", "date", "room", "verdict", box=None, pad_edge=False)
    colours = {"holds": "green", "fails": "red", "undecided": "yellow"}
    for p in found:
        word = known.get(p.slug, {}).get("verdict", "not recorded" if p.module else "not built yet")
        table.add_row(str(p.number), p.slug, p.title, p.date, p.room, f"[{colours.get(word, 'dim')}]{word}[/]")
    console = Console()
    console.print(table)
    for p in found if len(found) <= 3 else []:
        for claim in known.get(p.slug, {}).get("claims", []):
            console.print(
                f"  {p.slug}: {claim['claim']}: {claim['verdict']}"
                f" ({claim['mean']:+.4g} [{claim['low']:+.4g}, {claim['high']:+.4g}], n = {claim['n']})",
                highlight=False,
            )


def reproduce(
    slug: Annotated[str, typer.Argument(help="The paper's short name, as `downriver papers` prints it.")],
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = Path("downriver-runs"),
    executor: Annotated[str, typer.Option(help="serial, processes or ray")] = "processes",
    seeds: Annotated[int | None, typer.Option(help="Fewer or more seeds than the study declares.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is finished already.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Write the verdicts into the evidence table.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
) -> None:
    """Run the study that tests a paper's claim and print its verdict."""
    from rich.console import Console

    from downriver import report as reports
    from downriver.reproductions.paper import reproduction
    from downriver.reproductions.reproduce import reproduce as run

    console = Console()
    paper = reproduction(slug).paper
    console.print(f"[bold]{paper.title}[/] ({paper.date})\n{paper.claim}", highlight=False)
    results = run(slug, folder, executor, seeds, fresh, record)
    for result in results:
        console.print(reports.table(result))
        for line in reports.verdict_lines(result):
            console.print(line, highlight=False)
    if report:
        reports.write(report, results, title=paper.title)
        console.print(f"report: {report}")
    if any(result.failures for result in results):
        raise typer.Exit(1)
