"""The figures of a race: plotly JSON, drawn by the report's own script in its own colours."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any

from espalier.bench.entrants import BASELINE
from espalier.bench.verdicts import unit_name
from espalier.report import plot

Figure = dict[str, Any]

# legible on a light and on a dark page, told apart by the colour-blind with the dashes
_COLOURS = (
    (31, 140, 95), (199, 125, 28), (140, 80, 160), (200, 70, 70), (40, 150, 170),
    (120, 140, 40), (90, 90, 200), (190, 90, 140), (110, 110, 110), (150, 100, 60),
)  # fmt: skip
_RANDOM = (70, 110, 190)
_DASHES = ("solid", "dash", "dot", "dashdot")


def colour(name: str, names: list[str], opacity: float = 1.0) -> str:
    """The colour of a strategy: random search always the same."""
    others = [n for n in names if n != BASELINE]
    rgb = _RANDOM if name == BASELINE else _COLOURS[others.index(name) % len(_COLOURS)]
    return f"rgba({rgb[0]},{rgb[1]},{rgb[2]},{opacity:g})"


def figures(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name of a figure to its views, each `{"label", "figure"}`; no data, no figure."""
    found = {
        "regret": _regret(result),
        "volume": _volume(result),
        "ranks": _ranks(result),
        "improvement": _improvement(result),
    }
    return {name: views for name, views in found.items() if views}


def _regret(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    unit = unit_name(result["unit"])
    title = f"mean test regret{f' ({unit})' if unit else ''}"
    views = [
        # the first queries lose so much that on a linear scale all that follows is one line
        _view("over queries, log scale", result["curves"], "queries", "queries", title, log=True),
        _view("over queries", result["curves"], "queries", "queries", title),
    ]
    if result["time"]:
        known = result["seconds_known"]
        label = "virtual seconds" if known else "virtual time (a query is 1)"
        views.append(_view("over virtual time", result["time"], "seconds", label, title))
    floor = result["ceiling"]["regret"]
    if floor > 0:
        for view in views:
            _line(view["figure"], floor, "chosen by validation, no better")
    return views


def _volume(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not result["hypervolume"]:
        return []
    title = "share of the table's hypervolume"
    return [_view("over queries", result["hypervolume"], "queries", "queries", title)]


def _view(
    label: str, curves: Mapping[str, Any], x: str, x_title: str, y_title: str, log: bool = False
) -> dict[str, Any]:
    names = list(curves)
    data: list[Figure] = []
    for name, curve in curves.items():
        xs = curve[x]
        low, high = curve["low"], curve["high"]
        if log:
            least = min((v for v in curve["mean"] if v > 0), default=1e-6) / 3
            low = [max(v, least) for v in low]
        data.append(
            {
                "type": "scatter", "mode": "lines", "x": [*xs, *xs[::-1]],
                "y": [*high, *low[::-1]], "fill": "toself", "line": {"width": 0},
                "fillcolor": colour(name, names, 0.13), "hoverinfo": "skip",
                "showlegend": False, "legendgroup": name,
            }
        )  # fmt: skip
    for i, (name, curve) in enumerate(curves.items()):
        shown = [v if v > 0 or not log else None for v in curve["mean"]]
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": plot.text(name), "x": curve[x],
                "y": shown, "legendgroup": name,
                "line": {
                    "color": colour(name, names), "width": 2,
                    "dash": _DASHES[(i // len(_COLOURS)) % len(_DASHES)],
                },
                "hovertemplate": f"<b>{plot.text(name)}</b><br>%{{y:.4g}} at %{{x:.4g}}<extra></extra>",
            }
        )  # fmt: skip
    bottom, side = plot.axis(x_title, "", (), "x"), plot.axis(y_title, "", (), "x")
    if log:
        side["type"] = "log"
    return {"label": label, "figure": {"data": data, "layout": plot.layout(bottom, side)}}


def _line(figure: Figure, at: float, label: str) -> None:
    """A dashed line that no strategy can get below."""
    log = figure["layout"]["yaxis"].get("type") == "log"
    figure["layout"]["shapes"] = [
        {
            "type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": at, "y1": at,
            "line": {"color": "@warn", "width": 1.2, "dash": "dash"},
        }
    ]  # fmt: skip
    figure["layout"]["annotations"] = [
        {
            "x": 1, "xref": "paper", "xanchor": "right", "y": log10(at) if log else at,
            "yanchor": "bottom", "showarrow": False, "text": plot.text(label),
            "font": {"color": "@warn", "size": 12},
        }
    ]  # fmt: skip


def _ranks(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    mean = result["ranks"]["mean"]
    if len(mean) < 2:
        return []
    names = sorted(mean, key=lambda n: -mean[n])
    critical = result["ranks"]["critical_difference"]
    dots: Figure = {
        "type": "scatter", "mode": "markers", "showlegend": False,
        "x": [mean[n] for n in names], "y": [plot.text(n) for n in names],
        "marker": {"size": 10, "color": [colour(n, list(result["curves"])) for n in names]},
        "hovertemplate": "%{y}: mean rank %{x:.2f}<extra></extra>",
    }  # fmt: skip
    if critical:
        dots["error_x"] = {
            "type": "data", "array": [critical / 2] * len(names), "thickness": 1, "width": 4,
            "color": "@soft",
        }  # fmt: skip
    x = plot.axis("mean rank (1 is best)", "", (), "x")
    y = plot.axis("", "", (), "x")
    return [{"label": "ranks", "figure": {"data": [dots], "layout": plot.layout(x, y)}}]


def _improvement(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = result["improvement"].get("strategies")
    if not found:
        return []
    names = sorted(found, key=lambda n: found[n]["mean"])
    bars: Figure = {
        "type": "bar", "orientation": "h", "showlegend": False,
        "x": [found[n]["mean"] for n in names], "y": [plot.text(n) for n in names],
        "marker": {"color": [colour(n, list(result["curves"]), 0.75) for n in names]},
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": "@ink",
            "array": [found[n]["high"] - found[n]["mean"] for n in names],
            "arrayminus": [found[n]["mean"] - found[n]["low"] for n in names],
        },
        "hovertemplate": "%{y}: %{x:.2f}%<extra></extra>",
    }  # fmt: skip
    x = plot.axis("relative improvement over the average network (%)", "", (), "x")
    y = plot.axis("", "", (), "x")
    return [{"label": "improvement", "figure": {"data": [bars], "layout": plot.layout(x, y)}}]
