"""The report of a race: one HTML page that loads nothing, Markdown, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from espalier.bench import sheets
from espalier.bench.entrants import BASELINE
from espalier.bench.figures import figures
from espalier.bench.verdicts import amount
from espalier.report import numbers
from espalier.report.page import inline_json
from espalier.report.reading import plain
from espalier.report.write import put

_HEIGHTS = {"regret": 440, "volume": 400}
_ROW, _FRAME = 30, 110  # a line of the ranks' figure, and what is around them


def write(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Writes `report.html`, `report.md` and `result.json`; gives the paths by kind.

    `result` is `Race.to_json()`, with `command`, `machine` and `versions` where known. Raises
    `StudyError` when the folder can't be written; files that were there stay as they were.
    """
    where = Path(folder)
    data = json.dumps(plain(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    texts = {
        "html": ("report.html", html(result)),
        "markdown": ("report.md", markdown(result)),
        "json": ("result.json", data),
    }
    return {kind: put(where / name, text.encode()) for kind, (name, text) in texts.items()}


def html(result: Mapping[str, Any]) -> str:
    """The whole page. Text of the result is escaped; the page's own policy forbids loading."""
    views = figures(result)
    tall = _FRAME + _ROW * len(result["curves"])
    return _environment().get_template("race.html.j2").render(
        title=sheets.title_of(result),
        headline=headline(result),
        warnings=_warnings(result),
        tiles=_tiles(result),
        question=question(result),
        verdicts=result["verdicts"],
        views=views,
        heights={**_HEIGHTS, "ranks": tall, "improvement": tall},
        objectives=" and ".join(result["objectives"]),
        tables={
            "budgets": sheets.budgets(result),
            "volume": sheets.volume(result),
            "ranks": sheets.ranks(result),
            "estimators": sheets.estimators(result),
        },
        ranks_caption=sheets.ranks_caption(result),
        improvement_caption=sheets.improvement_caption(result) if views.get("improvement") else "",
        ceiling=sheets.ceiling(result),
        hows=sheets.hows(result),
        command=str(result.get("command") or ""),
        versions=dict(result.get("versions") or {}),
        notes=result["notes"],
        figures_json=inline_json(views),
        plotly=Markup(get_plotlyjs()),  # the library's own file, not text of the result
    )  # fmt: skip


@cache
def _environment() -> Environment:
    return Environment(
        loader=ChoiceLoader(
            [
                PackageLoader("espalier.bench", "templates"),
                PackageLoader("espalier.report", "templates"),
            ]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def headline(result: Mapping[str, Any]) -> str:
    """Who is first, in one sentence, and whether that is luck."""
    first = sheets.order(result)[0]
    if first == BASELINE:
        return "Nothing ranks before random search"
    test = result["significance"][first]
    if not test["better"]:
        return f"{first} ranks first, but is not shown to be better than random search"
    if result["judged_by"] == "hypervolume":
        return f"{first} ranks first and is better than random search"
    ours, theirs = (amount(result["regret"][n], result["unit"]) for n in (first, BASELINE))
    return f"{first} ranks first: regret {ours}, random search {theirs}"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    tests = result["significance"]
    behind = [n for n in sheets.order(result) if n != BASELINE and not tests[n]["better"]]
    if not behind:
        return []
    verb = "is" if len(behind) == 1 else "are"
    return [f"Not better than random search at equal budget {verb}: {', '.join(behind)}."]


def _tiles(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The first three by rank, and random search."""
    names = [n for n in sheets.order(result) if n != BASELINE][:3]
    shown = [*names, *([BASELINE] if BASELINE in result["curves"] else [])]
    out = []
    for name in shown:
        if result["judged_by"] == "hypervolume":
            value = f"{result['hypervolume'][name]['mean'][-1]:.4f}"
            what = "share of the hypervolume"
        else:
            value = amount(result["regret"][name], result["unit"])
            what = "mean test regret"
        out.append((value, name, f"{what}, {result['queries']} queries, {result['seeds']} seeds"))
    return out


def question(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The question as terms and texts."""
    machine: Mapping[str, Any] = result.get("machine") or {}
    memory = numbers.real(machine.get("memory_gb"))
    parts = [
        str(machine.get("cpu") or ""),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{memory:g} GB memory" if memory else "",
        str(machine.get("system") or ""),
    ]
    limits = [f"{x['metric']} {x['op']} {x['bound']:g}" for x in result["limits"]]
    rows = [
        ("Table", f"{result['table']}: {result['ceiling']['rows']:,} rows"),
        ("Strategies", ", ".join(result["curves"])),
        ("Objectives", ", ".join(result["objectives"])),
        ("Limits", ", ".join(limits) or "none"),
        ("Queries", f"{result['queries']} a run, {result['batch']} asked at a time"),
        ("Simulated workers", str(result["workers"]) if result["workers"] else "none"),
        ("Seeds", str(result["seeds"])),
        ("Chosen by, reported on", f"{result['choice']}, {result['report']}"),
        ("Machine", ", ".join(p for p in parts if p)),
    ]
    return [(term, text) for term, text in rows if text]


# --- Markdown ---------------------------------------------------------------------------------

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def _safe(text: object) -> str:
    return _SPECIAL.sub(r"\\\1", str(text)).replace("\n", " ")


def _sheet(sheet: sheets.Sheet | None) -> str:
    if sheet is None:
        return ""
    lines = ["| " + " | ".join(map(_safe, sheet.heads)) + " |", "|" + " --- |" * len(sheet.heads)]
    lines += ["| " + " | ".join(map(_safe, row)) + " |" for row in sheet.rows]
    return "\n".join([_safe(sheet.caption) + ".", "", *lines])


def _bullets(texts: Iterable[object]) -> str:
    return "\n".join(f"- {_safe(text)}" for text in texts)


def markdown(result: Mapping[str, Any]) -> str:
    """The same words and tables as Markdown."""
    command = str(result.get("command") or "").replace("```", "'''")
    parts = [
        f"# {_safe(headline(result))}\n\n{_safe(sheets.title_of(result))}.",
        *(f"> **{_safe(text)}**" for text in _warnings(result)),
        "## The question\n\n" + _bullets(f"{term}: {text}" for term, text in question(result)),
        "## Against random search\n\n" + _bullets(result["verdicts"]),
        "## Regret\n\n" + _sheet(sheets.budgets(result)),
        "## Hypervolume\n\n" + _sheet(sheets.volume(result)) if result["hypervolume"] else "",
        f"## Ranks\n\n{_safe(sheets.ranks_caption(result))}\n\n" + _sheet(sheets.ranks(result)),
        "## Relative improvement\n\n" + _improvements(result) if result["improvement"] else "",
        "## What bounds every strategy\n\n" + _bullets(sheets.ceiling(result)),
        "## Estimators" if result.get("estimators") else "",
        *(_sheet(sheet) for sheet in sheets.estimators(result)),
        "## How every number was obtained\n\n" + _bullets(sheets.hows(result)),
        f"## How to reproduce it\n\n```bash\n{command}\n```" if command else "",
        "## Notes\n\n" + _bullets(result["notes"]) if result["notes"] else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _improvements(result: Mapping[str, Any]) -> str:
    found = result["improvement"]["strategies"]
    lines = ["| strategy | relative improvement (%) |", "| --- | --- |"]
    for name in sorted(found, key=lambda n: -found[n]["mean"]):
        band = found[name]
        text = f"{band['mean']:.2f} ({band['low']:.2f} to {band['high']:.2f})"
        lines.append(f"| {_safe(name)} | {text} |")
    return _safe(sheets.improvement_caption(result)) + "\n\n" + "\n".join(lines)
