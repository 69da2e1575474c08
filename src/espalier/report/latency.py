"""The figure of the latency model: predicted against measured, on networks it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.report import numbers, plot
from espalier.report.reading import Result


def held_out(result: Result) -> list[tuple[float, float, Mapping[str, Any]]]:
    """Measured, predicted, candidate of every network held out of the calibration."""
    out = []
    rows = result.latency.get("held_out")
    for row in rows if isinstance(rows, (list, tuple)) else []:
        if not isinstance(row, Mapping):
            continue
        measured, predicted = numbers.real(row.get("measured")), numbers.real(row.get("predicted"))
        if measured is not None and predicted is not None and measured > 0:
            chosen = row.get("candidate")
            out.append((measured, predicted, chosen if isinstance(chosen, Mapping) else {}))
    return out


def latency(result: Result) -> list[dict[str, Any]]:
    """Predicted against measured latency of held-out networks, with the diagonal and ±10%."""
    rows = held_out(result)
    if not rows:
        return []
    top = max(max(m, p) for m, p, _ in rows) * 1.08
    low = min(min(m, p) for m, p, _ in rows) * 0.9
    close = [abs(p - m) <= 0.1 * m for m, p, _ in rows]
    band = {
        "type": "scatter",
        "mode": "lines",
        "name": "within 10%",
        "x": [low, top, top, low],
        "y": [low * 0.9, top * 0.9, top * 1.1, low * 1.1],
        "fill": "toself",
        "fillcolor": "@band",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    exact = {
        "type": "scatter",
        "mode": "lines",
        "name": "exact",
        "x": [low, top],
        "y": [low, top],
        "line": {"color": "@soft", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "held-out networks",
        "x": [m for m, _, _ in rows],
        "y": [p for _, p, _ in rows],
        "marker": {"size": 8, "color": ["@accent" if c else "@warn" for c in close]},
        "hoverinfo": "text",
        "hovertext": [_latency_hover(*row) for row in rows],
    }
    x = plot.axis("measured latency (ms)", "latency_ms", [low, top])
    y = plot.axis("predicted latency (ms)", "latency_ms", [low, top])
    return [
        {"label": "latency", "figure": {"data": [band, exact, points], "layout": plot.layout(x, y)}}
    ]


def _latency_hover(measured: float, predicted: float, chosen: Mapping[str, Any]) -> str:
    off = (predicted - measured) / measured
    lines = [
        f"measured {numbers.show(measured, 'latency_ms')}",
        f"predicted {numbers.show(predicted, 'latency_ms')}"
        f" ({numbers.sign(off)}{abs(off):.1%} off)",
    ]
    return plot.hover("held-out network", lines, chosen)
