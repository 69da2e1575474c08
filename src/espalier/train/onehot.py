"""Candidates as one-hot weights of their options, which a supernet mixes by; and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from espalier.errors import SpaceError
from espalier.space import Candidate, Real, Space


def one_hot(space: Space, chosen: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Candidates as rows `{decision: (n, options)}`; what is inactive is at its last option.

    Errors: `SpaceError` for an option that its decision does not have, and for a real decision.
    """
    out = {}
    for decision in space.decisions:
        if isinstance(decision, Real):
            raise SpaceError(
                f"{decision.name!r} is a real decision, which has no options to mix: give it options"
            )
        last = decision.options[-1]
        codes = [int(decision.code(c.get(decision.name, last))) for c in chosen]
        out[decision.name] = functional.one_hot(torch.tensor(codes), decision.count).float()
    return out


def candidates(space: Space, weights: Mapping[str, Tensor]) -> list[Candidate]:
    """What rows `{decision: (n, options)}` weigh most, as `n` candidates."""
    columns = [weights[name].detach().argmax(dim=1).cpu().numpy() for name in space.names]
    codes = np.stack(columns, axis=1).astype(space.dtype)
    return list(space.decode(space.canonical(codes)))


def shares(weights: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Rows of `k` candidates as a row for each of `batch` samples: runs of samples share one.

    The runs are as equal as they can be; with fewer samples than candidates the last are left out.
    """
    first = next(iter(weights.values()))
    k = min(len(first), batch)
    of = torch.arange(batch, device=first.device) * k // batch
    return {name: rows[of] for name, rows in weights.items()}
