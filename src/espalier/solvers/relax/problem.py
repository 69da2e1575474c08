"""What an update rule sees: two losses of weights and architecture, and steps down their gradients.

Rules know no images and no networks; so they can be tried on problems that are solved on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

# which half of the data a loss is of, and what is to be learned from it
Part = Literal["train", "validation"]
Wanted = Literal["weights", "architecture", "both"]


class Problem(Protocol):
    """Parameters are changed in place; a loss is of their present values.

    The batches stay the same until the loop goes on to the next step.
    """

    @property
    def weights(self) -> Sequence[nn.Parameter]: ...

    @property
    def architecture(self) -> Sequence[nn.Parameter]: ...

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """That of the weights: SGD."""
        ...

    def loss(self, part: Part, wanted: Wanted) -> Tensor:
        """The loss on this step's batch of a part; `wanted` says what it will be derived by."""
        ...

    def descend(self, wanted: Literal["weights", "architecture"]) -> None:
        """One optimiser step down the gradients that are in `.grad`, which it clears."""
        ...

    def twin(self) -> Problem:
        """The same problem with weights of its own, now equal, and the same architecture."""
        ...
