"""How numbers read: the units and roundings of every figure, table and sentence of a report."""

from __future__ import annotations

import math
from typing import Any, Literal

DASH = "–"
Kind = Literal["ms", "s", "bytes", "share", "count", "plain"]

_LABELS = {
    "accuracy": "accuracy",
    "accuracy_validation": "validation accuracy",
    "accuracy_estimated": "one-shot accuracy",
    "loss": "loss",
    "latency_ms": "latency",
    "latency_ms_predicted": "predicted latency",
    "params": "parameters",
    "macs": "MACs",
    "bytes": "size of the weights",
    "activation_bytes": "peak activation memory",
    "active_params": "active parameters",
    "kv_bytes": "cache of keys and values",
    "prefill_ms": "prefill",
    "decode_ms": "time of a token",
    "bits_per_byte": "bits a byte",
}
_COUNTS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
_BYTES = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0))
_MILLIS = (("s", 1e3), ("ms", 1.0), ("µs", 1e-3))


def label(metric: str) -> str:
    """The metric's name as a reader says it."""
    if metric in _LABELS:
        return _LABELS[metric]
    base, _, tail = metric.rpartition("_")
    if tail in ("validation", "estimated", "predicted") and base:
        return f"{tail} {label(base)}"
    if tail == "before" and base:
        return f"{label(base)} before repair"
    return metric.removesuffix("_ms").replace("_", " ")


def real(value: Any) -> float | None:
    """The value as a finite float; None for what is no number (None, NaN, text, infinity)."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def kind(metric: str, unit: str = "") -> Kind:
    """How a metric is written, from its unit or, failing that, its name."""
    if unit == "ms" or (not unit and "_ms" in metric):
        return "ms"
    if unit in ("s", "seconds"):
        return "s"
    if unit in ("B", "bytes") or (not unit and metric.endswith("bytes")):
        return "bytes"
    if unit == "share" or (not unit and metric.startswith("accuracy")):
        return "share"
    return "count" if unit in ("", "params", "parameters", "MACs", "macs") else "plain"


def significant(value: float, digits: int = 3) -> str:
    """Rounded to significant digits, without an exponent for everyday sizes."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -6 or size > 14:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - size)
    places = max(digits - 1 - size, 0)
    text = f"{rounded:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(value: float, steps: tuple[tuple[str, float], ...], like: float) -> tuple[float, str]:
    """The value in the largest step that `like` reaches, and that step's name."""
    for name, factor in steps:
        if abs(like) >= factor * 0.9995:
            return value / factor, name
    name, factor = steps[-1]
    return value / factor, name


def show(
    value: Any, metric: str = "", unit: str = "", *, digits: int = 3, like: float | None = None
) -> str:
    """A number with its unit: 0.283 ms, 8.3 µs, 41.2k, 1.6 MB, 98.1%; a dash where there is none.

    `like` fixes the scale: two numbers that are compared are written in one unit.
    """
    number = real(value)
    if number is None:
        return DASH
    scale = abs(number) if like is None else abs(like)
    if unit == "%":  # it counts to 100 itself, as in tables of trained networks
        return share(number / 100, digits=1)
    way = kind(metric, unit)
    if way == "share":
        return share(number, digits=1)
    if way == "s":
        return duration(number)
    if way == "count":
        scaled, name = _scaled(number, _COUNTS, scale)
        return significant(scaled, digits) + name
    if way == "plain":
        return f"{significant(number, digits)} {unit}"
    if way == "ms":
        # limits are written in ms, so only what is far below one reads better in µs
        scaled, name = (number, "ms") if 0.01 <= scale < 1 else _scaled(number, _MILLIS, scale)
    else:
        scaled, name = _scaled(number, _BYTES, scale)
    return f"{significant(scaled, digits)} {name}"


def against(value: Any, bound: Any, metric: str = "", unit: str = "") -> tuple[str, str]:
    """A value and its limit in one unit, with digits enough to tell them apart if they differ."""
    number, limit = real(value), real(bound)
    if number is None or limit is None:
        return show(value, metric, unit), show(bound, metric, unit)
    for digits in (3, 4, 5, 6):
        texts = (
            show(number, metric, unit, digits=digits, like=limit),
            show(limit, metric, unit, digits=digits, like=limit),
        )
        if texts[0] != texts[1] or number == limit:
            break
    return texts


def share(value: Any, digits: int = 1) -> str:
    """A share of one as per cent."""
    number = real(value)
    return DASH if number is None else f"{number * 100:.{digits}f}%"


def points(value: Any) -> str:
    """A difference of shares in percentage points, with its sign."""
    number = real(value)
    if number is None:
        return DASH
    text = f"{abs(number) * 100:.1f}"
    return f"{sign(number if float(text) else 0)}{text} points"


def change(value: Any, metric: str = "", unit: str = "", like: float | None = None) -> str:
    """A signed difference in the metric's own unit; `like`, the largest of those shown together,
    sets the unit and the last digit of all."""
    number = real(value)
    if number is None:
        return DASH
    if kind(metric, unit) == "share":
        return points(number)
    if like:
        step = 10.0 ** (math.floor(math.log10(abs(like))) - 1)
        number = round(number / step) * step
    return sign(number) + show(abs(number), metric, unit, digits=2, like=like)


def sign(value: float) -> str:
    """The sign of a difference: a plus, a true minus, or ± for none."""
    return "+" if value > 0 else "−" if value < 0 else "±"


def duration(seconds: Any) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 1 min 32 s, 2 h 5 min."""
    number = real(seconds)
    if number is None:
        return DASH
    if number < 10:
        return f"{significant(number, 2)} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def whole(value: Any) -> str:
    """A whole number with thin groups of three; beyond a million million as a power of ten."""
    number = real(value)
    if number is None:
        return "infinitely many" if value == math.inf else DASH
    if abs(number) >= 1e12:
        power = math.floor(math.log10(abs(number)))
        return f"{number / 10**power:.1f} × 10{_raised(power)}"
    return f"{number:,.0f}"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def times(numbers: Any) -> str:
    """A shape such as 3 × 32 × 32; a dash where there is none."""
    if not numbers:
        return DASH
    return " × ".join(str(n) for n in numbers)
