"""What the report of a shrink has beside that of a search: spent, harmed, repaired, tightened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from espalier.report import numbers, plot, words
from espalier.report.plot import Figure
from espalier.report.reading import Result, mapping, rows


@dataclass(frozen=True)
class Part:
    """One layer's cost: what is left of what it was, as text, and both as shares of the largest."""

    text: str
    was: float
    now: float


@dataclass(frozen=True)
class Layer:
    """One layer and its part of each limited cost."""

    name: str
    parts: tuple[Part | None, ...]


def spent(result: Result) -> tuple[list[str], list[Layer]]:
    """Headings (the limited costs) and a row a layer, in the order of the network."""
    table = rows(result.shrink.get("spent"))
    metrics = list(dict.fromkeys(str(r.get("metric")) for r in table))
    layers: dict[str, dict[str, tuple[float, float]]] = {}
    for row in table:
        before, after = numbers.real(row.get("original")), numbers.real(row.get("spent"))
        if before is not None and after is not None:
            layers.setdefault(str(row.get("layer")), {})[str(row.get("metric"))] = before, after
    most = {
        m: max((v for parts in layers.values() for v in parts.get(m, (0.0, 0.0))), default=0.0)
        for m in metrics
    }
    return [_total(result, m, layers) for m in metrics], [
        Layer(name, tuple(_part(result, m, parts.get(m), most[m]) for m in metrics))
        for name, parts in layers.items()
    ]


def _total(result: Result, metric: str, layers: Mapping[str, Any]) -> str:
    """The heading of a cost: its name, and the whole as predicted or counted."""
    pairs = [parts[metric] for parts in layers.values() if metric in parts]
    before, after = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    unit = plot.unit_of(result, metric)
    way = result.best.reading(metric).get("how")
    told = " predicted" if way == "measured" else ""
    shown = numbers.show(after, metric, unit, like=before)
    return f"{numbers.label(metric)}:{told} {shown} of {numbers.show(before, metric, unit)}"


def _part(
    result: Result, metric: str, pair: tuple[float, float] | None, most: float
) -> Part | None:
    if pair is None:
        return None
    before, after = pair
    unit = plot.unit_of(result, metric)
    text = numbers.show(after, metric, unit, digits=2)
    share = f" ({after / before:.0%})" if before > 0 else ""
    if after == 0 and before > 0:
        text, share = "gone", ""
    return Part(text + share, before / (most or 1.0), after / (most or 1.0))


@dataclass(frozen=True)
class Option:
    """One option of a decision: its harm and what it saves, as text and as shares in 0..1."""

    option: str
    harm: str
    saved: str
    harm_bar: float
    saved_bar: float
    chosen: bool


def sensitivity(result: Result) -> list[tuple[str, list[Option]]]:
    """A decision and its options, the one that can do most harm first."""
    table = [r for r in rows(result.shrink.get("sensitivity")) if r.get("decision") is not None]
    metric = result.axes[0] if result.axes else ""
    harms = [numbers.real(r.get("harm")) or 0.0 for r in table]
    worst = max(harms, default=0.0) or 1.0
    named = [(str(n), list(g)) for n, g in groupby(table, key=lambda r: r["decision"])]
    named.sort(key=lambda item: -max(numbers.real(r.get("harm")) or 0.0 for r in item[1]))
    return [(name, [_option(r, metric, worst) for r in group]) for name, group in named]


def _option(row: Mapping[str, Any], metric: str, worst: float) -> Option:
    harm = numbers.real(row.get("harm"))
    saved = numbers.real(mapping(row.get("saved")).get(metric))
    return Option(
        words.option(row.get("option")),
        numbers.DASH if harm is None else numbers.significant(harm, 2),
        numbers.DASH if saved is None else f"{saved:.1%}",
        min(max((harm or 0.0) / worst, 0.0), 1.0),
        min(max(saved or 0.0, 0.0), 1.0),
        bool(row.get("chosen")),
    )


def stages(result: Result) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings (the stages of repair) and, a network a row, the validation quality after each."""
    table = rows(result.shrink.get("repair"))
    heads = list(dict.fromkeys(str(s.get("stage")) for r in table for s in rows(r.get("stages"))))
    out = []
    for row in table:
        found = {str(s.get("stage")): s for s in rows(row.get("stages"))}
        cells = [_stage(result, found.get(head)) for head in heads]
        seconds = max((numbers.real(s.get("seconds")) or 0.0 for s in found.values()), default=0.0)
        out.append((str(row.get("name")), [*cells, numbers.duration(seconds)]))
    return [*heads, "time"], out


def _stage(result: Result, stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return numbers.DASH
    text = numbers.show(stage.get("quality"), result.quality, result.best.unit(result.quality))
    return text if stage.get("kept") else f"{text}, not kept"


def rounds(result: Result) -> list[tuple[str, str, str, str]]:
    """Every measurement on the way to the limit: for whom, predicted, measured, kept or not."""
    return [
        (
            str(r.get("name")),
            numbers.show(r.get("predicted"), "latency_ms"),
            numbers.show(r.get("measured"), "latency_ms"),
            "keeps" if r.get("kept") else "breaks",
        )
        for r in rows(result.shrink.get("rounds"))
    ]


def ignored(result: Result) -> list[tuple[str, str, str]]:
    """Layers that were left alone: layer, kind of decision, why."""
    return [
        (str(r.get("layer")), str(r.get("kind")), str(r.get("reason")))
        for r in rows(result.shrink.get("ignored"))
    ]


def repair(result: Result) -> list[dict[str, Any]]:
    """Validation quality against measured latency (or the first limited cost), before and after
    repair, with the original and the limit."""
    table = rows(result.shrink.get("repair"))
    timed = any(row.get("latency_ms") is not None for row in table)
    metric = "latency_ms" if timed or not result.axes else result.axes[0]
    traces = [trace for row in table if (trace := _path(result, row, metric))]
    if not traces:
        return []
    xs = [trace["x"][0] for trace in traces]
    original = mapping(mapping(result.shrink.get("original")).get("metrics"))
    given = {
        "name": "the original",
        metric: mapping(original.get(metric)).get("value"),
        "stages": [
            {
                "stage": "as given",
                "quality": mapping(original.get(f"{result.quality}_validation")).get("value"),
                "kept": True,
            }
        ],
    }
    if trace := _path(result, given, metric):
        traces.append({**trace, "mode": "markers"})
        xs += trace["x"]
    limit = result.limit(metric)
    xs += [limit.bound] if limit else []
    pad = 0.08 * ((max(xs) - min(xs)) or max(xs) or 1.0)
    span = [max(min(xs) - pad, 0.0), max(xs) + pad]
    name = f"validation {numbers.label(result.quality)}"
    unit = result.best.unit(result.quality)
    title = plot.titled(metric, plot.unit_of(result, metric))
    title = "measured latency (ms)" if metric == "latency_ms" else title
    layout = plot.layout(
        plot.axis(title, metric, span, plot.unit_of(result, metric)),
        plot.axis(name, result.quality, (), unit),
        **plot.limit_line(result, metric),
    )
    label = numbers.label(metric)
    return [{"label": label, "figure": {"data": traces, "layout": layout}}]


def _path(result: Result, row: Mapping[str, Any], metric: str) -> Figure | None:
    """One network as a line from what it was when cut to what it is; stages that were not kept are
    in the table alone."""
    x, name = numbers.real(row.get(metric)), str(row.get("name"))
    found = [
        (str(s.get("stage")), numbers.real(s.get("quality")))
        for s in rows(row.get("stages"))
        if s.get("kept")
    ]
    known = [(stage, y) for stage, y in found if y is not None]
    if x is None or not known:
        return None
    colour, symbol = plot.mark_of(result, name)
    large = 17 if symbol == "star" else 12
    before = len(known) - 1
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot.text(name),
        "x": [x] * len(known),
        "y": [y for _, y in known],
        "line": {"color": colour, "width": 1.5},
        "marker": {
            "size": [9] * before + [large],
            "color": colour,
            "opacity": 1,
            "symbol": [f"{symbol}-open"] * before + [symbol],
        },
        "hoverinfo": "text",
        "hovertext": [_told(result, metric, name, stage, x, y) for stage, y in known],
    }


def _told(result: Result, metric: str, name: str, stage: str, x: float, y: float) -> str:
    shown = numbers.show(y, result.quality, result.best.unit(result.quality))
    lines = [
        f"{stage}: {shown} validation {numbers.label(result.quality)}",
        numbers.show(x, metric, plot.unit_of(result, metric)),
    ]
    return plot.hover(name, lines, {})
