"""Sampling: several candidates from the learned probabilities, the best of them by validation.

FBNet (Wu et al., 2019, https://arxiv.org/abs/1812.03443) trains networks that are sampled from its
distribution and keeps the best; here they are tuned for a few epochs from the shared weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from espalier.errors import EspalierError
from espalier.solvers.relax.perturbation import complete

if TYPE_CHECKING:
    from espalier.solvers.relax.state import SelectionState
    from espalier.space import Candidate, Space

_DRAWS = 6  # purpose of the random stream of the draws
_TRIES = 20  # draws a candidate wanted, before fewer have to do


@dataclass
class Sampled:
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
        probabilities = {
            name: _normal(p.detach().double().cpu().numpy())
            for name, p in state.relaxation.probabilities(state.logits).items()
        }
        candidates = drawn(space, probabilities, self.n, state.seed)
        shared = {name: t.detach().clone() for name, t in state.supernet.state_dict().items()}
        self.log.clear()
        for candidate in candidates:
            weights = {name: one_hot(space, name, candidate) for name in probabilities}
            if self.epochs:
                state.tune(weights, self.epochs)
            accuracy = state.evaluate(weights)
            state.supernet.load_state_dict(shared)
            self.log.append({"candidate": candidate.to_json(), "accuracy": accuracy})
        best = int(np.argmax([row["accuracy"] for row in self.log]))
        return candidates[best]


def drawn(space: Space, probabilities: Mapping[str, Any], n: int, seed: int) -> list[Candidate]:
    """Up to `n` different candidates: the likeliest option of each decision, then draws."""
    rng = np.random.default_rng([seed, _DRAWS])
    found: dict[str, Candidate] = {}
    for turn in range(n * _TRIES):
        chosen = {}
        for name, p in probabilities.items():
            index = int(np.argmax(p)) if turn == 0 else int(rng.choice(len(p), p=p))
            chosen[name] = space[name].options[index]
        candidate = complete(space, chosen)
        found.setdefault(candidate.id, candidate)
        if len(found) == n:
            break
    return list(found.values())


def one_hot(space: Space, name: str, candidate: Candidate) -> torch.Tensor:
    """Weights `(options,)` that run what the candidate has; the first option where it has nothing."""
    decision = space[name]
    out = torch.zeros(decision.count)
    out[int(decision.code(candidate[name])) if name in candidate else 0] = 1.0
    return out


def _normal(p: Any) -> Any:
    return p / p.sum()
