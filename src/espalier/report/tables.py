"""The tables of a report as plain rows of text, shared by the page and the Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from espalier.report import numbers, verdict, words
from espalier.report.reading import Entry, Result, keeps

_SHOWN = ("latency_ms", "latency_ms_predicted", "params", "macs")


@dataclass(frozen=True)
class Tile:
    """One key number: its text, what it is of, and how full its limit is (0..1, or None)."""

    value: str
    label: str
    note: str
    full: float | None
    kept: bool | None


def tiles(result: Result) -> list[Tile]:
    """The quality and every limited cost (without limits: the usual costs)."""
    best, quality = result.best, result.quality
    out = []
    error = verdict.noise(result, best)
    note = words.how(result, best, quality)
    if error is not None:
        note += f"; standard error {error * 100:.1f} points"
    if best.value(quality) is not None:
        split = str(best.reading(quality).get("split") or "")
        name = f"{split} {numbers.label(quality)}".strip()
        out.append(Tile(best.shown(quality), name, note, None, None))
    for metric in result.axes:
        out.append(_tile(result, metric))
    return out


def _tile(result: Result, metric: str) -> Tile:
    best, limit = result.best, result.limit(metric)
    note = words.how(result, best, metric)
    spread = words.spread(best, metric)
    if spread:
        note = f"{note}, {spread}"
    if limit is None:
        return Tile(best.shown(metric), numbers.label(metric), note, None, None)
    value, unit = best.value(metric), best.unit(metric) or limit.unit
    mine, bound = numbers.against(value, limit.bound, metric, unit)
    word = "at least" if limit.op.startswith(">") else "of"
    full = None if value is None else min(max(value / limit.bound, 0.0), 1.0)
    return Tile(mine, f"{numbers.label(metric)}, {word} {bound}", note, full, limit.kept(value))


def readings(result: Result) -> list[tuple[str, str, str]]:
    """Every number of the chosen network: metric, value with its spread, how it was obtained."""
    best = result.best
    return [
        (
            numbers.label(m),
            " ".join(t for t in (best.shown(m), words.spread(best, m)) if t),
            words.how(result, best, m) or numbers.DASH,
        )
        for m in best.metrics
    ]


@dataclass(frozen=True)
class Row:
    """One network of the comparison."""

    role: str
    name: str
    cells: tuple[str, ...]
    kept: str
    start: str
    candidate: str

    @property
    def part(self) -> str:
        """The part of the table that the row stands in."""
        return "the baselines" if self.role == "baseline" else "the answer and the front"


def comparison(result: Result) -> tuple[list[str], list[Row]]:
    """Headings and rows: the chosen network, the rest of the front, the baselines."""
    entries = result.entries()
    quality = result.quality
    names = [quality, f"{quality}_validation", f"{quality}_estimated"]
    names += dict.fromkeys([*result.axes[:1], *_SHOWN[:2], *result.axes, *_SHOWN])
    names = [m for m in names if any(e.value(m) is not None for e in entries)]
    heads = [_heading(result, m) for m in names]
    rows = []
    for entry in entries:
        role = "chosen" if entry is result.best else ""
        role = role or ("baseline" if entry in result.baselines else "front")
        kept = {True: "yes", False: "no", None: numbers.DASH}[keeps(result, entry)]
        cells = tuple(_cell(result, entry, m) for m in names)
        start = entry.start or numbers.DASH
        rows.append(Row(role, entry.name, cells, kept, start, words.candidate(entry.candidate)))
    return heads, rows


def _heading(result: Result, metric: str) -> str:
    name = numbers.label(metric)
    split = str(result.best.reading(metric).get("split") or "")
    return f"{split} {name}" if metric == result.quality and split else name


def _cell(result: Result, entry: Entry, metric: str) -> str:
    if metric != result.quality:
        return entry.shown(metric)
    error = verdict.noise(result, entry)
    return entry.shown(metric) + (f" ± {error * 100:.1f}" if error is not None else "")


@dataclass(frozen=True)
class Effect:
    """What one option does: differences from the mean of all, as text and as bars in -1..1."""

    option: str
    n: str
    accuracy: str
    cost: str
    accuracy_bar: float
    cost_bar: float


def effects(result: Result) -> list[tuple[str, list[Effect]]]:
    """A decision and its options' effects, the most influential decision first."""
    rows = [r for r in result.decisions if r.get("decision") is not None]
    most = {k: max([abs(numbers.real(r.get(k)) or 0.0) for r in rows] or [0.0]) for k in _EFFECTS}
    metric = result.axes[0] if result.axes else ""
    unit = result.best.unit(metric)
    named = [(str(name), list(group)) for name, group in groupby(rows, key=lambda r: r["decision"])]
    named.sort(key=lambda item: -_range(item[1]))
    return [
        (name, [_effect(r, most, result, metric, unit) for r in group]) for name, group in named
    ]


_EFFECTS = ("accuracy", "cost")


def _range(rows: list[Mapping[str, Any]]) -> float:
    values = [numbers.real(r.get("accuracy")) or 0.0 for r in rows]
    return max(values) - min(values)


def _effect(
    row: Mapping[str, Any], most: Mapping[str, float], result: Result, metric: str, unit: str
) -> Effect:
    bars = {k: (numbers.real(row.get(k)) or 0.0) / (most[k] or 1.0) for k in _EFFECTS}
    quality_unit = result.best.unit(result.quality)
    return Effect(
        words.option(row.get("option")),
        numbers.whole(row.get("n")),
        numbers.change(row.get("accuracy"), result.quality, quality_unit),
        numbers.change(row.get("cost"), metric, unit, like=most["cost"]),
        bars["accuracy"],
        bars["cost"],
    )


def counts(result: Result) -> str:
    """How many trials each phase of the progress had: "75 by search, 75 by random search"."""
    most: dict[str, float] = {}
    for row in result.progress:
        phase, trial = str(row.get("phase") or "search"), numbers.real(row.get("trial"))
        most[phase] = max(most.get(phase, 0.0), trial or 0.0)
    return ", ".join(f"{numbers.whole(n)} by {words.PHASES.get(p, p)}" for p, n in most.items())


def seconds(result: Result) -> list[tuple[str, str, float]]:
    """Where the time went: phase, text, share of the whole; phases in the order given."""
    known = {
        k: numbers.real(v) for k, v in result.seconds.items() if k not in ("total", "this_run")
    }
    spent = {k: v for k, v in known.items() if v}
    whole = sum(spent.values()) or 1.0
    return [(k.replace("_", " "), numbers.duration(v), v / whole) for k, v in spent.items()]


def trust(result: Result) -> str:
    """One sentence on the latency model's error on networks it was not calibrated on, or ''."""
    error = result.latency
    n = len(error["held_out"]) if isinstance(error.get("held_out"), (list, tuple)) else 0
    parts = []
    if numbers.real(error.get("spearman")) is not None:
        parts.append(f"Spearman rank correlation {error['spearman']:.2f}")
    if numbers.real(error.get("within_10_percent")) is not None:
        parts.append(f"{error['within_10_percent']:.0%} within 10% of the measurement")
    if not parts:
        return ""
    return f"On {n or 'the'} held-out networks: {', '.join(parts)}."
