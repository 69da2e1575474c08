"""The figure of the front: quality against each limited cost, with all that it competes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.report import numbers, plot, verdict, words
from espalier.report.plot import Figure
from espalier.report.reading import Entry, Result, keeps


def front(result: Result) -> list[dict[str, Any]]:
    """Quality against each limited cost: searched, front, chosen, baselines, the limit."""
    if result.best.value(result.quality) is None:
        return []
    return [
        {"label": numbers.label(metric), "figure": _front(result, metric)} for metric in result.axes
    ]


def _front(result: Result, metric: str) -> Figure:
    unit, quality = plot.unit_of(result, metric), result.quality
    traces = [*_searched(result, metric), *_trained(result, metric)]
    limit = result.limit(metric)
    xs = [float(x) for t in traces for x in t["x"]] + ([limit.bound] if limit else [])
    pad = 0.06 * ((max(xs) - min(xs)) or abs(max(xs)) or 1.0)
    name = f"{numbers.label(quality)}"
    layout = plot.layout(
        plot.axis(plot.titled(metric, unit), metric, [min(xs) - pad, max(xs) + pad], unit),
        plot.axis(name, quality, quality_range(result), result.best.unit(quality)),
        **plot.limit_line(result, metric),
    )
    return {"data": traces, "layout": layout}


def quality_range(result: Result) -> list[float]:
    """The vertical range that keeps the trained networks legible: they with their errors, and the
    better part of what was searched. Far worse trials lie outside and are counted in the caption."""
    trained = [
        (value, verdict.noise(result, e) or 0.0)
        for e in result.entries()
        if (value := e.value(result.quality)) is not None
    ]
    finals = np.array([[value - error, value + error] for value, error in trained])
    trials = np.array([t for t in searched_values(result) if t is not None])
    low, high = float(finals.min()), float(finals.max())
    if len(trials):
        worse = float(np.quantile(trials, 0.2 if result.rising else 0.8))
        best = float(trials.max() if result.rising else trials.min())
        low, high = min(low, worse, best), max(high, worse, best)
    pad = 0.07 * ((high - low) or 0.02)
    return [low - pad, high + pad]


def searched_values(result: Result) -> list[float | None]:
    """The estimated quality of every trial, None where it has none."""
    return [numbers.real(t.get(result.quality)) for t in result.trials]


def outside(result: Result) -> int:
    """How many trials lie outside the vertical range of the front's figure."""
    if result.best.value(result.quality) is None:
        return 0
    low, high = quality_range(result)
    return sum(v is not None and not low <= v <= high for v in searched_values(result))


def _searched(result: Result, metric: str) -> list[Figure]:
    traces = []
    quality, unit = result.quality, plot.unit_of(result, metric)
    for phase in dict.fromkeys(str(t.get("phase") or "search") for t in result.trials):
        rows = [t for t in result.trials if str(t.get("phase") or "search") == phase]
        rows = [t for t in rows if None not in (numbers.real(t.get(m)) for m in (metric, quality))]
        if not rows:
            continue
        name = words.PHASES.get(phase, phase)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plot.text(f"tried by {name} (estimate)"),
                "x": [numbers.real(t[metric]) for t in rows],
                "y": [numbers.real(t[quality]) for t in rows],
                "marker": {
                    "size": 5,
                    "opacity": 0.4,
                    "color": "@chance" if phase == "random" else "@trial",
                    "symbol": "square" if phase == "random" else "circle",
                },
                "hoverinfo": "text",
                "hovertext": [_trial_hover(t, name, quality, metric, unit) for t in rows],
            }
        )
    return traces


def _trial_hover(trial: Mapping[str, Any], phase: str, quality: str, metric: str, unit: str) -> str:
    chosen = trial.get("candidate")
    lines = [
        f"estimated {numbers.label(quality)}: {numbers.show(trial[quality], quality)}",
        f"{numbers.label(metric)}: {numbers.show(trial[metric], metric, unit)}",
        "breaks a limit" if (numbers.real(trial.get("violation")) or 0) > 0 else "",
    ]
    return plot.hover(
        f"trial {trial.get('id', '')} of {phase}",
        lines,
        chosen if isinstance(chosen, Mapping) else {},
    )


def _trained(result: Result, metric: str) -> list[Figure]:
    own = [e for e in result.entries() if e not in result.baselines]
    own = [e for e in own if None not in (e.value(metric), e.value(result.quality))]
    own.sort(key=lambda e: e.value(metric) or 0.0)
    traces = []
    if len(own) > 1:
        line = {"color": "@accent", "width": 1.5, "shape": "hv"}
        mark = {"size": 9, "color": "@accent", "symbol": "circle"}
        traces.append(
            _points(result, own, metric, "front, trained", mark, mode="lines+markers", line=line)
        )
    for other in result.baselines:
        if None not in (other.value(metric), other.value(result.quality)):
            colour, symbol = plot.mark_of(result, other.name)
            mark = {"size": 11, "color": colour, "symbol": symbol}
            traces.append(
                _points(result, [other], metric, f"{other.name}{_trained_word(result)}", mark)
            )
    edge = {"width": 1.5, "color": "@paper"}
    star = {"size": 19, "color": "@accent", "symbol": "star", "line": edge}
    if result.best.value(metric) is not None:
        traces.append(
            _points(result, [result.best], metric, f"chosen{_trained_word(result)}", star)
        )
    return traces


def _trained_word(result: Result) -> str:
    return "" if result.shrink else ", trained"


def _points(
    result: Result, entries: Sequence[Entry], metric: str, name: str, mark: Figure, **more: Any
) -> Figure:
    trace: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": plot.text(name),
        "x": [e.value(metric) for e in entries],
        "y": [e.value(result.quality) for e in entries],
        "marker": mark,
        "hoverinfo": "text",
        "hovertext": [_entry_hover(result, e) for e in entries],
        **more,
    }
    errors = [verdict.noise(result, e) for e in entries]
    if name != "front, trained" and None not in errors:
        bars = {"type": "data", "array": errors, "thickness": 1, "width": 3, "color": mark["color"]}
        trace["error_y"] = bars
    return trace


def _entry_hover(result: Result, entry: Entry) -> str:
    lines = [
        f"{numbers.label(m)}: {entry.shown(m)} ({words.how(result, entry, m) or 'given'})"
        for m in dict.fromkeys([result.quality, *result.axes])
        if entry.value(m) is not None
    ]
    if keeps(result, entry) is False:
        lines.append("breaks a limit")
    return plot.hover(entry.name, lines, entry.candidate)
