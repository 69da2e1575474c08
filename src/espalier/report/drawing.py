"""Where everything goes in the drawing of a network: maps as slabs, their costs as bars below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from espalier.report import numbers
from espalier.report.layers import COSTS, KINDS, Layer, Stage, total

_LEFT, _RIGHT, _TOP, _TALL = 92.0, 12.0, 24.0, 128.0
_GAP, _STAGE_GAP, _TRACK, _LETTER = 3.0, 16.0, 44.0, 6.6
_WIDE = 940.0


@dataclass(frozen=True)
class Slab:
    """One layer: the rectangle of its output map, its bars `(y, height)`, its words."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    kernel: str
    title: str
    bars: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Column:
    """One stage: where its slabs stand and what is written under them."""

    x: float
    width: float
    lines: tuple[str, ...]
    slabs: tuple[Slab, ...]

    @property
    def middle(self) -> float:
        """The horizontal middle."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Track:
    """One row of cost bars: its label, its total, and the line its bars stand on."""

    label: str
    total: str
    y: float


@dataclass(frozen=True)
class Drawing:
    """The whole picture, in user units of an SVG."""

    width: float
    height: float
    axis: float
    left: float
    columns: tuple[Column, ...]
    tracks: tuple[Track, ...]
    most: dict[str, float]  # the largest share of a layer, for every cost that is drawn
    kinds: tuple[tuple[str, str], ...]
    words: str
    lines_y: tuple[float, ...]


def draw(stages: Sequence[Stage]) -> Drawing | None:
    """Lays out the stages from left to right; None when there is nothing to draw."""
    layers = [x for stage in stages for x in stage.layers]
    if not layers:
        return None
    widths = _widths(stages)
    axis = _TOP + _TALL / 2
    under = _TOP + _TALL
    lines_y = (under + 20, under + 35, under + 50)
    costs = [c for c in COSTS if total(stages, c)]
    floors = [lines_y[-1] + 8 + _TRACK * (i + 1) for i in range(len(costs))]
    columns, x = [], _LEFT
    for stage, slabs in zip(stages, widths, strict=True):
        column = _column(stage, slabs, x, axis, list(zip(costs, floors, strict=True)), layers)
        columns.append(column)
        x += column.width + _STAGE_GAP
    tracks = tuple(
        Track(numbers.label(c), numbers.show(total(stages, c), c), y)
        for c, y in zip(costs, floors, strict=True)
    )
    used = dict.fromkeys(layer.kind for layer in layers)
    return Drawing(
        width=max(x - _STAGE_GAP + _RIGHT, 480.0),
        height=(floors[-1] if floors else lines_y[-1]) + 10,
        axis=axis,
        left=_LEFT,
        columns=tuple(columns),
        tracks=tracks,
        most={c: _most(layers, c) for c in costs},
        kinds=tuple((k, KINDS[k]) for k in KINDS if k in used),
        words=_words(stages),
        lines_y=lines_y,
    )


def _widths(stages: Sequence[Stage]) -> list[list[float]]:
    """Slab widths: by the square root of the channels, shrunk or stretched to fill the page."""
    most = max(x.channels for stage in stages for x in stage.layers)
    raw = [[5 + 33 * (x.channels / most) ** 0.5 for x in stage.layers] for stage in stages]
    room = _WIDE - _LEFT - _RIGHT - _STAGE_GAP * (len(stages) - 1)
    room -= sum(_GAP * (len(stage.layers) - 1) for stage in stages)
    scale = min(max(room / sum(map(sum, raw)), 0.35), 1.8)
    return [[max(w * scale, 5.0) for w in slabs] for slabs in raw]


def _captions(stage: Stage, room: float) -> tuple[str, ...]:
    last = stage.layers[-1]
    letters = max(int(room / _LETTER), 9)
    name = stage.name if len(stage.name) <= letters else stage.name[: letters - 1] + "…"
    size = f"{last.side}×{last.out[2] if len(last.out) > 2 else last.side}"
    return (name, f"{last.channels} ch" if last.side > 1 else str(last.channels), size)


def _column(
    stage: Stage,
    widths: list[float],
    x: float,
    axis: float,
    floors: list[tuple[str, float]],
    everyone: list[Layer],
) -> Column:
    inner = sum(widths) + _GAP * (len(widths) - 1)
    captions = _captions(stage, inner)
    width = max(inner, max(map(len, captions)) * _LETTER)
    at = x + (width - inner) / 2
    tallest = max(layer.side for layer in everyone)
    slabs = []
    for layer, w in zip(stage.layers, widths, strict=True):
        height = 8 + (_TALL - 8) * layer.side / tallest
        bars = tuple(_bar(layer, cost, floor, everyone) for cost, floor in floors)
        kernel = str(layer.kernel) if layer.kernel and layer.kernel > 1 else ""
        kernel = kernel if layer.kind in ("conv", "depthwise") else ""
        slabs.append(
            Slab(at, axis - height / 2, w, height, layer.kind, kernel, _title(layer), bars)
        )
        at += w + _GAP
    return Column(x, width, captions, tuple(slabs))


def _bar(layer: Layer, cost: str, floor: float, everyone: list[Layer]) -> tuple[float, float]:
    """Top and height of a cost bar; the dearest layer's bar fills the track."""
    share = layer.share.get(cost) or 0.0
    height = (_TRACK - 14) * share / _most(everyone, cost)
    height = max(height, 0.75) if share > 0 else 0.0
    return floor - height, height


def _most(layers: Sequence[Layer], cost: str) -> float:
    return max((x.share.get(cost) or 0.0) for x in layers) or 1.0


def _title(layer: Layer) -> str:
    parts = [f"{layer.name}: {layer.operation}", f"{numbers.times(layer.out)} out"]
    for cost in COSTS:
        if layer.cost.get(cost) is not None:
            text = numbers.show(layer.cost[cost], cost)
            name = "" if cost == "latency_ms" else f" {numbers.label(cost)}"
            parts.append(f"{text}{name} ({numbers.share(layer.share[cost])})")
    return ", ".join(parts)


def _words(stages: Sequence[Stage]) -> str:
    """The drawing for those who do not see it."""
    first, last = stages[0].layers[0], stages[-1].layers[-1]
    count = sum(len(s.layers) for s in stages)
    layers = "1 layer" if count == 1 else f"{count} layers"
    groups = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    into = numbers.times(first.into)
    return (
        f"{layers} in {groups}, from an input of {into} to an output of {numbers.times(last.out)}."
    )
