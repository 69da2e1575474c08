"""When a mixture is asked for: what it is for, how far the search has come, and its chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# "weights": a step of the shared weights, no gradient reaches the logits; "architecture": a step of
# the logits; "evaluate": no chance, no gradient.
Phase = Literal["weights", "architecture", "evaluate"]


@dataclass(frozen=True)
class Moment:
    """`progress` goes from 0 to 1 over the whole search.

    `generator` is of this step and this phase alone (on the processor): two mixtures of one moment
    are one sample, if each is drawn from a generator in the same state. None in "evaluate".
    """

    phase: Phase
    epoch: int
    progress: float
    generator: torch.Generator | None = None
