"""What the figures of the page share: axes, layout, hover boxes, colours.

Figures are plain plotly JSON. A colour is the name of a custom property of the page's style sheet
("@accent"), put in by the page's script, so that one figure serves the light and the dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

from espalier.report import numbers, words
from espalier.report.reading import Result

Figure = dict[str, Any]

COLOURS = ("@hand", "@chance", "@third", "@soft", "@ink")
SYMBOLS = ("diamond", "square", "triangle-up", "cross", "hexagon")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Ubuntu, Cantarell, sans-serif"


def text(plain: str) -> str:
    """Text for a figure that no one reads as markup or as mathematics."""
    return escape(plain).replace("$", "&#36;")


def axis(title: str, metric: str, span: Sequence[float] = (), unit: str = "") -> Figure:
    """An axis with ticks in the metric's own way: per cent, k and M, bytes."""
    way = numbers.kind(metric, unit)
    fine = len(span) == 2 and span[1] - span[0] < 0.06
    formats = {"share": ".1%" if fine else ".0%", "count": "~s", "bytes": "~s"}
    out: Figure = {
        "title": {"text": text(title), "standoff": 10},
        "gridcolor": "@line",
        "linecolor": "@line",
        "zeroline": False,
        "automargin": True,
        "tickformat": formats.get(way, ""),
        "ticksuffix": "B" if way == "bytes" else "",
    }
    if span:
        out["range"] = list(span)
    return out


def layout(x: Figure, y: Figure, **more: Any) -> Figure:
    """A quiet layout: no background, thin grid, the legend below."""
    return {
        "font": {"family": _FONT, "size": 13, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 26, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@paper",
            "bordercolor": "@line",
            "align": "left",
            "font": {"family": _FONT, "size": 12, "color": "@ink"},
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": -0.2,
            "yanchor": "top",
            "itemsizing": "constant",
        },
        "xaxis": x,
        "yaxis": y,
        **more,
    }


def mark_of(result: Result, name: str) -> tuple[str, str]:
    """The colour and the symbol of a network, the same in every figure: a star for the answer."""
    names = [e.name for e in result.baselines]
    place = names.index(name) if name in names else -1
    return ("@accent", "star") if place < 0 else (COLOURS[place % 5], SYMBOLS[place % 5])


def limit_line(result: Result, metric: str) -> Figure:
    """What a layout has of a limit: a broken line and its value; nothing where there is none."""
    limit = result.limit(metric)
    if limit is None:
        return {}
    line = {"color": "@warn", "width": 1.5, "dash": "dash"}
    place = {"x0": limit.bound, "x1": limit.bound, "y0": 0, "y1": 1, "yref": "paper"}
    told = f"limit {numbers.show(limit.bound, metric, unit_of(result, metric))}"
    note = {
        "x": limit.bound, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right",
        "showarrow": False, "text": text(told), "font": {"color": "@warn", "size": 12},
    }  # fmt: skip
    return {"shapes": [{"type": "line", **place, "line": line}], "annotations": [note]}


def unit_of(result: Result, metric: str) -> str:
    """The unit of a metric, from the chosen network or from its limit."""
    limit = result.limit(metric)
    return result.best.unit(metric) or (limit.unit if limit else "")


def titled(metric: str, unit: str) -> str:
    """An axis title: the metric, with its unit where the ticks do not show it."""
    name = numbers.label(metric)
    return f"{name} (ms)" if numbers.kind(metric, unit) == "ms" else name


def hover(head: str, lines: Iterable[str], chosen: Mapping[str, Any]) -> str:
    """A hover box: a bold head, the numbers, and the candidate wrapped to a readable width."""
    wrapped = wrap(words.candidate(chosen), 56)
    if len(wrapped) > 9:
        wrapped = [*wrapped[:9], "…"]
    body = [text(line) for line in [*lines, *wrapped] if line]
    return "<br>".join([f"<b>{text(head)}</b>", *body])
