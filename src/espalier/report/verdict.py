"""The answer in words: one sentence, where a limit is broken, where a baseline is ahead."""

from __future__ import annotations

import math

from espalier.report import numbers
from espalier.report.reading import Bound, Entry, Result, keeps


def verdict(result: Result) -> str:
    """One sentence: "0.283 ms of 0.3 ms, 41.2k of 60k parameters, 98.1% test accuracy"."""
    return ", ".join(parts(result)) or "No trained network in this result"


def parts(result: Result) -> list[str]:
    """The sentence in pieces, each best kept on one line: every limit or cost, then quality."""
    best = result.best
    out = [_cost(best, limit) for limit in result.limits]
    if not result.limits:
        out = [_free(best, metric) for metric in result.axes]
    if best.value(result.quality) is not None:
        split = str(best.reading(result.quality).get("split") or "")
        words = [best.shown(result.quality), split, numbers.label(result.quality)]
        out.append(" ".join(w for w in words if w))
    return [p for p in out if p]


def _cost(entry: Entry, limit: Bound) -> str:
    value = entry.value(limit.metric)
    if value is None:
        return ""
    unit = entry.unit(limit.metric) or limit.unit
    mine, bound = numbers.against(value, limit.bound, limit.metric, unit)
    name = "" if numbers.kind(limit.metric, unit) == "ms" else " " + numbers.label(limit.metric)
    if limit.kept(value):
        return f"{mine} of {bound}{name}"
    side = "under" if limit.op.startswith(">") else "over"
    return f"{mine}{name}, {side} the limit of {bound}"


def _free(entry: Entry, metric: str) -> str:
    text = entry.shown(metric)
    return text if metric == "latency_ms" else f"{text} {numbers.label(metric)}"


def broken(result: Result) -> list[str]:
    """A sentence for every limit that the chosen network does not keep, by how much."""
    out = []
    for limit in result.limits:
        value = result.best.value(limit.metric)
        if value is not None and limit.kept(value) is False:
            by = abs(value - limit.bound) / max(abs(limit.bound), 1e-12)
            how = result.best.reading(limit.metric).get("how") or "found"
            text, _ = numbers.against(value, limit.bound, limit.metric, limit.unit)
            digits = 0 if by >= 0.1 else 1
            out.append(f"The limit {limit} is not kept: {text} {how}, {by:.{digits}%} beyond it.")
    return out


def noise(result: Result, entry: Entry) -> float | None:
    """Standard error of a share read on the test split: the binomial one, from its size."""
    value, n = entry.value(result.quality), numbers.real(result.task.get("test"))
    unit = entry.unit(result.quality)
    if value is None or not n or numbers.kind(result.quality, unit) != "share":
        return None
    return math.sqrt(max(value * (1 - value), 0) / n)


def ahead(result: Result) -> list[str]:
    """A sentence for every baseline that keeps the limits and is not worse than what was found."""
    out = []
    ours = result.best.value(result.quality)
    for other in result.baselines:
        theirs = other.value(result.quality)
        if ours is None or theirs is None or keeps(result, other) is False:
            continue
        gain = (theirs - ours) * (1 if result.rising else -1)
        if gain > 0 or (gain == 0 and _cheaper(result, other)):
            out.append(_sentence(result, other, abs(gain)))
    return out


def _cheaper(result: Result, other: Entry) -> bool:
    if not result.axes:
        return False
    mine, theirs = result.best.value(result.axes[0]), other.value(result.axes[0])
    return mine is not None and theirs is not None and theirs < mine


def _sentence(result: Result, other: Entry, gain: float) -> str:
    quality = result.quality
    name = other.name[:1].upper() + other.name[1:]
    had, found = other.shown(quality), result.best.shown(quality)
    metric = numbers.label(quality)
    if gain == 0:
        cost = numbers.label(result.axes[0])
        return f"{name} reaches the same {metric} ({had}) with less {cost}."
    text = f"{name} is ahead on test {metric}: {had} against {found}"
    errors = [noise(result, result.best), noise(result, other)]
    if None in errors:
        return text + "."
    band = 2 * math.hypot(*(e for e in errors if e is not None))
    n = numbers.whole(result.task.get("test"))
    if gain > band:
        return f"{text}, more than the noise of {n} test examples explains."
    return (
        f"{text}. The difference is within the noise of {n} test examples "
        f"(±{band * 100:.1f} points)."
    )


def lead(result: Result) -> str:
    """One sentence on how the found network stands against the best baseline, or ''."""
    rows = [e for e in result.baselines if e.value(result.quality) is not None]
    rows = [e for e in rows if keeps(result, e) is not False]
    ours = result.best.value(result.quality)
    if not rows or ours is None or ahead(result):
        return ""
    flip = 1 if result.rising else -1
    top = max(rows, key=lambda e: flip * (e.value(result.quality) or 0.0))
    gain = ours - (top.value(result.quality) or 0.0)
    unit = result.best.unit(result.quality)
    text = numbers.change(gain, result.quality, unit).lstrip("+−±")
    errors = [noise(result, result.best), noise(result, top)]
    line = f"Ahead of the best baseline, {top.name}, by {text} on the test split"
    if gain == 0:
        line = f"Level with the best baseline, {top.name}, on the test split"
    band = 2 * math.hypot(*(e or 0.0 for e in errors))
    if None not in errors and abs(gain) <= band:
        n = numbers.whole(result.task.get("test"))
        return f"{line}; {n} test examples tell networks apart only beyond {band * 100:.1f} points."
    return line + "."
