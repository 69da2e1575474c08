"""Results on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

_SHOWN = 6  # names of layers that are left alone for one reason


def print_json(value: Any) -> None:
    """A value as one line of strict JSON: what is not finite is null."""
    from espalier.report.reading import plain

    print(json.dumps(plain(value), allow_nan=False))


def print_explained(rows: list[dict[str, Any]]) -> None:
    """What can be decided, and what is left alone and why."""
    from rich.table import Table

    console = Console()
    table = Table("decision", "options", "layers it changes", title_justify="left")
    for row in rows:
        if "decision" in row:
            options = ", ".join(map(str, row["options"]))
            table.add_row(row["decision"], options, ", ".join(row["layers"]))
    console.print(table)
    left: dict[tuple[str, str], list[str]] = {}  # kind and reason to layers
    for row in rows:
        if "reason" in row:
            left.setdefault((row["kind"], row["reason"]), []).extend(row["layers"])
    if left:
        table = Table("left alone", "kind", "why", title_justify="left")
        for (kind, reason), layers in left.items():
            table.add_row(_several(layers), kind, reason)
        console.print(table)


def _several(names: list[str]) -> str:
    """Names with commas; of many, the first and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names if more <= 1 else [*names[:_SHOWN], f"{more} more"])


def print_found(result: dict[str, Any], page: Path, best: str = "found (best)") -> None:
    """The answer beside the baselines, limits, notes and files."""
    from rich.table import Table

    console = Console()
    table = Table(title=result["title"], title_justify="left")
    quality = result["quality"]
    names = [quality, "latency_ms", *(x["metric"] for x in result["question"]["limits"])]
    names = list(dict.fromkeys([*names, "params", "macs"]))
    names = [name for name in names if name in result["best"]["metrics"]]
    table.add_column("network", no_wrap=True)
    for name in names:
        table.add_column(f"test {name}" if name == quality else name, justify="right")
    rows = [{**result["best"], "name": best}]
    rows += [
        {**e, "name": "found (cheaper)"} for e in result["front"] if e["id"] != result["best"]["id"]
    ]
    for row in [*rows, *result["baselines"]]:
        table.add_row(row["name"], *(shown(row["metrics"].get(name)) for name in names))
    console.print(table)
    limits = ", ".join(
        f"{x['metric']} {x['op']} {x['bound']:g}" for x in result["question"]["limits"]
    )
    console.print(
        f"limits kept as measured: {limits or 'none asked'}", highlight=False, soft_wrap=True
    )
    console.print(f"network: {result['best']['id']}", highlight=False)
    for note in [*result["verdicts"], *result["notes"]]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for name, path in result["files"].items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def shown(reading: dict[str, Any] | None) -> str:
    """A number as people read it; "-" where there is none."""
    if reading is None:
        return "-"
    value = reading["value"]
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
