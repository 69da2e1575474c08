"""Sampling: several candidates from the learned probabilities, the best of them by validation.

FBNet (Wu et al., 2019, https://arxiv.org/abs/1812.03443) trains networks that are sampled from its
distribution and keeps the best; here they are tuned for a few epochs from the shared weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.solvers.relax.selection import assemble
from espalier.solvers.relax.state import Selection, SelectionState
from espalier.space import Candidate, Option, Space

_DRAWS = 6  # purpose of the random stream of the draws
_TRIES = 20  # draws a candidate wanted, before fewer have to do


@dataclass
class Sampled(Selection):
    """Draws `n` different candidates, the likeliest among them; the best on validation is chosen.

    With `epochs` each is tuned that long from the shared weights, which are put back afterwards;
    without, it is scored with the shared weights as they are. `log` keeps a row a candidate.
    """

    n: int = 6
    epochs: int = 1
    log: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1 or self.epochs < 0:
            raise EspalierError(
                f"n must be 1 or more and epochs 0 or more, got {self.n} and {self.epochs}"
            )

    def __call__(self, state: SelectionState) -> Candidate:
        space: Space = state.supernet.space
        found = drawn(space, state.probabilities, state.base, self.n, state.seed)
        module = state.supernet
        shared = {name: t.detach().clone() for name, t in module.state_dict().items()}
        self.log.clear()
        for candidate in found:
            if self.epochs:
                state.tune(candidate, self.epochs)
            accuracy = state.evaluate(candidate)
            module.load_state_dict(shared)
            self.log.append({"candidate": candidate.to_json(), "accuracy": accuracy})
        return found[int(np.argmax([row["accuracy"] for row in self.log]))]


def drawn(
    space: Space,
    probabilities: Mapping[str, Tensor],
    base: Mapping[str, Option],
    n: int,
    seed: int,
) -> list[Candidate]:
    """Up to `n` different candidates: the likeliest option of each decision, then draws."""
    rng = np.random.default_rng([seed, _DRAWS])
    found: dict[str, Candidate] = {}
    for turn in range(n * _TRIES):
        chosen = {}
        for name, p in probabilities.items():
            chances = p.double().numpy() / float(p.double().sum())
            index = int(rng.choice(len(chances), p=chances)) if turn else int(np.argmax(chances))
            chosen[name] = torch.eye(len(chances))[index]
        candidate = assemble(space, chosen, base, seed=seed)
        found.setdefault(candidate.id, candidate)
        if len(found) == n:
            break
    return list(found.values())
