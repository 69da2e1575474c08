"""The plotly figures of the page, as plain JSON.

A colour is the name of a custom property of the page's style sheet ("@accent"), put in by the
page's script, so that one figure serves the light and the dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np

from espalier.report import numbers, verdict, words
from espalier.report.reading import Entry, Result, keeps

Figure = dict[str, Any]

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Ubuntu, Cantarell, sans-serif"
_SYMBOLS = ("diamond", "square", "triangle-up", "cross", "hexagon")
_COLOURS = ("@hand", "@chance", "@third", "@soft", "@ink")
_PHASES = {"search": "search", "random": "random search"}


def figures(result: Result) -> dict[str, list[dict[str, Any]]]:
    """Every figure that the result has data for: name to views, each `{"label", "figure"}`."""
    found = {
        "front": front(result),
        "progress": progress(result),
        "latency": latency(result),
    }
    return {name: views for name, views in found.items() if views}


def _axis(title: str, metric: str, span: Sequence[float | None] = (), unit: str = "") -> Figure:
    way = numbers.kind(metric, unit)
    formats = {"share": ".0%", "count": "~s", "bytes": "~s"}
    axis: Figure = {
        "title": {"text": escape(title), "standoff": 10},
        "gridcolor": "@line",
        "linecolor": "@line",
        "zeroline": False,
        "automargin": True,
        "tickformat": formats.get(way, ""),
        "ticksuffix": "B" if way == "bytes" else "",
    }
    known = [v for v in span if v is not None]
    if len(known) == 2:
        axis["range"] = known
    return axis


def _layout(x: Figure, y: Figure, **more: Any) -> Figure:
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
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        "xaxis": x,
        "yaxis": y,
        **more,
    }


def _unit(result: Result, metric: str) -> str:
    limit = result.limit(metric)
    return result.best.unit(metric) or (limit.unit if limit else "")


def _titled(metric: str, unit: str) -> str:
    name = numbers.label(metric)
    return f"{name} (ms)" if numbers.kind(metric, unit) == "ms" else name


def _hover(head: str, lines: Iterable[str], chosen: Mapping[str, Any]) -> str:
    """A hover box: a bold head, the numbers, and the candidate wrapped to a readable width."""
    text = wrap(words.candidate(chosen), 56)
    if len(text) > 9:
        text = [*text[:9], "…"]
    body = [escape(line) for line in [*lines, *text] if line]
    return "<br>".join([f"<b>{escape(head)}</b>", *body])


def _entry_hover(result: Result, entry: Entry) -> str:
    lines = [
        f"{numbers.label(m)}: {entry.shown(m)} ({words.how(result, entry, m) or 'given'})"
        for m in dict.fromkeys([result.quality, *result.axes])
        if entry.value(m) is not None
    ]
    if keeps(result, entry) is False:
        lines.append("breaks a limit")
    return _hover(entry.name, lines, entry.candidate)


# --- the Pareto front --------------------------------------------------------------------------


def front(result: Result) -> list[dict[str, Any]]:
    """Quality against each limited cost: searched, front, chosen, baselines, the limit."""
    if result.best.value(result.quality) is None:
        return []
    return [
        {"label": numbers.label(metric), "figure": _front(result, metric)} for metric in result.axes
    ]


def _front(result: Result, metric: str) -> Figure:
    unit, quality = _unit(result, metric), result.quality
    traces = [*_searched(result, metric), *_trained(result, metric)]
    limit = result.limit(metric)
    xs = [float(x) for t in traces for x in t["x"]] + ([limit.bound] if limit else [])
    pad = 0.06 * ((max(xs) - min(xs)) or abs(max(xs)) or 1.0)
    name = f"{numbers.label(quality)}"
    layout = _layout(
        _axis(_titled(metric, unit), metric, [min(xs) - pad, max(xs) + pad], unit),
        _axis(name, quality, quality_range(result), result.best.unit(quality)),
    )
    if limit:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": limit.bound,
                "x1": limit.bound,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "@warn", "width": 1.5, "dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "x": limit.bound,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": "right",
                "showarrow": False,
                "text": f"limit {escape(numbers.show(limit.bound, metric, unit))}",
                "font": {"color": "@warn", "size": 12},
            }
        ]
    return {"data": traces, "layout": layout}


def quality_range(result: Result) -> list[float]:
    """The vertical range that keeps the trained networks legible: they, and the better part of
    what was searched. Far worse trials lie outside and are counted in the caption."""
    trained = [e.value(result.quality) for e in result.entries()]
    finals = np.array([v for v in trained if v is not None])
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
    quality, unit = result.quality, _unit(result, metric)
    for phase in dict.fromkeys(str(t.get("phase") or "search") for t in result.trials):
        rows = [t for t in result.trials if str(t.get("phase") or "search") == phase]
        rows = [t for t in rows if None not in (numbers.real(t.get(m)) for m in (metric, quality))]
        if not rows:
            continue
        name = _PHASES.get(phase, phase)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(f"tried by {name} (estimate)"),
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
    return _hover(
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
    for i, other in enumerate(result.baselines):
        if None not in (other.value(metric), other.value(result.quality)):
            mark = {"size": 11, "color": _COLOURS[i % 5], "symbol": _SYMBOLS[i % 5]}
            traces.append(_points(result, [other], metric, f"{other.name}, trained", mark))
    edge = {"width": 1.5, "color": "@paper"}
    star = {"size": 19, "color": "@accent", "symbol": "star", "line": edge}
    if result.best.value(metric) is not None:
        traces.append(_points(result, [result.best], metric, "chosen, trained", star))
    return traces


def _points(
    result: Result, entries: Sequence[Entry], metric: str, name: str, mark: Figure, **more: Any
) -> Figure:
    trace: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
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


# --- progress ----------------------------------------------------------------------------------


def progress(result: Result) -> list[dict[str, Any]]:
    """The best estimate so far, of every phase, against trials and against seconds."""
    views = []
    for key, title in (("trial", "trials"), ("seconds", "seconds of scoring")):
        traces = []
        for i, phase in enumerate(
            dict.fromkeys(str(r.get("phase") or "") for r in result.progress)
        ):
            rows = [r for r in result.progress if str(r.get("phase") or "") == phase]
            pairs = [(numbers.real(r.get(key)), numbers.real(r.get("best"))) for r in rows]
            pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
            if not pairs:
                continue
            colour = {"search": "@accent", "random": "@chance"}.get(phase, _COLOURS[i % 5])
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": escape(_PHASES.get(phase, phase) or "best"),
                    "x": [x for x, _ in pairs],
                    "y": [y for _, y in pairs],
                    "line": {"color": colour, "width": 2, "shape": "hv"},
                }
            )
        if traces:
            y = _axis(f"best estimated {numbers.label(result.quality)}", result.quality)
            y["tickformat"] = ".1%" if y["tickformat"] else ""
            figure = {"data": traces, "layout": _layout(_axis(title, "plain"), y)}
            figure["layout"]["xaxis"]["tickformat"] = ""
            views.append({"label": title, "figure": figure})
    return views


# --- predicted against measured latency ---------------------------------------------------------


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
    x = _axis("measured latency (ms)", "latency_ms", [low, top])
    y = _axis("predicted latency (ms)", "latency_ms", [low, top])
    return [
        {"label": "latency", "figure": {"data": [band, exact, points], "layout": _layout(x, y)}}
    ]


def _latency_hover(measured: float, predicted: float, chosen: Mapping[str, Any]) -> str:
    off = (predicted - measured) / measured
    lines = [
        f"measured {numbers.show(measured, 'latency_ms')}",
        f"predicted {numbers.show(predicted, 'latency_ms')}"
        f" ({numbers.sign(off)}{abs(off):.1%} off)",
    ]
    return _hover("held-out network", lines, chosen)
