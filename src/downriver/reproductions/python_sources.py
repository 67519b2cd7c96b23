"""Passages of Python's standard library: real text that every machine has, split by file."""

import sysconfig
from pathlib import Path

from datasets import Dataset

from downriver.core import generator
from downriver.tasks.task import Task


def python_sources(name: str, seed: int, *, texts: int, characters: int, held: int = 200) -> Task:
    """Language modelling of ``texts`` passages, and of ``held`` for validation from a tenth of the files.

    A seed draws the files held out and the passages; ``name`` keeps the draws of two studies apart.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = generator(f"{name} files", seed).permutation(len(files))
    outside = set(order[: len(files) // 10].tolist())
    rng = generator(f"{name} passages", seed)

    def passages(validation: bool, count: int) -> Dataset:
        found = []
        for number, file in enumerate(files):
            if (number in outside) == validation:
                text = file.read_text(encoding="utf-8", errors="replace")
                found += [text[i : i + characters] for i in range(0, len(text) - characters, characters)]
        chosen = rng.permutation(len(found))[:count]
        return Dataset.from_dict({"text": [found[i] for i in chosen]})

    splits = {"train": passages(False, texts), "validation": passages(True, held)}
    return Task("standard library", "language-modelling", splits, ("text",), None)
