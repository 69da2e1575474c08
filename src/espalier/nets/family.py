"""What every family is: a space, and a network for each of its candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from espalier.space import Candidate, Space


class Family(ABC):
    """Turns candidates into networks. Own families subclass it: give `space` and write `build`.

    `shape` is one input without its batch dimension, `classes` the width of the output.
    """

    name: str = "family"
    shape: tuple[int, ...]
    classes: int

    @property
    @abstractmethod
    def space(self) -> Space:
        """The decisions."""

    @abstractmethod
    def build(self, candidate: Candidate) -> nn.Module:
        """A plain network with fresh random weights, none of Espalier's classes in it."""

    def example(self, batch: int = 1) -> Tensor:
        """A zero input of the right shape."""
        return torch.zeros(batch, *self.shape)
