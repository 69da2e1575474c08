"""Taking some rows or columns of a module's weights, its own sizes following."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError

Indices = Sequence[int] | Tensor


def indices(chosen: Indices, count: int, what: str) -> Tensor:
    """The chosen ones as (k,) whole numbers, ascending and each once.

    Errors: `EspalierError` where there are none, or one is not of `count`.
    """
    found: Tensor = torch.unique(torch.as_tensor(chosen, dtype=torch.long))
    if not len(found) or int(found[0]) < 0 or int(found[-1]) >= count:
        raise EspalierError(
            f"{what} to keep are one or more of 0 to {count - 1}, got {torch.as_tensor(chosen).tolist()}"
        )
    return found


def aligned(model: nn.Module, count: int, who: str) -> None:
    """Errors: `EspalierError` for a width that the kernel of mixtures does not take: its rows are
    a multiple of 16 bytes."""
    step = 16 // next(model.parameters()).element_size()
    if count % step:
        raise EspalierError(f"{who} a multiple of {step} (rows of 16 bytes), got {count}")


def keep(module: nn.Module, name: str, chosen: Tensor, dim: int) -> None:
    """Leave a parameter with the chosen places of one dimension; None stays None."""
    old = cast("nn.Parameter | None", getattr(module, name, None))
    if old is not None:
        new = old.detach().index_select(dim, chosen.to(old.device))
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def keep_outputs(module: nn.Module, chosen: Tensor) -> None:
    """Leave some outputs of a linear map, of GPT-2's `Conv1D`, or of a convolution."""
    keep(module, "weight", chosen, 1 if flipped(module) else 0)
    keep(module, "bias", chosen, 0)
    _resized(module, ("out_features", "nf", "out_channels"), len(chosen))


def keep_inputs(module: nn.Module, chosen: Tensor) -> None:
    """Leave some inputs of a linear map or of GPT-2's `Conv1D`; some columns of a table."""
    keep(module, "weight", chosen, 0 if flipped(module) else 1)
    _resized(module, ("in_features", "nx", "embedding_dim"), len(chosen))


def flipped(module: nn.Module) -> bool:
    """Whether a module keeps its matrix as (in, out), as GPT-2's `Conv1D` does."""
    return hasattr(module, "nf") and hasattr(module, "nx")


def _resized(module: Any, names: Sequence[str], size: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, size)
