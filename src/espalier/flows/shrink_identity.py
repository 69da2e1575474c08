"""What a shrink is about, and what of an earlier one of the same model is taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from espalier.compress import Cut, Pretrained
from espalier.costs import OnnxRuntime
from espalier.flows.measuring import plain_runtime
from espalier.flows.paid import Paid
from espalier.problem import Limit
from espalier.tasks import Task


def shrink_identity(
    family: Pretrained,
    task: Task,
    asked: Sequence[Limit],
    runtime: OnnxRuntime,
    solver: str,
    measure: str,
    seed: int,
    cuts: Sequence[Cut],
) -> dict[str, Any]:
    """What must be the same when a study is resumed."""
    return {
        "model": _fingerprint(family.model),
        "shape": list(family.shape),
        "classes": family.classes,
        "space": family.space.fingerprint,
        "cuts": [settings_of(cut) for cut in cuts],
        "decisions": family.space.to_json(),
        "task": task.name,
        "data": task.fingerprint,
        "limits": [x.exact() for x in asked],
        "runtime": plain_runtime(runtime),
        "solver": solver,
        "measure": measure,
        "seed": seed,
    }


def settings_of(cut: Cut) -> dict[str, Any]:
    """What a cut was made with, tensors by a hash."""
    made: dict[str, Any] = {}
    if is_dataclass(cut):
        made = {f.name: getattr(cut, f.name) for f in fields(cut)}
    return {"kind": cut.kind, **{k: _plain(v) for k, v in made.items()}}


def _plain(value: Any) -> Any:
    """A setting as JSON that tells it from others, tensors by a hash; what else JSON can't say, by
    its presence alone."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple | list | range):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _hash({"": value})
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return True


def _fingerprint(model: nn.Module) -> str:
    """A hash of the model's class names and weights."""
    return _hash(model.state_dict(), " ".join(type(m).__qualname__ for m in model.modules()))


def _hash(tensors: Mapping[str, Tensor], told: str = "") -> str:
    digest = hashlib.sha256(told.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).double().numpy().tobytes())
    return digest.hexdigest()[:16]


PAID = Paid(
    same=("model", "shape", "space", "cuts", "data", "measure", "seed"),
    taken=("images", "images of importances", "harm/", "hurried/", "guessed/"),
    timed=("original latency", "latency table"),
    where="runtime",
    dear=("latency table", "harm/"),
)
