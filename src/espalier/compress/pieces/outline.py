"""A model as shapes alone, on torch's meta device: what only asks for shapes then computes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.compress.calls import Pass, follow


@dataclass(frozen=True)
class Outline:
    """A model without values, and an example of its input."""

    model: nn.Module
    example: Tensor


def outline(model: nn.Module, example: Tensor, run: Pass) -> Outline | None:
    """The outline of a model, held against a pass of the model itself: None where it does other
    operations, since values decide them, or none at all."""
    try:
        found = Outline(without_values(model), example.to("meta"))
        other = follow(found.model, found.example)
    except Exception:  # whatever a model says of numbers that are not there
        return None
    return found if _told(other) == _told(run) else None


def without_values(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes and no values; those that are shared stay so."""
    with torch.no_grad():
        state = (*model.parameters(), *model.buffers())
        known = {id(t): _empty(t) for t in state}
    return copy.deepcopy(model, known)


def _empty(tensor: Tensor) -> Tensor:
    made = tensor.to("meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _told(run: Pass) -> list[object]:
    return [(s.name, s.call, s.macs, s.shapes, s.out_shape) for s in run.steps]
