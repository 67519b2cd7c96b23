"""What the pages show is there: names that are imported and used, commands and their options, whole studies."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from downriver.cli import app
from downriver.study.config import read

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def missing_names(code: str) -> list[str]:
    """Names of downriver that a piece of Python asks for and that are not there."""
    known: dict[str, ModuleType] = {}
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "downriver":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                found = getattr(module, alias.name, None) or _submodule(module, alias.name)
                if found is None:
                    missing.append(f"{node.module}.{alias.name}")
                elif isinstance(found, ModuleType):
                    known[alias.asname or alias.name] = found
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            if module and not hasattr(module, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    return missing


def _submodule(module: ModuleType, name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{module.__name__}.{name}")
    except ImportError:
        return None


def wrong_words(line: str) -> list[str]:
    """Commands and options of a line of shell that ``downriver`` does not have."""
    words = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    wrong, path = [], words[:1]
    for word in words[1:]:
        commands = getattr(command, "commands", {})
        if commands and not word.startswith("-"):
            if word not in commands and not ({"/", "."} & set(word)):
                return [" ".join([*path, word])]
            path.append(word)
            command = commands[word if word in commands else "run"]  # a group may run a file by default
        elif re.match(r"--?[A-Za-z]", word):
            options = {option for given in command.params for option in (*given.opts, *given.secondary_opts)}
            if word.split("=")[0] not in options | {"--help"}:
                wrong.append(f"{' '.join(path)} {word}")
    return wrong


@EVERY_PAGE
def test_python_names_exist(page):
    for code in blocks(page, "python"):
        assert missing_names(code) == [], code


@EVERY_PAGE
def test_commands_and_options_exist(page):
    for shell in blocks(page, "sh"):
        for line in shell.replace("\\\n", " ").splitlines():
            for part in re.split(r"\||&&|;", line.split(" #")[0]):
                if part.split()[:1] == ["downriver"]:
                    assert wrong_words(part) == [], line


@EVERY_PAGE
def test_studies_are_accepted(page, tmp_path):
    for text in blocks(page, "yaml"):
        if re.search("^arms:", text, re.MULTILINE) and re.search("^model:", text, re.MULTILINE):
            (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
            read(tmp_path / "shown.yaml")


def test_what_is_not_there_is_found():
    assert missing_names("from downriver import adapt\nfrom downriver.merge import tie\nadapt.lorra(1)") == [
        "downriver.merge.tie",
        "adapt.lorra",
    ]
    assert wrong_words("downriver merge inspct x") == ["downriver merge inspct"]
    assert wrong_words("downriver study a.yaml --reprot b --seeds 3") == ["downriver study --reprot"]
