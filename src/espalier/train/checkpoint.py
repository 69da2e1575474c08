"""Checkpoints of a training: one safetensors file, with the counters as JSON in its header.

One file, put in place by one rename, is whole or absent however a process is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier.errors import StudyError

_HEADER = "espalier"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by name, and plain JSON."""

    tensors: dict[str, Tensor]
    counters: dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all. Errors: `StudyError` where the disk refuses."""
    temporary = path.with_name(path.name + ".writing")
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, temporary, metadata={_HEADER: json.dumps(dict(counters))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise StudyError(
            f"can't write the checkpoint {str(path)!r}: {error}; free space or choose another folder"
        ) from error


def read(path: Path) -> Saved | None:
    """The checkpoint at `path`, or None where there is none. Errors: `StudyError` if unreadable."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            counters = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StudyError(
            f"{str(path)!r} is not a checkpoint that can be read ({error}): remove it to train anew"
        ) from error
    return Saved(tensors, counters)


def check(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another training, saying what differs."""
    differs = [
        f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]
    if differs:
        raise StudyError(
            f"the checkpoint {str(path)!r} is of another training: {'; '.join(differs)}. "
            "Remove it or choose another path"
        )


def pack(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and momenta by name."""
    out = {f"weights/{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        momentum = optimiser.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            out[f"momentum/{name}"] = momentum
    return out


def unpack(
    tensors: Mapping[str, Tensor], module: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """Puts weights, buffers and momenta back in place."""
    state = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    module.load_state_dict(state)
    for name, parameter in module.named_parameters():
        momentum = tensors.get(f"momentum/{name}")
        if momentum is not None:
            # laid out in memory as the parameter is, so that the same kernels run
            buffer = torch.empty_like(parameter).copy_(momentum)
            optimiser.state[parameter]["momentum_buffer"] = buffer
