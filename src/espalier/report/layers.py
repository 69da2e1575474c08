"""The chosen network as rows to draw: what each layer does, and its share of each cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from espalier.report import numbers

COSTS = ("params", "macs", "latency_ms")
_LIGHT = (
    *("norm", "relu", "act", "swish", "silu", "gelu", "sigmoid", "tanh", "softmax"),
    *("dropout", "identity", "flatten", "view", "reshape", "permute", "add", "mul", "cat"),
)
KINDS = {
    "conv": "convolution",
    "depthwise": "depthwise convolution",
    "pointwise": "1×1 convolution",
    "linear": "linear",
    "attention": "attention",
    "resize": "pooling or resizing",
    "other": "other",
}


@dataclass
class Layer:
    """One drawn layer; normalisation and activation are counted with the layer before them."""

    name: str
    kind: str
    stage: str
    into: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    kernel: int | None = None
    stride: int | None = None
    cost: dict[str, float | None] = field(default_factory=dict)
    share: dict[str, float | None] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Channels, or features, of the output."""
        return self.out[0] if self.out else 1

    @property
    def side(self) -> int:
        """Height of the output map; 1 once it is flat."""
        return self.out[1] if len(self.out) > 1 else 1

    @property
    def operation(self) -> str:
        """Such as "5×5 depthwise convolution, stride 2"."""
        words = KINDS[self.kind]
        if self.kernel and self.kernel > 1:
            words = f"{self.kernel}×{self.kernel} {words}"
        return f"{words}, stride {self.stride}" if self.stride and self.stride > 1 else words


@dataclass
class Stage:
    """Layers that belong together, in order."""

    name: str
    layers: list[Layer]


def stages(rows: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Groups the rows of a result's `network` by stage, with each layer's share of each cost."""
    layers: list[Layer] = []
    for row in rows:
        layer = _layer(row)
        if layer is None or (_light(row) and layers):
            _fold(layers, row)
        else:
            layers.append(layer)
    for cost in COSTS:
        total = sum(x.cost.get(cost) or 0.0 for x in layers)
        for x in layers:
            value = x.cost.get(cost)
            x.share[cost] = None if value is None or total <= 0 else value / total
    return [Stage(name, list(group)) for name, group in groupby(layers, key=_grouping(layers))]


def total(found: Sequence[Stage], cost: str) -> float | None:
    """The whole network's cost as the sum of its layers; None if no layer has it."""
    values = [x.cost.get(cost) for stage in found for x in stage.layers]
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _grouping(layers: Sequence[Layer]) -> Callable[[Layer], str]:
    """The finest parts of the stages' dotted names that group layers and fit a drawing: of
    "stage1.0.expand" rather "stage1.0" than one column a layer, "stage1" in a deep network."""

    def prefix(parts: int) -> Callable[[Layer], str]:
        return lambda x: ".".join(x.stage.split(".")[:parts])

    for parts in range(max((x.stage.count(".") for x in layers), default=0) + 1, 1, -1):
        groups = sum(1 for _ in groupby(layers, key=prefix(parts)))
        if groups <= 14 and len(layers) >= 1.8 * groups:
            return prefix(parts)
    return prefix(1)


def _light(row: Mapping[str, Any]) -> bool:
    kind = str(row.get("kind") or "").lower()
    return any(word in kind for word in _LIGHT) and not numbers.real(row.get("macs"))


def _ints(value: Any) -> tuple[int, ...]:
    """A shape without its batch, as whole numbers."""
    if isinstance(value, (int, float)):
        value = [value]
    found = [numbers.real(v) for v in value] if isinstance(value, (list, tuple)) else []
    return tuple(int(v) for v in found if v is not None)


def _first(value: Any) -> int | None:
    shape = _ints(value)
    return shape[0] if shape else None


def _kind(row: Mapping[str, Any]) -> str:
    kind = str(row.get("kind") or "").lower()
    groups, into = _first(row.get("groups")) or 1, _ints(row.get("in_shape"))
    if "depthwise" in kind:
        return "depthwise"
    if "conv" in kind or "pointwise" in kind:
        if groups > 1 and into and groups == into[0]:
            return "depthwise"
        return "pointwise" if _first(row.get("kernel")) == 1 else "conv"
    for word, name in (("linear", "linear"), ("gemm", "linear"), ("attention", "attention")):
        if word in kind:
            return name
    return "resize" if any(w in kind for w in ("pool", "sampl", "resize", "mean")) else "other"


def _layer(row: Mapping[str, Any]) -> Layer | None:
    out = _ints(row.get("out_shape"))
    if not out:
        return None
    return Layer(
        str(row.get("name") or ""),
        _kind(row),
        str(row.get("stage") or row.get("name") or ""),
        _ints(row.get("in_shape")),
        out,
        _first(row.get("kernel")),
        _first(row.get("stride")),
        {cost: numbers.real(row.get(cost)) for cost in COSTS},
    )


def _fold(layers: list[Layer], row: Mapping[str, Any]) -> None:
    """Adds a light row's cost to the layer before it."""
    if not layers:
        return
    last = layers[-1]
    for cost in COSTS:
        value = numbers.real(row.get(cost))
        if value is not None:
            last.cost[cost] = (last.cost.get(cost) or 0.0) + value
