"""Tasks from Hugging Face ``datasets``: in memory, saved on disk, or on the hub.

Reach for it when the data set is one of theirs; class names are taken from ``ClassLabel`` columns.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from downriver.core.errors import InputError, unknown
from downriver.tasks.columns import from_columns
from downriver.tasks.task import SPLITS, Kind, Task

ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


def from_datasets(
    source: str | os.PathLike[str] | datasets.Dataset | datasets.DatasetDict | Mapping[str, datasets.Dataset],
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    image: str | None = None,
    features: Sequence[str] | None = None,
    group: str | None = None,
    kind: Kind | None = None,
    name: str | None = None,
    config: str | None = None,
    splits: Mapping[str, str] | None = None,
    metrics: Sequence[str] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Task:
    """A task from a ``Dataset``, a ``DatasetDict``, a folder written by ``save_to_disk``, or a hub id (and ``config``).

    ``splits`` says which of theirs is which of ours, ``{"test": "validation_matched"}``; without it ``train``,
    ``validation`` (or ``valid``, ``val``, ``dev``) and ``test`` are taken and others left. Everything else is as in
    ``from_files``.

    >>> rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(10)], "y": [0, 1] * 5})
    >>> rows = rows.cast_column("y", datasets.ClassLabel(names=["no", "yes"]))
    >>> from_datasets(rows, text="text", label="y", name="demo").labels
    ('no', 'yes')
    """
    found = _open(source, config)
    origin = str(source) if isinstance(source, str | os.PathLike) else "datasets"
    chosen: dict[str, datasets.Dataset] = {}
    if splits is None:
        for theirs, rows in found.items():
            ours = ALIASES.get(theirs, theirs)
            if ours in SPLITS:
                chosen[ours] = rows
        if not chosen:
            raise InputError(f"{origin} has the splits {', '.join(found)}: say which is which, splits={{'test': ...}}")
    else:
        for ours, theirs in splits.items():
            if theirs not in found:
                raise unknown(f"split of {origin}", theirs, found)
            chosen[ours] = found[theirs]
    return from_columns(
        chosen,
        name=name or Path(origin).name,
        text=text,
        image=image,
        features=features,
        label=label,
        group=group,
        kind=kind,
        metrics=metrics,
        test_fraction=test_fraction,
        seed=seed,
    )


def _open(source: object, config: str | None) -> Mapping[str, datasets.Dataset]:
    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a Dataset, a DatasetDict, a folder or a hub id is expected, not {type(source).__name__}")
    folder = Path(source)
    try:
        saved = datasets.load_from_disk(folder) if folder.is_dir() else datasets.load_dataset(str(source), config)
    except Exception as error:  # datasets raises a dozen kinds, from ConnectionError to ArrowInvalid
        what = "a folder written by save_to_disk" if folder.is_dir() else "a data set of the hub"
        raise InputError(f"{source} cannot be read as {what}: {type(error).__name__}: {error}") from error
    return {"train": saved} if isinstance(saved, datasets.Dataset) else saved
