"""The command line: one command a room, each thin; nothing heavy is imported before a command runs."""

import sys

import typer

from downriver import __version__
from downriver.cli import advise, assets, data, forecast, merge, papers, rank, study
from downriver.core.errors import DownriverError

app = typer.Typer(
    name="downriver",
    help="Predict, choose, improve and prove the downstream task performance of pretrained models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("study")(study.study)
app.command("rank")(rank.rank)
app.command("advise")(advise.advise)
app.command("papers")(papers.papers)
app.command("reproduce")(papers.reproduce)
app.add_typer(data.app, name="data")
app.add_typer(merge.app, name="merge")
app.add_typer(forecast.app, name="forecast")
app.add_typer(assets.app, name="assets")


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if show:
        typer.echo(f"downriver {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except DownriverError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
