"""The report as Markdown: the same words and tables, for a terminal or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from espalier.report import layers, numbers, shrunk, tables, verdict, words
from espalier.report.reading import Result

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def markdown(result: Result, figure: str = "") -> str:
    """The whole report as Markdown text; `figure` is the file name of a still figure to show."""
    parts = [
        [f"# {_safe(verdict.verdict(result))}", "", _safe(result.title) + ".", *_remarks(result)],
        ["## The question", "", *_table(("", ""), words.question(result))],
        _answer(result),
        [f"![Quality against cost]({figure})"] if figure else [],
        _networks(result),
        _repair(result),
        _trusted(result),
        _spent(result),
        _layers(result),
        _latency(result),
        _effects(result),
        _reproduce(result),
        ["## Notes", "", *(f"- {_safe(note)}" for note in result.notes)] if result.notes else [],
    ]
    return "\n\n".join("\n".join(p) for p in parts if p) + "\n"


def _safe(text: object) -> str:
    """Text with Markdown's and HTML's own characters escaped, on one line."""
    return _SPECIAL.sub(r"\\\1", str(text)).replace("\n", " ")


def _code(text: object) -> str:
    """Text as a code block's line: a fence inside it can't end the block."""
    return str(text).replace("```", "'''")


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(map(_safe, heads)) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(map(_safe, row)) + " |" for row in rows]


def _remarks(result: Result) -> list[str]:
    warnings = [*verdict.broken(result), *verdict.ahead(result)]
    out = [f"> **{_safe(text)}**" for text in warnings]
    if not out and verdict.lead(result):
        out = [_safe(verdict.lead(result))]
    return ["", *out] if out else []


def _answer(result: Result) -> list[str]:
    rows = tables.readings(result)
    if not rows:
        return []
    chosen = _code(words.candidate(result.best.candidate))
    heads = ("metric", "value", "how it was obtained")
    block = ["", "```text", chosen, "```"] if chosen else []
    return ["## The answer", "", *_table(heads, rows), *block]


def _networks(result: Result) -> list[str]:
    heads, rows = tables.comparison(result)
    if not heads:
        return []
    return [
        "## The front and the baselines",
        "",
        *_table(
            ("role", "network", *heads, "keeps limits", "trained from"),
            [(r.role, r.name, *r.cells, r.kept, r.start) for r in rows],
        ),
    ]


def _trusted(result: Result) -> list[str]:
    sentences = words.trusted(result)
    return ["## How the search went", "", *map(_safe, sentences)] if sentences else []


def _repair(result: Result) -> list[str]:
    heads, rows = shrunk.stages(result)
    if not rows:
        return []
    quality = numbers.label(result.quality)
    table = _table(("network", *heads), [(name, *cells) for name, cells in rows])
    return ["## Before and after repair", "", f"Validation {quality} after each stage.", "", *table]


def _spent(result: Result) -> list[str]:
    heads, layers = shrunk.spent(result)
    rows = [(x.name, *(p.text if p else numbers.DASH for p in x.parts)) for x in layers]
    return ["## Where the budget goes", "", *_table(("layer", *heads), rows)] if rows else []


def _layers(result: Result) -> list[str]:
    rows = [
        (
            layer.name,
            layer.operation,
            numbers.times(layer.out),
            *(
                numbers.show(layer.cost[c], c) + f" ({numbers.share(layer.share[c])})"
                if layer.cost[c] is not None
                else numbers.DASH
                for c in ("params", "macs")
            ),
        )
        for stage in layers.stages(result.network)
        for layer in stage.layers
    ]
    heads = ("layer", "operation", "output", "parameters", "MACs")
    return ["## The network, layer by layer", "", *_table(heads, rows)] if rows else []


def _latency(result: Result) -> list[str]:
    text = tables.trust(result)
    return ["## Predicted against measured latency", "", _safe(text)] if text else []


def _effects(result: Result) -> list[str]:
    rows = [
        (name, e.option, e.n, e.accuracy, e.cost)
        for name, group in tables.effects(result)
        for e in group
    ]
    heads = ("decision", "option", "trials", numbers.label(result.quality), "cost")
    return ["## What each decision does", "", *_table(heads, rows)] if rows else []


def _reproduce(result: Result) -> list[str]:
    lines: list[str] = []
    for key, language in (("command", "bash"), ("python", "python")):
        text = result.reproduce.get(key)
        if text:
            lines += [f"```{language}", _code(text), "```", ""]
    versions = result.reproduce.get("versions")
    if isinstance(versions, dict) and versions:
        lines.append(", ".join(f"{_safe(k)} {_safe(v)}" for k, v in versions.items()))
    return ["## How to reproduce it", "", *lines] if lines else []
