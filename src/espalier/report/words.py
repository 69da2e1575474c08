"""What a reader is told about networks, metrics and the question, as short plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.report import numbers
from espalier.report.reading import Entry, Result, mapping

HOW = {
    "counted": "Exact: counted from the network's layers.",
    "predicted": "Summed from pieces measured on this machine, plus an overhead.",
    "estimated": "A stand-in for full training: read with shared or briefly trained weights.",
    "measured": "Read on the real runtime (latency), or after training to the end (accuracy).",
}

PHASES = {"search": "search", "random": "random search"}


def option(value: Any) -> str:
    """An option of a decision as text."""
    if isinstance(value, float):
        return numbers.significant(value, 4)
    return numbers.DASH if value is None else str(value)


def candidate(chosen: Mapping[str, Any]) -> str:
    """A candidate on one line: "kernel=3 width=16"."""
    return " ".join(f"{name}={option(value)}" for name, value in chosen.items())


def how(result: Result, entry: Entry, metric: str) -> str:
    """How one number was obtained, on what, how often: "measured on the 360 test examples"."""
    reading = entry.reading(metric)
    way = str(reading.get("how") or "")
    split = str(reading.get("split") or "")
    if split:
        n = numbers.real(result.task.get(split))
        examples = f"the {numbers.whole(n)} {split} examples" if n else f"the {split} split"
        whole = {"given": "as given, ", "repaired": "repaired, "}.get(
            entry.start.removesuffix(" again"), "trained to the end, "
        )
        weights = {"estimated": "shared weights, ", "measured": whole}.get(way, "")
        if metric.endswith("_before"):
            weights = "as cut, "
        return f"{way}: {weights}{examples}" if way else examples
    if way == "measured" and numbers.kind(metric, entry.unit(metric)) == "ms":
        return f"measured in {runtime(result)}, the median run"
    return {"counted": "counted, exact", "predicted": "predicted from measured pieces"}.get(
        way, way
    )


def spread(entry: Entry, metric: str) -> str:
    """The spread of a reading as "± 0.004 ms", or ''."""
    value = numbers.real(entry.reading(metric).get("spread"))
    if value is None:
        return ""
    unit = entry.unit(metric)
    if numbers.kind(metric, unit) == "share":
        return f"± {value * 100:.1f} points"
    return f"± {numbers.show(value, metric, unit, digits=1, like=entry.value(metric))}"


def question(result: Result) -> list[tuple[str, str]]:
    """The question as terms and texts; what is not known is left out."""
    rows = [
        ("Task", _task(result)),
        ("Model" if result.shrink else "Family", _family(result)),
        ("Limits", ", ".join(str(x) for x in result.limits) or "none"),
        ("Latency is measured by", _runtime(result)),
        ("Machine", _machine(result)),
        ("Decided by", _solver(result)),
        ("Budget" if result.shrink else "Search budget", _budget(result)),
        ("Seed", _text(result.question.get("seed"))),
    ]
    return [(term, text) for term, text in rows if text]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _task(result: Result) -> str:
    task = result.task
    parts = [str(task["name"])] if task.get("name") else []
    if task.get("shape"):
        parts.append(f"inputs {numbers.times(task['shape'])}")
    if task.get("classes") is not None:
        parts.append(f"{task['classes']} classes")
    splits = [(s, numbers.real(task.get(s))) for s in ("train", "validation", "test")]
    counted = [f"{numbers.whole(n)} {s}" for s, n in splits if n is not None]
    return ", ".join([*parts, *([" / ".join(counted) + " examples"] if counted else [])])


def _family(result: Result) -> str:
    family = result.family
    parts = [str(family["name"])] if family.get("name") else []
    decisions = family.get("decisions")
    if isinstance(decisions, (list, tuple)) and decisions:
        parts.append(f"{len(decisions)} decisions")
    if family.get("size") is not None:
        parts.append(f"{numbers.whole(family['size'])} candidates")
    return ", ".join(parts)


def _solver(result: Result) -> str:
    about = result.shrink.get("solver")
    return str(about.get("name") or "") if isinstance(about, Mapping) else ""


def runtime(result: Result) -> str:
    """The runtime's name as people write it, "the runtime" where it is not named."""
    name = str(result.runtime.get("runtime") or result.runtime.get("name") or "")
    return {"onnxruntime": "ONNX Runtime", "": "the runtime"}.get(name, name)


def _runtime(result: Result) -> str:
    about = result.runtime
    if not about:
        return ""
    parts = [" ".join(t for t in (runtime(result), _text(about.get("version"))) if t)]
    parts += [_text(about["device"])] if about.get("device") else []
    threads = about.get("threads")
    if threads is not None:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if about.get("batch") is not None:
        parts.append(f"batch {about['batch']}")
    precision = numbers.real(about.get("precision"))
    if precision:
        parts.append(f"repeated towards ±{precision:.0%}")
    return ", ".join(parts)


def _machine(result: Result) -> str:
    m = result.machine
    cores, memory = numbers.real(m.get("cores")), numbers.real(m.get("memory_gb"))
    parts = [
        _text(m.get("cpu")),
        f"{cores:.0f} {'core' if cores == 1 else 'cores'}" if cores else "",
        f"{memory:g} GB memory" if memory else "",
        _text(m.get("system")),
    ]
    return ", ".join(p for p in parts if p)


def _budget(result: Result) -> str:
    asked = _text(result.question.get("budget") or result.budget.get("asked"))
    spent, trials = numbers.real(result.budget.get("seconds")), result.budget.get("trials")
    used = [numbers.duration(spent)] if spent is not None else []
    if numbers.real(trials) is not None:
        used.append(f"{numbers.whole(trials)} trials")
    tail = f"used {' and '.join(used)}" if used else ""
    return "; ".join(p for p in (asked, tail) if p)


def trusted(result: Result) -> list[str]:
    """Sentences on how far shared weights and a learned architecture can be trusted."""
    return [text for text in (_ranking(result), _gap(result), _sharpness(result)) if text]


def _ranking(result: Result) -> str:
    found = result.ranking
    tau, n = numbers.real(found.get("kendall")), numbers.real(found.get("n"))
    if tau is None or n is None:
        return ""
    ends = [numbers.real(q) for q in found.get("kendall_95") or ()]
    low, high = ends if len(ends) == 2 else (None, None)
    sure = f", 95% between {low:.2f} and {high:.2f}" if low is not None and high is not None else ""
    return (
        f"Estimates on shared weights ordered the {numbers.whole(n)} finalists as training each alone "
        f"does with Kendall's tau {tau:.2f}{sure} (1: the same order, 0: no relation)."
    )


def _gap(result: Result) -> str:
    whole, one = (
        numbers.real(result.monitor.get(f"{name}_accuracy")) for name in ("supernet", "derived")
    )
    if whole is None or one is None:
        return ""
    return (
        f"When the mixture became one network, with the same weights, its score went from {whole:.4g} "
        f"to {one:.4g}."
    )


def _sharpness(result: Result) -> str:
    found = mapping(result.monitor.get("sharpness"))
    mean, radius = numbers.real(found.get("mean")), numbers.real(found.get("radius"))
    if mean is None or radius is None:
        return ""
    return (
        f"Moving the weights by {radius:.0%} of their length, in random directions, raises the loss by "
        f"{mean:.3g} on average: the sharper, the worse such architectures tend to train alone."
    )
