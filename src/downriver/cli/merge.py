"""``downriver merge``: merge checkpoints as a YAML file says, or report their conflicts before merging."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from downriver.cli.sizes import size
from downriver.core.errors import InputError

if TYPE_CHECKING:
    from downriver.merge import MergeReport


class _RunByDefault(TyperGroup):
    """A group whose first argument, where it names no command, is the first argument of ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Merge checkpoints: downriver merge CONFIG OUT, or downriver merge inspect CONFIG; apply and revert patches.",
    no_args_is_help=True,
)
patches = typer.Typer(help="Small files of changed entries: apply one, take it back, look at it.", no_args_is_help=True)
app.add_typer(patches, name="patch")

CONFIG = Annotated[Path, typer.Argument(help="A YAML file in mergekit's format.")]
MEMORY = Annotated[str, typer.Option("--max-memory", help="Bound of the working memory, such as 512MiB or 2GB.")]
DEVICE = Annotated[str | None, typer.Option(help="Where to calculate: cpu, cuda, cuda:1. A GPU when there is one.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def run(
    config: CONFIG,
    out: Annotated[Path, typer.Argument(help="The folder to be written.")],
    max_memory: MEMORY = "1GiB",
    shard_size: Annotated[str, typer.Option(help="Size of a shard.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT where it exists.")] = False,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Merge the models of CONFIG into the checkpoint folder OUT. The word run may be left out."""
    from downriver.merge import read_mergekit

    limits = {"max_bytes": size(max_memory), "shard_size": size(shard_size)}
    report = read_mergekit(config).merge(out, overwrite=overwrite, device=_device(device), **limits)
    if as_json:
        typer.echo(json.dumps({"out": str(report.out), "seconds": report.seconds, "tensors": report.rows()}))
    else:
        _print(report)


@app.command()
def inspect(config: CONFIG, max_memory: MEMORY = "1GiB", device: DEVICE = None, as_json: JSON = False) -> None:
    """Report how the models of CONFIG conflict, before they are merged; nothing is written."""
    from downriver.merge import conflicts, read_mergekit

    job = read_mergekit(config)
    trimming = {key: getattr(job.method, key) for key in ("density", "scope") if hasattr(job.method, key)}
    if getattr(job.method, "compat", None):  # the libraries rank each tensor alone
        trimming["scope"] = "tensor"
    report = conflicts(job.models, job.base, max_bytes=size(max_memory), device=_device(device), **trimming)
    typer.echo(json.dumps(report.table()) if as_json else report.text)


@app.command()
def delta(
    before: Annotated[str, typer.Argument(help="The checkpoint before: a folder, file or hub id.")],
    after: Annotated[str, typer.Argument(help="The checkpoint after.")],
    rank: Annotated[str | None, typer.Option(help="Rank of the matrices' updates: exact or stable.")] = None,
    as_json: JSON = False,
) -> None:
    """Report what changed between two checkpoints: how sparse the update is, layer by layer."""
    from downriver.merge import delta_stats

    report = delta_stats(before, after, rank=rank)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(report.tensors.to_dicts()))
        return
    typer.echo(str(report.by("layer")))
    shares = {name: report.share(name) for name in ("unchanged", "within_1e-05", "below_ulp")}
    typer.echo("; ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    if report.rank is not None:
        typer.echo(f"mean {rank} rank of an update over its smaller side: {report.rank:.2f}")
    for note in report.notes:
        typer.echo(f"note: {note}")


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, file or hub id.")],
    base: Annotated[str, typer.Argument(help="The model that it comes from.")],
    out: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    rank: Annotated[int, typer.Option(help="Of every matrix.")] = 16,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT where it exists.")] = False,
) -> None:
    """Write the difference between MODEL and BASE as a LoRA adapter, which peft loads."""
    from downriver.merge import extract_adapter

    found = extract_adapter(model, base, out, rank=rank, overwrite=overwrite)
    least = min(found.kept, key=found.kept.__getitem__)
    typer.echo(f"{len(found.kept)} matrices of rank {rank}; least kept of ‖ΔW‖²: {found.kept[least]:.1%}, {least}")
    if found.left_out:
        typer.echo(f"changed and left out: {', '.join(found.left_out)}")
    typer.echo(found.out)


MODEL = Annotated[str, typer.Argument(help="A checkpoint folder, file or hub id.")]
PATCH = Annotated[Path, typer.Argument(help="A patch, as SparsePatch.save writes it.")]
OUT = Annotated[Path, typer.Argument(help="The folder to be written.")]
OVERWRITE = Annotated[bool, typer.Option(help="Replace OUT where it exists.")]


@patches.command()
def apply(model: MODEL, patch: PATCH, out: OUT, overwrite: OVERWRITE = False) -> None:
    """Write MODEL with PATCH applied."""
    from downriver.merge import patch_checkpoint

    typer.echo(patch_checkpoint(model, patch, out, overwrite=overwrite))


@patches.command()
def revert(model: MODEL, patch: PATCH, out: OUT, overwrite: OVERWRITE = False) -> None:
    """Write MODEL, which has PATCH, as it was without it."""
    from downriver.merge import patch_checkpoint

    typer.echo(patch_checkpoint(model, patch, out, revert=True, overwrite=overwrite))


@patches.command()
def show(patch: PATCH, as_json: JSON = False) -> None:
    """Say what PATCH changes: entries of each tensor, and what its maker says of it."""
    from downriver.nn.sparse_patch import SparsePatch

    found = SparsePatch.load(patch)
    entries = {name: len(places) for name, places in found.mask.indices.items()}
    if as_json:
        about = {"about": found.about, "entries": entries, "count": found.mask.count, "share": found.mask.share}
        typer.echo(json.dumps(about))
        return
    for name, count in entries.items():
        typer.echo(f"{count:>10,}  {name} {found.shapes[name]}")
    typer.echo(f"{found.mask.count:>10,}  of {found.mask.total:,} entries ({found.mask.share:.4%})")
    for key, value in found.about.items():
        typer.echo(f"{key}: {value}")


def _print(report: "MergeReport") -> None:
    """One row a model, then what was done, read and written."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "distance from the base", "kept", box=None, pad_edge=False)
    for i, (model, norm) in enumerate(zip(report.inputs[1:], report.total.norms, strict=True)):
        table.add_row(
            escape(model["model"]), f"{norm:.4g}", f"{report.total.kept[i]:.1%}" if report.total.kept else "all"
        )
    Console().print(table)
    typer.echo(f"{report}; {report.bytes_read / 1e6:,.0f} MB read\n{report.out}")


def _device(name: str | None) -> str | None:
    """A device that torch has here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name
