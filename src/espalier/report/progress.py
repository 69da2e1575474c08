"""The figure of progress: the best estimate so far, of every phase."""

from __future__ import annotations

from typing import Any

from espalier.report import numbers, plot, words
from espalier.report.plot import Figure
from espalier.report.reading import Result


def progress(result: Result) -> list[dict[str, Any]]:
    """The best estimate so far, of every phase, against trials and against seconds."""
    views = []
    for key, title in (("trial", "trials"), ("seconds", "seconds of scoring")):
        traces = _lines(result, key)
        if traces:
            x = plot.axis(title, "")
            x["tickformat"] = ""
            y = plot.axis(f"best estimated {numbers.label(result.quality)}", result.quality)
            y["tickformat"] = ".1%" if y["tickformat"] else ""
            figure = {"data": traces, "layout": plot.layout(x, y)}
            views.append({"label": title, "figure": figure})
    return views


def _lines(result: Result, key: str) -> list[Figure]:
    """A stepped line a phase."""
    phases = list(dict.fromkeys(str(row.get("phase") or "") for row in result.progress))
    traces: list[Figure] = []
    for i, phase in enumerate(phases):
        rows = [row for row in result.progress if str(row.get("phase") or "") == phase]
        pairs = [(numbers.real(row.get(key)), numbers.real(row.get("best"))) for row in rows]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not known:
            continue
        colour = {"search": "@accent", "random": "@chance"}.get(phase, plot.COLOURS[i % 5])
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": plot.text(words.PHASES.get(phase, phase) or "best"),
            "x": [x for x, _ in known],
            "y": [y for _, y in known],
            "line": {"color": colour, "width": 2, "shape": "hv"},
        }
        traces.append(trace)
    return traces
