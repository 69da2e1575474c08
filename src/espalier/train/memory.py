"""What sampling by complexity learns, in buffers, so that a training finds it again in a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """What a resumed training has to find again, as buffers: the generator, its moments, the bins.

    The generator is no child, so that the supernet's optimiser leaves it alone.
    """

    probabilities: Tensor
    before: Tensor
    noted: Tensor
    state: Tensor
    taken: Tensor

    def __init__(self, generator: nn.Module, bins: int, lr: float) -> None:
        super().__init__()
        self._learned = list(generator.parameters())
        self._adam = torch.optim.Adam(self._learned, lr=lr, betas=(0.9, 0.99))
        size = sum(p.numel() for p in self._learned)
        self.register_buffer("probabilities", torch.full((bins,), 1 / bins))
        self.register_buffer("before", torch.full((bins,), float("nan")))
        self.register_buffer("noted", torch.zeros(2, bins))  # sums of losses, and how many
        self.register_buffer("state", torch.zeros(3, size))  # weights and two moments
        self.register_buffer("taken", torch.zeros(()))
        self.keep()

    def step(self) -> None:
        """One step of the generator on the gradients that it has."""
        nn.utils.clip_grad_norm_(self._learned, 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def note(self, index: int, loss: float) -> None:
        """Adds a loss to those of a bin."""
        self.noted[0, index] += loss
        self.noted[1, index] += 1

    def shift(self, sharpness: float) -> None:
        """Makes bins likelier whose mean loss fell more since the last time.

        A bin that was not drawn since keeps the loss that it had.
        """
        now = torch.where(self.noted[1] > 0, self.noted[0] / self.noted[1], self.before)
        fell = self.before - now
        if not bool(fell.isnan().any()):
            self.probabilities.copy_(torch.softmax(sharpness * fell, 0))
        self.before.copy_(now)
        self.noted.zero_()

    @torch.no_grad()
    def keep(self) -> None:
        """Copies the generator and its moments into the buffers."""
        held = [self._adam.state.get(p, {}) for p in self._learned]
        pairs = list(zip(self._learned, held, strict=True))
        self.state[0] = torch.cat([p.flatten() for p in self._learned])
        for row, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            self.state[row] = torch.cat(
                [h.get(name, torch.zeros_like(p)).flatten() for p, h in pairs]
            )
        self.taken.fill_(next((float(h["step"]) for h in held if h), 0.0))

    @torch.no_grad()
    def restore(self) -> None:
        """Brings the generator and its moments back."""
        start = 0
        for p in self._learned:
            own = self.state[:, start : start + p.numel()].reshape(3, *p.shape).clone()
            start += p.numel()
            p.copy_(own[0])
            if self.taken:
                self._adam.state[p] = {
                    "step": self.taken.clone(),
                    "exp_avg": own[1],
                    "exp_avg_sq": own[2],
                }

    def to_json(self) -> dict[str, Any]:
        """The bins."""
        losses = [None if np.isnan(x) else x for x in self.before.tolist()]
        return {"probabilities": self.probabilities.tolist(), "losses": losses}
