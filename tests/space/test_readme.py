"""The READMEs' reference: every setting and every option of the commands stands there as the code has it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest
import typer

from space.settings import Settings, Text

ROOT = Path(__file__).parents[2]
READMES = [("README.md", "Settings"), ("README.zh-CN.md", "设置")]
CLI = {
    "app.py": ("app", "command"),
    "-m training": ("training.__main__", "app"),
    "-m publish": ("publish.__main__", "app"),
}


def keys(kind=Settings, table="") -> dict[str, tuple[str, str]]:
    """Each key of assistant.toml with its default and what is allowed, as the READMEs write them."""
    found, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get("not_a_key"):
            continue
        name, hint = f"{table}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and hint is not Text:
            found |= keys(hint, f"{name}.")
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found[name] = (_default(default), _allowed(field.metadata, hint))
    return found


def _default(value) -> str:
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value or value == 0 else ""


def _allowed(allows, hint) -> str:
    if allows["choices"]:
        return ", ".join(f"`{choice}`" for choice in allows["choices"])
    return f"{allows['low']:g} … {allows['high']:.10g}" if allows["high"] is not None else ""


def commands(name: str) -> dict[str, tuple]:
    """The rows about one command line: its commands with their help, and its options with those that take them,
    their default and their help; an option that means the same everywhere stands once."""
    module, variable = CLI[name]
    group = typer.main.get_command(getattr(importlib.import_module(module), variable))
    steps = getattr(group, "commands", {})
    found: dict[str, tuple] = {f"`{step}`": (_first(its.help),) for step, its in steps.items()}
    takers: dict[tuple, list[str]] = {}
    for step, its in steps.items() or [("", group)]:
        for option in its.params:
            takers.setdefault((option.opts[0], _said(option), option.help), []).append(step)
    for (option, default, help), of in takers.items():
        taken_by = "" if len(of) == max(len(steps), 1) else ", ".join(f"`{step}`" for step in of)
        found[f"`{option}` {taken_by}".strip()] = (default, help)
    return found


def _first(help: str) -> str:
    return " ".join(help.split("\n\n")[0].split())


def english(help: str) -> str:
    """A help text without the Chinese sentence at its end, as Markdown."""
    return re.sub(r"(?<=[.?!]) [^.?!]*。$", "", help).replace("<", r"\<")


def _said(option) -> str:
    default = option.default() if callable(option.default) else option.default
    return "" if default in (None, "", False) else f"`{default}`"


def table(readme: str, after: str) -> dict[str, tuple[str, ...]]:
    """The rows of the README's table behind a line, by their first cell."""
    text = (ROOT / readme).read_text(encoding="utf-8").split(f"{after}\n")[1]
    rows = text.split("| --- |\n")[1].split("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {first: tuple(others) for first, *others in cells}


@pytest.mark.parametrize(("readme", "title"), READMES)
def test_every_setting_stands_in_the_readme_with_its_default_and_what_is_allowed(readme, title):
    told = table(readme, f"### {title}")
    assert {key.strip("`"): cells[:2] for key, cells in told.items()} == keys()
    assert all(cells[2] for cells in told.values())


@pytest.mark.parametrize("name", CLI)
@pytest.mark.parametrize(("readme", "title"), READMES)
def test_every_command_and_option_stands_in_the_readme_with_its_default(readme, title, name):
    told, there = table(readme, f"**`python {name}`**"), commands(name)
    if readme == "README.md":
        there = {first: (*others, english(help)) for first, (*others, help) in there.items()}
        assert told == {first: others if len(others) == 2 else ("", *others) for first, others in there.items()}
    assert {first: cells[0] for first, cells in told.items()} == {
        first: others[0] if len(others) == 2 else "" for first, others in there.items()
    }
    assert all(help for _, help in told.values())
