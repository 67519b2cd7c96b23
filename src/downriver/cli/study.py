"""``downriver study``: run the built-in study, one of a YAML file, or one written in Python."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from downriver.study import Study

PAGE = Path("downriver-report.html")


def study(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or MODULE:NAME or FILE.py:NAME of a study in Python; the built-in one without."
        ),
    ] = None,
    folder: Annotated[
        str, typer.Option(help="Where finished cells are kept: a folder, or an fsspec URL.")
    ] = "downriver-runs",
    executor: Annotated[str, typer.Option(help="serial, processes or ray")] = "processes",
    workers: Annotated[int | None, typer.Option(help="How many seeds run at a time.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Fewer or more seeds than the study declares.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is finished already.")] = False,
    report: Annotated[
        Path | None, typer.Option(help=f"Write an HTML report here (the built-in study: {PAGE}).")
    ] = None,
) -> None:
    """Run a study, or what is missing of it, and print its table and verdicts; exit code 1 when cells failed."""
    from rich.console import Console

    from downriver import report as reports

    if config is None:
        from downriver.study.quickstart import TITLE, run

        results, forecast = run(folder, executor, workers, fresh, seeds)
        report, title = report or PAGE, TITLE
    else:
        results, forecast = [find(config).run(folder, executor, workers, fresh, seeds)], None
        title = results[0].study.title
    console = Console()
    for result in results:
        console.print(reports.table(result))
        for line in reports.verdict_lines(result):
            console.print(line, highlight=False)
        for failure in result.failures:
            console.print(f"[red]failed:[/] {failure.arm}, seed {failure.seed}: ", end="")
            console.print(failure.error, markup=False, highlight=False)
    if any(result.failures for result in results):
        console.print(f"The tracebacks are in {folder}/failures; the same command tries the failed cells again.")
    if report:
        reports.write(report, results, [forecast] if forecast else (), title=title)
        console.print(f"report: {report}", highlight=False)
    if any(result.failures for result in results):
        raise typer.Exit(1)


def find(config: str) -> "Study":
    """The study that the argument names."""
    import sys
    from importlib import import_module

    from downriver.core.errors import InputError, unknown
    from downriver.study import Study, load

    place, colon, name = config.rpartition(":")
    if not colon or Path(config).suffix in (".yaml", ".yml"):
        return load(config)
    file = Path(place)
    sys.path.insert(0, str(file.parent.resolve() if file.suffix == ".py" else Path.cwd()))
    try:
        module = import_module(file.stem if file.suffix == ".py" else place)
    except ModuleNotFoundError as error:
        if error.name and (file.stem == error.name or place.startswith(error.name)):
            raise InputError(f"there is no module {place!r} to take the study {name!r} from") from error
        raise
    found = getattr(module, name, None)
    if not isinstance(found, Study):
        studies = [key for key, value in vars(module).items() if isinstance(value, Study)]
        raise unknown(f"study of {place}", name, studies)
    return found
