"""``downriver data``: what a mixture of domains leads to, and which one to train on."""

import typer

from downriver.cli.data_mix import mix
from downriver.cli.data_score import score
from downriver.cli.data_select import select

app = typer.Typer(help="Choose what a model learns from.", no_args_is_help=True)
app.add_typer(mix, name="mix")
app.command("score")(score)
app.command("select")(select)
