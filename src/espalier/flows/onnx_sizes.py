"""What ONNX files compute with shapes: small lists of numbers, some known only when the model runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import numpy_helper
from torch import Tensor, fx

from espalier.errors import DataError

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers in a list, or one alone; each is a number, or a proxy of one read as the model runs."""

    items: list[Any]
    scalar: bool = False
    whole: bool = True


def small(given: Sequence[Any]) -> list[Any] | None:
    """Arguments as sizes where all of them are, or are constant lists of whole numbers; else None."""
    constants = [v for v in given if isinstance(v, Tensor)]
    sizes = any(isinstance(v, Sizes) for v in given)
    if any(isinstance(v, (fx.Node, fx.Proxy)) for v in given):
        return None
    if any(t.dim() > 1 or (t.is_floating_point() and not sizes) for t in constants):
        return None
    return [_sizes(v) if isinstance(v, Tensor) else v for v in given]


def _sizes(value: Tensor) -> Sizes:
    scalar = value.dim() == 0
    return Sizes(value.reshape(-1).tolist(), scalar, not value.is_floating_point())


def _gather(given: Sequence[Any], more: Attributes) -> Sizes:
    items, index = given[0].items, given[1]
    return Sizes([items[i] for i in index.items], index.scalar, given[0].whole)


def _slice(given: Sequence[Any], more: Attributes) -> Sizes:
    start, end = given[1].items[0], given[2].items[0]
    step = given[4].items[0] if len(given) > 4 else 1
    return Sizes(given[0].items[start:end:step], whole=given[0].whole)


def _concat(given: Sequence[Any], more: Attributes) -> Sizes:
    return Sizes([i for part in given for i in part.items], whole=all(p.whole for p in given))


def _unsqueeze(given: Sequence[Any], more: Attributes) -> Sizes:
    if not given[0].scalar:
        raise DataError("an ONNX file with tables of sizes can't be read")
    return Sizes(given[0].items, whole=given[0].whole)


def _squeeze(given: Sequence[Any], more: Attributes) -> Sizes:
    return Sizes(given[0].items, len(given[0].items) == 1, given[0].whole)


def _cast(given: Sequence[Any], more: Attributes) -> Sizes:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return Sizes(given[0].items, given[0].scalar, more["to"] not in floats)


def _same(given: Sequence[Any], more: Attributes) -> Sizes:
    found: Sizes = given[0]
    return found


def _listed(given: Sequence[Any], more: Attributes) -> Sizes:
    return Sizes(given[0].items, not given[1].items, given[0].whole)


def _root(given: Sequence[Any], more: Attributes) -> Sizes:
    return Sizes([i**0.5 for i in given[0].items], given[0].scalar, False)


def _filled(given: Sequence[Any], more: Attributes) -> Sizes:
    if len(given[0].items) != 1 or not isinstance(given[0].items[0], int):
        raise DataError("an ONNX ConstantOfShape of values can't be read")
    value = numpy_helper.to_array(more["value"]).item() if "value" in more else 0
    return Sizes([value] * given[0].items[0], whole=isinstance(value, int))


def _divide(a: Any, b: Any, whole: bool) -> Any:
    return a // b if whole else a / b


def _equal(a: Any, b: Any, whole: bool) -> bool:
    numbers = [x for x in (a, b) if isinstance(x, (int, float))]
    if len(numbers) == 2:
        return bool(a == b)
    if len(numbers) == 1 and numbers[0] < 0:
        return False  # no size is
    raise DataError("an ONNX file that compares sizes as it runs can't be read")


def _each(
    function: Callable[[Any, Any, bool], Any],
) -> Callable[[Sequence[Any], Attributes], Sizes]:
    def each(given: Sequence[Any], more: Attributes) -> Sizes:
        a, b = given
        whole = a.whole and b.whole
        pairs = zip(*_spread(given), strict=True)
        return Sizes([function(x, y, whole) for x, y in pairs], a.scalar and b.scalar, whole)

    return each


def _where(given: Sequence[Any], more: Attributes) -> Sizes:
    rows = zip(*_spread(given), strict=True)
    scalar = all(g.scalar for g in given)
    return Sizes([a if c else b for c, a, b in rows], scalar, given[1].whole)


def _spread(given: Sequence[Any]) -> list[list[Any]]:
    """Lists of one length: a number alone stands at each place."""
    length = max(len(g.items) for g in given)
    return [g.items * length if len(g.items) == 1 else g.items for g in given]


COMPUTED: dict[str, Callable[[Sequence[Any], Attributes], Sizes]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "Identity": _same,
    "Reshape": _listed,
    "Sqrt": _root,
    "ConstantOfShape": _filled,
    "Add": _each(lambda a, b, whole: operator.add(a, b)),
    "Sub": _each(lambda a, b, whole: operator.sub(a, b)),
    "Mul": _each(lambda a, b, whole: operator.mul(a, b)),
    "Div": _each(_divide),
    "Mod": _each(lambda a, b, whole: operator.mod(a, b)),
    "Equal": _each(_equal),
    "Where": _where,
}
