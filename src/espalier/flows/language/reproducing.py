"""A shrink of a language model as it was asked for, and the command and Python that run it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.compress import Cut
from espalier.flows.language.cuts import name_of
from espalier.flows.machine import versions
from espalier.problem import Limit

if TYPE_CHECKING:
    from espalier.flows.language.job import LanguageJob

WINDOWS = (512, 64, 128)  # calibration, validation, test
_AT = ("kv_bytes", "prefill_ms", "decode_ms")  # limits that hang on a context length


@dataclass(frozen=True)
class Asked:
    """What the result alone does not say: limits before shares became numbers, and settings."""

    limits: tuple[Limit, ...]
    decisions: str | tuple[str | Cut, ...] | None = None
    repair: bool = True
    baselines: bool = True
    threads: int = 1
    windows: tuple[int, int, int] = WINDOWS


def reproduce(job: LanguageJob) -> dict[str, Any]:
    """The command and the Python that run this shrink again, with all that is not as by default.

    No command where cuts were given that no name stands for.
    """
    model, text, budget, asked = job.folder.path.name, job.task.name, str(job.budget), job.asked
    within = {
        x.metric: x.amount() + (f"@{job.context}" if x.metric in _AT else "") for x in asked.limits
    }
    words = ["espalier", "shrink", model, "--text", text]
    for name, value in within.items():
        words += ["--max", f"{name}={value}"]
    words += ["--context", str(job.task.context), "--budget", budget.replace(" ", "")]
    words += ["--seed", str(job.seed)]
    settings: dict[str, Any] = {"context": job.task.context, "seed": job.seed}
    if asked.decisions is not None:
        settings["decisions"] = named = _named(asked.decisions, job.context)
        words += ["--decisions", named if isinstance(named, str) else ""]
    if job.grouped:
        words, settings = [*words, "--grouped"], {**settings, "grouped": True}
    if job.measure != "divergence":
        words, settings = [*words, "--measure", job.measure], {**settings, "measure": job.measure}
    for name in ("repair", "baselines"):
        if not getattr(asked, name):
            words, settings = [*words, f"--no-{name}"], {**settings, name: False}
    if asked.threads != 1:
        words += ["--threads", str(asked.threads)]
        settings["threads"] = asked.threads
    if asked.windows != WINDOWS:  # has no option on the command line
        settings["windows"] = asked.windows
    said = isinstance(settings.get("decisions", ""), str)
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return {
        "command": shlex.join(words) if said else "",
        "python": f"esp.shrink_language({model!r}, {text!r}, within={within!r}, budget={budget!r}, "
        f"{given})",
        "versions": versions(),
    }


def _named(decisions: str | tuple[str | Cut, ...], length: int) -> str | list[str | Cut]:
    """Names with commas, where there is one for each cut."""
    if isinstance(decisions, str):
        return decisions
    found = [item if isinstance(item, str) else name_of(item, length) or item for item in decisions]
    names = [item for item in found if isinstance(item, str)]
    return ",".join(names) if len(names) == len(found) else found
