"""What a search by relaxation found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from espalier.space import Candidate


@dataclass(frozen=True)
class Relaxed:
    """The derived candidate, what the search believed, and how it went.

    `history` has a row an epoch: epoch, loss, arch_loss (None while the architecture rests), lr,
    entropy (nats, mean over decisions), parameterless (decisions between operators whose likeliest
    has no parameters), probabilities, terms (their mean addition to the loss). `monitor`:
    supernet_accuracy (of the mixture), derived_accuracy (of the candidate, with the same weights),
    gap (their difference), all of the task's first metric on validation, sharpness.
    """

    candidate: Candidate
    probabilities: dict[str, list[float]]
    history: list[dict[str, Any]] = field(repr=False)
    monitor: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of everything."""
        return {
            "candidate": self.candidate.to_json(),
            "probabilities": {name: list(p) for name, p in self.probabilities.items()},
            "history": [dict(row) for row in self.history],
            "monitor": dict(self.monitor),
            "seconds": self.seconds,
        }
