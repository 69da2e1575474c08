"""Strategies whose inner state is no JSON: their state is what was asked and told, replayed."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.population import pack, unpack
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space


class Replayed(Strategy):
    """Keeps a log of asks and tells; `load` begins anew with the logged seed and repeats the log.

    A subclass writes `_begin` (everything anew, from `self.seed`), `_ask` and `_tell`. They must
    hang on the seed and the calls alone, and not on `self.rng`, which is not restored.
    """

    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(space, seed)
        self.seed = seed
        self._log: list[dict[str, Any]] = []
        self._begun = False

    @abstractmethod
    def _begin(self) -> None:
        """Sets everything up, from `self.space` and `self.seed`."""

    @abstractmethod
    def _ask(self, n: int) -> Codes:
        """`ask`, without the log."""

    @abstractmethod
    def _tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """`tell`, without the log: values `(n, m)`, violations `(n,)`."""

    def ask(self, n: int) -> Codes:
        """The next n candidates as codes; fewer when the space has no others."""
        self._start()
        codes = self._ask(n)
        self._log.append({"ask": n})
        return codes

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """The results of candidates asked before, or known from elsewhere."""
        if len(codes) == 0:
            return
        self._start()
        codes = np.asarray(codes, dtype=self.space.dtype)
        values = np.asarray(values, dtype=float).reshape(len(codes), -1)
        violations = np.asarray(violations, dtype=float).reshape(len(codes))
        self._tell(codes, values, violations)
        packed = {"codes": codes, "values": values, "violations": violations}
        self._log.append({"tell": {k: pack(v) for k, v in packed.items()}})

    def _start(self) -> None:
        if not self._begun:
            self._begun = True
            self._begin()

    def state(self) -> dict[str, Any]:
        """The seed and the log, as plain JSON."""
        return {"strategy": self.name, "seed": self.seed, "log": list(self._log)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`: repeats its log, which takes as long as the first time."""
        if state.get("strategy") != self.name:
            raise EspalierError(
                f"the state is of strategy {state.get('strategy')!r}, this is {self.name!r}"
            )
        self.seed, self._log, self._begun = int(state["seed"]), [], False
        for call in state["log"]:
            if "ask" in call:
                self.ask(call["ask"])
            else:
                told = {k: unpack(v) for k, v in call["tell"].items()}
                self.tell(told["codes"], told["values"], told["violations"])
