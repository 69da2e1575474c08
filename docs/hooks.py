"""Fills the page of the command line from the command itself, so that it is never out of date."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by MkDocs for every page."""
    return markdown.replace(MARK, "\n\n".join(commands())) if MARK in markdown else markdown


def commands() -> Iterator[str]:
    """A section for every command: its help and a table of its options."""
    from espalier.cli import app

    root = typer.main.get_command(app)
    for words, command in _walk(root, ("espalier",)):
        yield f"## {' '.join(words[1:])}\n\n{(command.help or '').strip()}\n\n{_table(command)}".rstrip()


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, child in inner.items():
        yield from _walk(child, (*words, name))


def _table(command: Any) -> str:
    rows = ["| option | meaning | default |", "| --- | --- | --- |"]
    for p in command.params:
        if p.name == "help":
            continue
        option = p.param_type_name == "option"
        names = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts)) if option else f"`{p.name.upper()}`"
        text = (getattr(p, "help", None) or "").replace("|", r"\|")
        shown = p.default is not None and p.default is not False and not callable(p.default)
        rows.append(f"| {names} | {text} | {f'`{p.default}`' if option and shown else ''} |")
    return "\n".join(rows) if len(rows) > 2 else ""
