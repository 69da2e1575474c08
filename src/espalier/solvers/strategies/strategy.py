"""What every strategy is: ask for codes, be told how they did. Never sees networks or disks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.space import Space

Codes = NDArray[Any]
Array = NDArray[np.float64]


class Strategy(ABC):
    """Batched ask/tell over one space.

    `ask(n)` gives n valid code rows, none asked before while the space has others (it may give
    fewer when it is exhausted). `tell` takes them back with values `(n, m)`, all to be minimised
    (NaN: the trial failed), and violations `(n,)` (0: every limit kept). `state` is plain JSON
    and holds the generator too: `load(state)` continues exactly.
    """

    name: str = "strategy"

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space = space
        self.rng = np.random.default_rng(seed)

    @abstractmethod
    def ask(self, n: int) -> Codes:
        """The next n candidates as codes `(n, d)`."""

    @abstractmethod
    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """The results of candidates asked before (or known from elsewhere)."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain JSON."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""

    def require_own(self, state: dict[str, Any]) -> None:
        """Raises `EspalierError` for the state of another strategy."""
        if state.get("strategy") != self.name:
            raise EspalierError(
                f"the state is of strategy {state.get('strategy')!r}, this is {self.name!r}"
            )
