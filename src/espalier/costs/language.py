"""What a language model costs, counted: bytes of weights and of cache, parameters, active ones.

Every cost is a sum of tables, one for each part of the model over the decisions that change it, so
an exact program can choose under all of them at once. Nothing is built: sizes are closed forms of
the options, read by the names of decisions (`units:model.layers.3`, `bits:model.layers.3.up`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from espalier.costs.cost import CodeCost
from espalier.costs.language_parts import Matrix, Part, parts
from espalier.problem import Metric, Metrics
from espalier.space import Space

if TYPE_CHECKING:
    from espalier.compress.language.anatomy import Anatomy

Array = NDArray[np.float64]
Codes = NDArray[Any]
# bytes of matrices of rows x columns in some bits and blocks of inputs; arrays in, arrays out
Packed = Callable[[Array, Array, Array], Array]
# bytes of one layer's keys and values: its options, its groups, channels of a head, tokens held
Held = Callable[[Mapping[str, Any], int, int, int], float]
HALF = 16  # bits of a plain float; more: as it was stored
CACHED = ("kv", "rank")


class LanguageFamily(Protocol):
    """What counting needs of a family of language models."""

    model: Any

    @property
    def space(self) -> Space: ...

    @property
    def anatomy(self) -> Anatomy: ...


@dataclass(frozen=True, eq=False)
class Table:
    """A number for each combination of the options of some decisions; `name` says of what part."""

    decisions: tuple[str, ...]
    values: Array
    name: str

    def at(self, space: Space, codes: Codes) -> Array:
        """The numbers `(n,)` for canonical codes `(n, d)`."""
        if not self.decisions:
            return np.full(len(codes), float(self.values))
        places = [space.names.index(name) for name in self.decisions]
        found: Array = self.values[tuple(codes[:, j].astype(np.intp) for j in places)]
        return found


class LanguageCounts(CodeCost):
    """Exact counts of a family's candidates.

    - `bytes`: weights as stored, `stored` bytes each, or packed in the bits that were decided.
    - `params`, and `active_params`: those that one token meets (of experts only the active ones).
    - `kv_bytes`: keys and values of `context` tokens of one sequence, `cached` bytes a number where
      no decision says otherwise.
    - `packed` gives bytes of quantised matrices, `held` those of a layer's cache with decisions.
    """

    metrics = (
        Metric("bytes", "B"),
        Metric("params"),
        Metric("active_params"),
        Metric("kv_bytes", "B"),
    )

    def __init__(
        self,
        family: LanguageFamily,
        *,
        stored: float = 4.0,
        context: int | None = None,
        cached: float | None = None,
        packed: Packed | None = None,
        held: Held | None = None,
    ) -> None:
        self.space = family.space
        self.context = context or family.anatomy.context
        self._stored, self._cached = stored, stored if cached is None else cached
        self._packed, self._held, self._scales = packed or dense_codes, held, 4.0
        self._parts = tuple(parts(family.model, family.anatomy, family.space))
        self._tables: dict[str, tuple[Table, ...]] = {}

    def tables(self, metric: str) -> tuple[Table, ...]:
        """A metric as tables that add up to it."""
        if metric not in self._tables:
            of = self._kv if metric == "kv_bytes" else self._weights
            self._tables[metric] = tuple(of(metric))
        return self._tables[metric]

    def estimate_codes(self, codes: Codes) -> Metrics:
        """Every count of codes `(n, d)`."""
        rows = self.space.canonical(codes)
        columns = {
            m.name: np.sum([t.at(self.space, rows) for t in self.tables(m.name)], axis=0)
            for m in self.metrics
        }
        return Metrics(columns, self.metrics)

    # --- weights -----------------------------------------------------------------------------

    def _weights(self, metric: str) -> Iterator[Table]:
        for part in self._parts:
            for matrix in part.matrices:
                scope = _scope(self.space, (*part.presence, *matrix.decisions(metric)))
                options = _options(self.space, scope)
                there = _there(part, options)
                shape = [self.space[name].count for name in scope]
                values = there * self._size(matrix, options, metric)
                yield Table(scope, np.broadcast_to(values, shape).astype(float), part.name)

    def _size(self, matrix: Matrix, options: Mapping[str, Array], metric: str) -> Array:
        rows, columns = (axis.size(options) for axis in matrix.axes)
        copies = matrix.copies(options, metric)
        if metric != "bytes":
            return rows * columns * copies
        whole = rows * columns * copies
        bits = np.array(8 * self._stored)
        dense = whole * self._stored
        if matrix.bits is not None:
            chosen = options[matrix.bits]
            packed = copies * self._packed(rows, columns, np.minimum(chosen, 8))
            packed = np.where(chosen == HALF, whole * 2, packed)
            dense = np.where(chosen > HALF, dense, np.minimum(packed, dense))
            bits = np.where(chosen > HALF, bits, chosen)
        if matrix.sparsity is None:
            return np.asarray(dense)
        share = options[matrix.sparsity]
        return np.minimum(
            dense, _sparse(whole, np.abs(share), share < 0, bits, dense, self._scales)
        )

    # --- cache -------------------------------------------------------------------------------

    def _kv(self, metric: str) -> Iterator[Table]:
        for part in self._parts:
            if part.cache is None:
                continue
            own = [n for k in CACHED if (n := f"{k}:{part.layer}") in self.space.names]
            spans = [n for n in self.space.names if n.startswith(f"span:{part.layer}.")]
            if spans and (which := f"window:{part.layer}.heads") in self.space.names:
                own.append(which)
            # each group of heads may look as far as it likes: a table for each
            whole: list[str | None] = [None]
            for span in spans or whole:
                names = [*own, *([span] if span else [])]
                yield self._kv_table(part, names, 1 / max(len(spans), 1))

    def _kv_table(self, part: Part, own: Sequence[str], share: float) -> Table:
        assert part.cache is not None
        heads = [part.cache.decision] if part.cache.decision else []
        scope = _scope(self.space, (*part.presence, *heads, *own))
        plain = [name for name in scope if name not in own]
        options = _options(self.space, scope, plain)
        tokens = min(self.context, part.window or self.context)
        groups = part.cache.size(options)
        shape = [self.space[name].count for name in scope]
        if own and self._held is not None:
            values = self._held_values(part, scope, groups, tokens)
        else:
            values = 2.0 * groups * part.head * tokens * self._cached
        there = _there(part, options)
        return Table(scope, np.broadcast_to(there * values * share, shape).copy(), part.name)

    def _held_values(self, part: Part, scope: Sequence[str], groups: Array, tokens: int) -> Array:
        assert self._held is not None
        shape = [self.space[name].count for name in scope]
        out = np.empty(shape)
        whole = np.broadcast_to(groups, shape)
        for at in np.ndindex(*shape):
            chosen = {name: self.space[name].options[i] for name, i in zip(scope, at, strict=True)}
            out[at] = self._held(chosen, int(whole[at]), part.head, tokens)
        return out


def _sparse(
    whole: Array, share: Array, half: NDArray[Any], bits: Array, dense: Array, scales: float
) -> Array:
    """Bytes of the share of weights that stays, of where they are (2 bits each in 2:4, else a bit
    for every place), and of the scales of few bits."""
    values = np.ceil(whole * share)
    where = np.where(half, 2 * values, whole)
    own = np.where(bits < HALF, np.ceil(whole / 32) * scales, 0.0)
    found = np.ceil(values * bits / 8) + np.ceil(where / 8) + own
    return np.where(share >= 1, dense, found)


def dense_codes(rows: Array, columns: Array, bits: Array) -> Array:
    """Bytes of codes without gaps in blocks of 32 inputs, each with a scale of 4 bytes."""
    blocks = np.ceil(columns / 32)
    return rows * blocks * (np.ceil(32 * bits / 8) + 4.0)


def _scope(space: Space, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in space.names if name in set(names))


def _options(
    space: Space, scope: Sequence[str], names: Sequence[str] | None = None
) -> dict[str, Array]:
    """The options of decisions (all, or those that are numbers), each along its own axis."""
    out = {}
    for i, name in enumerate(scope):
        if names is not None and name not in names:
            continue
        shape = [1] * len(scope)
        shape[i] = -1
        numbers = [_number(option, place) for place, option in enumerate(space[name].options)]
        out[name] = np.array(numbers, dtype=float).reshape(shape)
    return out


def _number(option: Any, place: int) -> float:
    """An option as a number: of a pattern "N:M" the share that stays, negative for 2:4; of a rule
    in words its place."""
    if not isinstance(option, str):
        return float(option)
    kept, _, of = option.partition(":")
    if not (kept.isdecimal() and of.isdecimal()):
        return float(place)
    return -0.5 if option == "2:4" else int(kept) / int(of)


def _there(part: Part, options: Mapping[str, Array]) -> Array:
    """1 where no decision leaves the part out."""
    out = np.ones(())
    for name in part.presence:
        out = out * (options[name] > 0)
    return out
