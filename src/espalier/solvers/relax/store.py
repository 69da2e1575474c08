"""Checkpoints of a search: everything that the next epoch depends on, in one file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from espalier.solvers.relax.network import NetworkProblem
from espalier.solvers.relax.rules import Rule
from espalier.solvers.relax.terms import Term
from espalier.space import Space
from espalier.train import checkpoint as checkpoints


def save(
    path: Path,
    problem: NetworkProblem,
    rule: Rule,
    terms: Sequence[Term],
    counters: Mapping[str, Any],
) -> None:
    """Writes a checkpoint whole or not at all. Errors: `StudyError` where the disk refuses."""
    tensors = {f"supernet/{name}": t for name, t in problem.tensors().items()}
    for name, logit in problem.logits.items():
        tensors[f"logits/{name}"] = logit
        for key, value in problem.adam.state.get(logit, {}).items():
            tensors[f"adam/{key}/{name}"] = value
    tensors |= {f"relaxation/{name}": t for name, t in problem.relaxation.tensors().items()}
    tensors |= {f"rule/{name}": t for name, t in rule.tensors().items()}
    for index, term in enumerate(terms):
        tensors |= {f"term{index}/{name}": t for name, t in term.tensors().items()}
    checkpoints.write(path, tensors, counters)


def load(
    saved: checkpoints.Saved, problem: NetworkProblem, rule: Rule, terms: Sequence[Term]
) -> None:
    """Puts everything back in place."""
    problem.load(_within(saved.tensors, "supernet/"))
    for name, logit in problem.logits.items():
        logit.data.copy_(saved.tensors[f"logits/{name}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = saved.tensors.get(f"adam/{key}/{name}")
            if value is not None:
                problem.adam.state[logit][key] = value.to(logit.device)
    problem.relaxation.load(_within(saved.tensors, "relaxation/"))
    rule.load(_within(saved.tensors, "rule/"))
    for index, term in enumerate(terms):
        term.load(_within(saved.tensors, f"term{index}/"))


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def described(value: Any) -> Any:
    """A setting as plain JSON that is the same in every process, for comparing checkpoints.

    Objects are told by their class and public attributes, functions by their names, tensors by a
    hash, modules by their class alone.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    kind = type(value)
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return name
    if isinstance(value, nn.Module):
        return kind.__name__
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    if isinstance(value, Space):
        return value.fingerprint
    if dataclasses.is_dataclass(value):
        parts = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
    else:
        own = getattr(value, "__dict__", {})
        parts = {k: described(v) for k, v in own.items() if not k.startswith("_")}
    return {"kind": kind.__name__, **parts}
