"""The figure of a learned architecture: how sure each decision became, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.report import numbers, plot, words
from espalier.report.plot import Figure
from espalier.report.reading import Result

_HEAD = "decisions without parameters"


def architecture(result: Result) -> list[dict[str, Any]]:
    """The probability of each decision's final option over epochs, and how many decisions between
    operators were likeliest to take one without parameters; nothing where none was learned."""
    rows = [r for r in result.epochs if numbers.real(r.get("epoch")) is not None]
    epochs = [numbers.real(r.get("epoch")) for r in rows]
    traces = [t for name in _names(rows) if (t := _line(result, name, rows, epochs)) is not None]
    if not traces:
        return []
    x, y = plot.axis("epoch", ""), plot.axis("probability", "accuracy", (0, 1.02))
    x["tickformat"] = ""
    layout = plot.layout(x, y, showlegend=True)
    counted = [numbers.real(r.get("parameterless")) for r in rows]
    if result.operators != 0 and any(n is not None for n in counted):
        traces.append(_steps(epochs, counted))
        # to the number of such decisions, where it is known, so that a collapse fills the height
        most = result.operators or max(n for n in counted if n is not None)
        layout["yaxis2"] = {
            **plot.axis(_HEAD, "", (0, max(most, 1) * 1.02)),
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "tickmode": "linear",
            "tick0": 0,
            "dtick": max(1, -(-int(most) // 6)),
            "tickformat": "d",
        }
        layout["margin"] = {**layout["margin"], "r": 56}
    return [{"label": "epochs", "figure": {"data": traces, "layout": layout}}]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = rows[-1].get("probabilities") if rows else None
    return list(found) if isinstance(found, Mapping) else []


def _chances(row: Mapping[str, Any], name: str) -> list[float | None]:
    found = row.get("probabilities")
    chances = found.get(name) if isinstance(found, Mapping) else None
    return [numbers.real(p) for p in chances] if isinstance(chances, (list, tuple)) else []


def _line(
    result: Result, name: str, rows: Sequence[Mapping[str, Any]], epochs: Sequence[float | None]
) -> Figure | None:
    """The option that was likeliest in the end, from the first epoch on."""
    last = [-1.0 if p is None else p for p in _chances(rows[-1], name)]
    if not last:
        return None
    best = last.index(max(last))
    values = [c[best] if best < len(c) else None for c in (_chances(r, name) for r in rows)]
    options = result.options.get(name)
    known = isinstance(options, (list, tuple)) and best < len(options)
    text = f"{name} = {words.option(options[best])}" if known and options else name
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "the likeliest option of a decision",
        "legendgroup": "decisions",
        "showlegend": name == _names(rows)[0],
        "x": list(epochs),
        "y": values,
        "opacity": 0.55,
        "line": {"color": "@accent", "width": 1.5},
        "hovertemplate": f"{plot.text(text)}<br>epoch %{{x}}: %{{y:.1%}}<extra></extra>",
    }


def _steps(epochs: Sequence[float | None], counted: Sequence[float | None]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _HEAD,
        "yaxis": "y2",
        "x": list(epochs),
        "y": list(counted),
        "line": {"color": "@hand", "width": 2, "shape": "hv", "dash": "dot"},
    }
