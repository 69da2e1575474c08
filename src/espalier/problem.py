"""What is wanted: metrics with their direction, limits on cost, the budget of the search itself.

Values inside solvers are always minimised: an objective that is to be maximised is negated once,
in `Problem.values`, and nowhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from espalier.errors import BudgetError, unknown

Goal = Literal["min", "max"]
How = Literal["counted", "predicted", "estimated", "measured"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A named number of a candidate: its unit, its direction and how it was obtained.

    `how` is "counted" (exact, from the network), "predicted" (a model of the cost), "estimated"
    (a stand-in for the real training) or "measured" (on the real runtime, or after full training).
    `split` names the data it was computed on, where there is any.
    """

    name: str
    unit: str = ""
    goal: Goal = "min"
    how: How = "counted"
    split: str = ""


@dataclass(frozen=True)
class Reading:
    """One number with how it was obtained; `spread` is a standard deviation or half-width."""

    value: float
    unit: str = ""
    how: How = "counted"
    split: str = ""
    spread: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The reading as the JSON of results: value, unit, how, split, and spread if known."""
        out: dict[str, Any] = {
            "value": self.value,
            "unit": self.unit,
            "how": self.how,
            "split": self.split,
        }
        if self.spread is not None:
            out["spread"] = self.spread
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        """The reading that `to_json` wrote."""
        return cls(
            float(data["value"]),
            data.get("unit", ""),
            data.get("how", "counted"),
            data.get("split", ""),
            data.get("spread"),
        )


class Metrics:
    """Named columns of numbers, a row a candidate, each column described by its `Metric`."""

    def __init__(
        self,
        columns: Mapping[str, ArrayLike],
        about: Iterable[Metric],
        spread: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        self.about: dict[str, Metric] = {m.name: m for m in about}
        self._columns = {k: np.atleast_1d(np.asarray(v, dtype=float)) for k, v in columns.items()}
        self._spread = {
            k: np.atleast_1d(np.asarray(v, dtype=float)) for k, v in (spread or {}).items()
        }
        missing = sorted(set(self._columns) ^ set(self.about))
        if missing:
            raise ValueError(f"every column needs its Metric and every Metric a column: {missing}")
        if len({len(c) for c in self._columns.values()}) > 1:
            sizes = {k: len(c) for k, c in self._columns.items()}
            raise ValueError(f"columns must have one length, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()))) if self._columns else 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Array:
        if name not in self._columns:
            raise KeyError(unknown("metric", name, self._columns))
        return self._columns[name]

    def __or__(self, other: Metrics) -> Metrics:
        """The columns of both, for the same candidates; `other` wins where a name is in both."""
        mine = {k: v for k, v in self._spread.items() if k not in other}
        return Metrics(
            {**self._columns, **other._columns},
            {**self.about, **other.about}.values(),
            {**mine, **other._spread},
        )

    def readings(self) -> list[dict[str, Reading]]:
        """A row a candidate: metric name to `Reading`."""
        rows: list[dict[str, Reading]] = []
        for i in range(len(self)):
            row = {}
            for name, column in self._columns.items():
                m = self.about[name]
                spread = float(self._spread[name][i]) if name in self._spread else None
                row[name] = Reading(float(column[i]), m.unit, m.how, m.split, spread)
            rows.append(row)
        return rows

    @classmethod
    def concat(cls, parts: Sequence[Metrics]) -> Metrics:
        """The rows of several batches, one below the other; all must have the same columns.

        A spread is kept where every part has it.
        """
        first = parts[0]
        columns = {k: np.concatenate([p[k] for p in parts]) for k in first}
        known = [k for k in first._spread if all(k in p._spread for p in parts)]
        spread = {k: np.concatenate([p._spread[k] for p in parts]) for k in known}
        return cls(columns, first.about.values(), spread)


# --- limits ---------------------------------------------------------------------------------

_FACTOR = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BYTES = {
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
}
_TIME_MS = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_QUANTITY = re.compile(
    r"^\s*(<=|>=|<|>|=<|=>)?\s*([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*(%|[a-zA-Zµ]*)\s*$"
)


@dataclass(frozen=True)
class Limit:
    """A bound on one metric: at most (`<=`) or at least (`>=`) `bound`, in the metric's unit.

    `relative` bounds are a share of a reference ("60%") and must be resolved against one.
    """

    metric: str
    bound: float
    op: Literal["<=", ">="] = "<="
    relative: bool = False

    def resolve(self, reference: float) -> Limit:
        """The absolute limit for a reference value (the original model's cost), to 14 digits: a
        share that says a whole number allows that number."""
        if not self.relative:
            return self
        return Limit(self.metric, float(f"{self.bound * reference:.14g}"), self.op)

    def exact(self) -> str:
        """The limit to its last digit, which `str` rounds: what a study is told from others by."""
        return f"{self.metric} {self.op} {self.amount()}"

    def amount(self) -> str:
        """The bound in digits that read as it, or as the next number below: "60%", "0.8"."""
        if not self.relative:
            return str(int(self.bound)) if float(self.bound).is_integer() else repr(self.bound)
        share = 100 * self.bound
        for digits in range(3, 18):
            text = f"{share:.{digits}g}"
            if float(text) / 100 == self.bound and "e" not in text:
                return f"{text}%"
        while share / 100 > self.bound:
            share = math.nextafter(share, 0)
        return f"{share!r}%"

    def violation(self, values: ArrayLike) -> Array:
        """How far beyond the bound, as a share of it; 0 where kept. NaN counts as broken."""
        v = np.asarray(values, dtype=float)
        over = v - self.bound if self.op == "<=" else self.bound - v
        out: Array = np.maximum(over, 0.0) / max(abs(self.bound), 1e-12)
        return np.where(np.isnan(v), np.inf, out)

    def __str__(self) -> str:
        bound = f"{self.bound:.0%}" if self.relative else f"{self.bound:g}"
        return f"{self.metric} {self.op} {bound}"


def quantity(text: str | float, metric: str = "") -> tuple[str, float, bool]:
    """Reads "0.8", "60k", "<= 2M", "1.5MB", "800us", "60%": (op or "", value, relative).

    Times become milliseconds for metrics that end in `_ms`; byte units only fit metrics that end
    in `bytes`. Errors: `BudgetError` with the rule and the text received.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not math.isfinite(text) or text <= 0:
            raise BudgetError(f"limit on {metric!r} must be a finite number above 0, got {text!r}")
        return "", float(text), False
    match = _QUANTITY.match(str(text))
    if not match:
        raise BudgetError(
            f"can't read the limit {text!r} on {metric!r}: write a number with an optional unit, "
            "like 0.8, 60k, '<= 2M', 1.5MB, 800us or 60%"
        )
    op, number, unit = match.group(1) or "", float(match.group(2)), match.group(3)
    if not math.isfinite(number) or number <= 0:
        raise BudgetError(f"limit on {metric!r} must be a finite number above 0, got {text!r}")
    if unit == "%":
        return op, number / 100, True
    table = dict(_FACTOR)
    if metric.endswith("_ms"):
        table = {"": 1.0, **_TIME_MS}
    elif metric.endswith("bytes"):
        table = {**_FACTOR, **_BYTES}
    if unit.lower() not in table:
        raise BudgetError(unknown(f"unit for {metric!r}", unit, [u for u in table if u]))
    return op, number * table[unit.lower()], False


Limits = Mapping[str, str | float | int]


def limits(within: Limits | Iterable[Limit] | None) -> tuple[Limit, ...]:
    """Reads `{"latency_ms": 0.8, "params": "60k", "macs": "<= 2M"}` into limits, several at once.

    A bare value is an upper bound, except for accuracy-like metrics that `Problem` maximises:
    there, write ">= 0.9".
    """
    if within is None:
        return ()
    if not isinstance(within, Mapping):
        return tuple(within)
    out = []
    for name, text in within.items():
        op, value, relative = quantity(text, name)
        sign: Literal["<=", ">="] = ">=" if op.replace("=", "") == ">" else "<="
        out.append(Limit(name, value, sign, relative))
    return tuple(out)


def tightest(found: Iterable[Limit]) -> tuple[Limit, ...]:
    """Of limits on one metric in one direction, none of them relative, that which implies the rest."""
    out: dict[tuple[str, str], Limit] = {}
    for limit in found:
        held = out.setdefault((limit.metric, limit.op), limit)
        if (limit.bound < held.bound) if limit.op == "<=" else (limit.bound > held.bound):
            out[limit.metric, limit.op] = limit
    return tuple(out.values())


_DURATION = re.compile(
    r"^([0-9]*\.?[0-9]+)\s*(s|sec|secs|second|seconds|m|min|mins|minute|minutes|h|hour|hours|trial|trials)$"
)


@dataclass(frozen=True)
class SearchBudget:
    """What the search itself may spend: wall seconds, trials, or both (whichever ends first)."""

    seconds: float | None = None
    trials: int | None = None

    @classmethod
    def parse(cls, text: str | float | SearchBudget) -> SearchBudget:
        """Reads "2min", "90s", "1h", "500 trials" or "10min, 500 trials"; a number is seconds."""
        if isinstance(text, SearchBudget):
            return text
        rule = 'a budget reads like "2min", "90s", "1h", "500 trials" or "10min, 500 trials"'
        if isinstance(text, (int, float)):
            text = f"{text}s"
        seconds: float | None = None
        trials: int | None = None
        for part in re.split(r"[,+]", text):
            match = _DURATION.match(part.strip().lower())
            if not match or float(match.group(1)) <= 0:
                raise BudgetError(f"{rule}, got {text!r}")
            value, unit = float(match.group(1)), match.group(2)
            if (trials if unit.startswith("trial") else seconds) is not None:
                raise BudgetError(
                    f"{rule}: at most one time and one number of trials, got {text!r}"
                )
            if unit.startswith("trial"):
                trials = int(value)
                if trials != value or trials < 1:
                    raise BudgetError(f"{rule}; trials are a whole number, got {text!r}")
            else:
                seconds = value * {"s": 1, "m": 60, "h": 3600}[unit[0]]
        return cls(seconds, trials)

    def __str__(self) -> str:
        parts = []
        if self.seconds is not None:
            parts.append(f"{self.seconds:g}s")
        if self.trials is not None:
            parts.append(f"{self.trials} trials")
        return ", ".join(parts) or "unbounded"


# --- the problem and its order ---------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Objectives to be best in, under limits that must be kept."""

    objectives: tuple[Metric, ...]
    limits: tuple[Limit, ...] = field(default=())

    def values(self, metrics: Metrics) -> Array:
        """Objective values `(n, m)`, all to be minimised."""
        sign = np.array([1.0 if o.goal == "min" else -1.0 for o in self.objectives])
        out: Array = np.stack([metrics[o.name] for o in self.objectives], axis=1) * sign
        return out

    def violations(self, metrics: Metrics) -> Array:
        """Sum of relative violations `(n,)` over the limits whose metric is present; 0 is kept."""
        total = np.zeros(len(metrics))
        for limit in self.limits:
            if limit.metric in metrics:
                total += limit.violation(metrics[limit.metric])
        return total


def dominates(a: Array, b: Array) -> bool:
    """Whether value row `a` is nowhere worse and somewhere better than `b` (minimised)."""
    return bool(np.all(a <= b) and np.any(a < b))


def ranks(values: Array, violations: Array | None = None) -> NDArray[np.int64]:
    """Non-domination ranks `(n,)`, 0 best, with constraint domination (Deb et al., 2002).

    A row that keeps the limits is before every row that breaks them; rows that break them are
    ordered by how much. A row without values (NaN) that breaks no limit failed: it comes last,
    and so does a NaN violation. Takes O(n^2 m) time and O(n^2) memory.
    """
    n = len(values)
    out = np.full(n, -1, dtype=np.int64)
    if n == 0:
        return out
    v = np.asarray(values, dtype=float).reshape(n, -1)
    broken = np.zeros(n) if violations is None else np.array(violations, dtype=float)
    broken[np.isnan(broken) | ((broken <= 0) & np.isnan(v).any(axis=1))] = np.inf
    ok = np.flatnonzero(broken <= 0)
    v = v[ok]
    no_worse = np.ones((len(ok), len(ok)), dtype=bool)
    better = np.zeros((len(ok), len(ok)), dtype=bool)
    for column in v.T:  # one objective at a time: the pairs are held once, not once an objective
        no_worse &= column[:, None] <= column
        better |= column[:, None] < column
    beats = no_worse & better
    beaten_by = beats.sum(axis=0)
    rank = 0
    while (beaten_by == 0).any():
        level_rows = np.flatnonzero(beaten_by == 0)
        out[ok[level_rows]] = rank
        beaten_by -= beats[level_rows].sum(axis=0)
        beaten_by[level_rows] = -1  # placed
        rank += 1
    for level in np.unique(broken[broken > 0]):
        out[broken == level] = rank
        rank += 1
    return out


def front(values: Array, violations: Array | None = None) -> NDArray[np.int64]:
    """Indices of the rows that no other dominates, best first objective first.

    Rows without values (NaN) are never in it. Where every row breaks a limit, it is the row that
    breaks them least.
    """
    v = np.asarray(values, dtype=float)
    known = np.flatnonzero(~np.isnan(v).any(axis=1)) if len(v) else np.zeros(0, dtype=np.int64)
    if len(known) == 0:
        return np.zeros(0, dtype=np.int64)
    broken = None if violations is None else np.asarray(violations, dtype=float)[known]
    best = known[ranks(v[known], broken) == 0]
    order: NDArray[np.int64] = best[np.lexsort(v[best].T[::-1])]
    return order


def crowding(values: Array) -> Array:
    """Crowding distance `(n,)` within one front (Deb et al., 2002); the ends are infinite."""
    n, m = values.shape
    out = np.zeros(n)
    for j in range(m if n else 0):
        order = np.argsort(values[:, j], kind="stable")
        column = values[order, j]
        out[order[0]] = out[order[-1]] = np.inf
        span = column[-1] - column[0]
        if n > 2 and span > 0:
            out[order[1:-1]] += (column[2:] - column[:-2]) / span
    return out


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Volume dominated by the rows and bounded by `reference` (minimised, any dimension).

    Slices along the last objective (HSO; While et al., 2006); meant for fronts of up to a few
    hundred points in 2 to 4 dimensions. Rows beyond the reference add nothing.
    """
    ref = np.asarray(reference, dtype=float)
    v = np.atleast_2d(np.asarray(values, dtype=float))
    if v.size == 0:
        return 0.0
    v = v[(v < ref).all(axis=1)]
    if len(v) == 0:
        return 0.0
    if v.shape[1] == 1:
        return float(ref[0] - v[:, 0].min())
    v = v[front(v)]
    if v.shape[1] == 2:
        v = v[np.argsort(v[:, 0], kind="stable")]
        tops = np.concatenate([[ref[1]], v[:-1, 1]])
        return float(np.sum((ref[0] - v[:, 0]) * (tops - v[:, 1])))
    v = v[np.argsort(v[:, -1], kind="stable")]
    heights = np.append(v[1:, -1], ref[-1]) - v[:, -1]
    return float(
        sum(h * hypervolume(v[: i + 1, :-1], ref[:-1]) for i, h in enumerate(heights) if h > 0)
    )
