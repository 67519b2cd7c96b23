"""Tasks by name, by path, or by a specification as a study's YAML file holds it."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downriver.core.errors import InputError, unknown
from downriver.core.registry import check_parameters
from downriver.tasks.builtin import BUILTIN
from downriver.tasks.from_datasets import from_datasets
from downriver.tasks.from_files import from_files
from downriver.tasks.task import SPLITS, Task


def load(spec: "str | os.PathLike[str] | Mapping[str, Any] | Task") -> Task:
    """A task from its built-in name, a file, a folder, a hub id, or a dictionary.

    A string is the name of a built-in task, else a path, else (with a slash in it) a hub id; files and folders are
    then read with the columns ``text`` and ``label``. A dictionary names its source and the keyword parameters of
    what reads it:

    - ``{"name": "20newsgroups"}``: a built-in task and its parameters
    - ``{"train": "a.csv", "test": "b.csv", "text": "body", "label": "topic"}``: ``from_files``
    - ``{"dataset": "folder or hub id", "text": "text", "label": "label"}``: ``from_datasets``

    and with any of them ``"only"`` (the classes to keep), ``"sample"`` (rows a split, ``{"train": 2000}``) and
    ``"seed"``.

    >>> load("wine").kind
    'tabular-classification'
    >>> task = load({"name": "digits", "only": ["3", "8"], "sample": {"train": 100}})
    >>> len(task.rows("train")), task.labels
    (100, ('3', '8'))
    >>> load("20newsgroup")
    Traceback (most recent call last):
    ...
    downriver.core.errors.InputError: unknown task '20newsgroup': did you mean '20newsgroups'? ...
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, Mapping):
        return _from_spec(dict(spec))
    if str(spec) in BUILTIN:
        return BUILTIN[str(spec)]()
    path = Path(spec)
    if path.is_file():
        return from_files(path, text="text", label="label")
    if path.is_dir() or (isinstance(spec, str) and spec.count("/") == 1 and not path.suffix):
        return from_datasets(spec, text="text", label="label")
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"task {str(spec)!r}: there is no such file or folder, and no built-in task has this name")
    raise unknown("task", spec, BUILTIN)


def names() -> list[str]:
    """The names of the built-in tasks.

    >>> "20newsgroups" in names()
    True
    """
    return sorted(BUILTIN)


def _from_spec(spec: dict[str, Any]) -> Task:
    only, sample = spec.pop("only", None), spec.pop("sample", None) or {}
    seed = spec.get("seed", 0)
    files = {split: spec.pop(split) for split in SPLITS if split in spec}
    if files and "dataset" in spec:
        raise InputError(f"task: files ({', '.join(files)}) or a dataset is expected, not both")
    if files:
        task = from_files(**files, **check_parameters(from_files, spec, "task from files"))
    elif "dataset" in spec:
        source = spec.pop("dataset")
        task = from_datasets(source, **check_parameters(from_datasets, spec, "task from a dataset"))
    elif "name" in spec:
        name = spec.pop("name")
        if name not in BUILTIN:
            raise unknown("task", name, BUILTIN)
        make = BUILTIN[name]
        if "seed" not in inspect.signature(make).parameters:
            spec.pop("seed", None)
        task = make(**check_parameters(make, spec, f"task {name}"))
    else:
        raise InputError("task: one of 'name', 'train', 'test' and 'dataset' is expected")
    task = task.only(only) if only is not None else task
    for split, n in sample.items():
        task = task.sample(split, n, seed=seed)
    return task
