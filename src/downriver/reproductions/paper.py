"""A paper that downriver was built from, and the catalogue of all of them with what our reproductions found."""

import csv
import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from downriver.core.errors import unknown

HERE = Path(__file__).parent
EVIDENCE = HERE / "evidence.json"


@dataclass(frozen=True)
class Paper:
    """One paper: its number in the catalogue, its short name, where its method lives, and its claim in our words."""

    number: int
    slug: str
    title: str
    date: str  # year-month
    room: str
    claim: str = ""

    @property
    def module(self) -> str | None:
        """The module of its reproduction, or None while there is none."""
        name = f"downriver.reproductions.{self.room}.{self.slug}"
        try:
            return name if find_spec(name) else None
        except ModuleNotFoundError:
            return None


@cache
def catalogue() -> tuple[Paper, ...]:
    """All papers, in the catalogue's order.

    >>> len(catalogue()), catalogue()[52].slug
    (92, 'ties')
    """
    with (HERE / "papers.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Paper(int(row.pop("number")), **row) for row in csv.DictReader(file))


def find(words: str) -> list[Paper]:
    """The papers whose number, slug, title or room contain all the words.

    >>> [p.slug for p in find("merging interference")]
    ['ties']
    """
    wanted = words.lower().split()
    return [p for p in catalogue() if all(w in f"{p.number} {p.slug} {p.title} {p.room}".lower() for w in wanted)]


def reproduction(slug: str) -> ModuleType:
    """The module that tests a paper's claim: ``paper`` and ``studies``."""
    modules = {p.slug: p.module for p in catalogue() if p.module}
    if slug not in modules:
        raise unknown("reproduction", slug, modules)
    return import_module(str(modules[slug]))


def evidence() -> dict[str, dict[str, Any]]:
    """What the recorded runs of the reproductions found: slug → verdict, claims with their figures, versions, date."""
    return json.loads(EVIDENCE.read_text(encoding="utf-8")) if EVIDENCE.exists() else {}


def overall(words: list[str]) -> str:
    """One word for several claims: *holds* when all do, *fails* when any does, else *undecided*.

    >>> overall(["holds", "holds"]), overall(["holds", "fails"]), overall(["holds", "undecided"])
    ('holds', 'fails', 'undecided')
    """
    if "fails" in words:
        return "fails"
    return "holds" if words and all(w == "holds" for w in words) else "undecided"
