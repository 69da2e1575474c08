"""A result, read with care: sections may be absent, numbers may be None or NaN, text is anyone's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.report import numbers


@dataclass(frozen=True)
class Bound:
    """One limit that was asked for."""

    metric: str
    op: str
    bound: float
    unit: str = ""

    def kept(self, value: Any) -> bool | None:
        """Whether a value keeps the limit; None when the value is unknown."""
        number = numbers.real(value)
        if number is None:
            return None
        return number >= self.bound if self.op.startswith(">") else number <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.op.startswith(">") else "≤"
        return f"{numbers.label(self.metric)} {sign} {numbers.show(self.bound, self.metric, self.unit)}"


@dataclass(frozen=True)
class Entry:
    """One trained network of a result."""

    name: str
    id: str = ""
    candidate: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start: str = ""

    def reading(self, metric: str) -> Mapping[str, Any]:
        """What is known of a metric: value, unit, how, split, spread; empty if nothing."""
        found = self.metrics.get(metric)
        return found if isinstance(found, Mapping) else {}

    def value(self, metric: str) -> float | None:
        """The number alone, or None."""
        return numbers.real(self.reading(metric).get("value"))

    def unit(self, metric: str) -> str:
        """The metric's unit, or ''."""
        return str(self.reading(metric).get("unit") or "")

    def shown(self, metric: str) -> str:
        """The number as text, a dash where unknown."""
        return numbers.show(self.value(metric), metric, self.unit(metric))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; none where the value is no list."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return []
    return [row for row in value if isinstance(row, Mapping)]


def _entry(row: Mapping[str, Any], name: str) -> Entry:
    return Entry(
        str(row.get("name") or name),
        str(row.get("id") or ""),
        mapping(row.get("candidate")),
        mapping(row.get("metrics")),
        str(row.get("start") or ""),
    )


class Result:
    """The sections of a result by name, each possibly empty."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.question = mapping(raw.get("question"))
        self.task = mapping(self.question.get("task"))
        self.family = mapping(self.question.get("family"))
        self.runtime = mapping(self.question.get("runtime"))
        self.machine = mapping(self.question.get("machine"))
        self.latency = mapping(raw.get("latency"))
        self.seconds = mapping(raw.get("seconds"))
        self.budget = mapping(raw.get("budget"))
        self.files = mapping(raw.get("files"))
        self.reproduce = mapping(raw.get("reproduce"))
        self.trials = rows(raw.get("trials"))
        self.progress = rows(raw.get("progress"))
        self.decisions = rows(raw.get("decisions"))
        self.network = rows(raw.get("network"))
        self.shrink = mapping(raw.get("shrink"))
        learned = mapping(raw.get("architecture"))
        self.epochs = rows(learned.get("history"))
        self.options = mapping(learned.get("options"))
        self.operators = numbers.real(learned.get("operators"))
        self.monitor = mapping(learned.get("monitor"))
        self.ranking = mapping(raw.get("ranking"))
        self.best = _entry(mapping(raw.get("best")), "found")
        self.front = [_entry(row, "found") for row in rows(raw.get("front"))]
        self.baselines = [_entry(row, "baseline") for row in rows(raw.get("baselines"))]
        self.limits = list(_bounds(rows(self.question.get("limits"))))
        notes = raw.get("notes")
        self.notes = [str(n) for n in notes] if isinstance(notes, (list, tuple)) else []

    @property
    def title(self) -> str:
        """The title given, or the family and the task."""
        given = self.raw.get("title")
        names = [str(x["name"]) for x in (self.family, self.task) if x.get("name")]
        return str(given or " for ".join(names) or "A search")

    @property
    def quality(self) -> str:
        """The metric that was made best: as the result says, else accuracy, else the first one
        read on the test split."""
        said = self.raw.get("quality")
        if isinstance(said, str) and said in self.best.metrics:
            return said
        if "accuracy" in self.best.metrics or not self.best.metrics:
            return "accuracy"
        tested = [k for k in self.best.metrics if self.best.reading(k).get("split") == "test"]
        return tested[0] if tested else "accuracy"

    @property
    def rising(self) -> bool:
        """Whether more of the quality is better; losses and errors are to be small."""
        goal = self.raw.get("goal")
        if goal in ("min", "max"):
            return bool(goal == "max")
        return not any(word in self.quality for word in ("loss", "error", "perplexity"))

    @property
    def axes(self) -> list[str]:
        """The costs worth an axis: those limited, else what is known of latency, params, MACs."""
        limited = [x.metric for x in self.limits]
        known = limited or ["latency_ms", "params", "macs"]
        return [m for m in dict.fromkeys(known) if self.best.value(m) is not None]

    @property
    def kept_all(self) -> bool:
        """Whether the best network keeps every limit that can be judged."""
        return keeps(self, self.best) is not False

    def limit(self, metric: str) -> Bound | None:
        """The limit on a metric, if there is one."""
        return next((x for x in self.limits if x.metric == metric), None)

    def entries(self) -> list[Entry]:
        """The best, the rest of the front, and the baselines."""
        rest = [e for e in self.front if e.candidate != self.best.candidate]
        return [self.best, *rest, *self.baselines]


def keeps(result: Result, entry: Entry) -> bool | None:
    """Whether an entry keeps every limit; None when one of its numbers is unknown."""
    verdicts = [x.kept(entry.value(x.metric)) for x in result.limits]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _bounds(table: list[Mapping[str, Any]]) -> Iterator[Bound]:
    for row in table:
        bound = numbers.real(row.get("bound"))
        if bound is not None and row.get("metric"):
            op, unit = str(row.get("op") or "<="), str(row.get("unit") or "")
            yield Bound(str(row["metric"]), op, bound, unit)


def plain(value: Any) -> Any:
    """The value as strict JSON: numpy scalars and arrays as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
