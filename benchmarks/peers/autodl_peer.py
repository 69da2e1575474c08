"""The regularised evolution of AutoDL-Projects, as it stands in a checkout, asking for one row at a time.

    python autodl_peer.py CHECKOUT

Its settings are those of its script for NATS-Bench (population 10, sample 3); the table's operators
and edges are in its order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import serve_inside
from speed_peer import AUTODL_OPERATORS, Api, autodl_script

POPULATION, SAMPLE = 10, 3


class Asking(Api):
    """A table that is asked over the pipe; it maximises."""

    def __init__(self, ask: Callable[[list[int]], float]) -> None:
        super().__init__([], AUTODL_OPERATORS)
        self.ask = ask

    def simulate_train_eval(
        self, arch: Any, dataset: str, hp: str
    ) -> tuple[float, int, int, float]:
        self.spent += 1.0
        return -self.ask(self.codes(arch)), 0, 0, self.spent


def run(begin: dict[str, Any], ask: Callable[[list[int]], float]) -> None:
    """One search, for as long as it is answered."""
    random.seed(begin["seed"])
    script.regularized_evolution(
        0,
        POPULATION,
        SAMPLE,
        10**9,
        script.random_topology_func(AUTODL_OPERATORS),
        script.mutate_topology_func(AUTODL_OPERATORS),
        Asking(ask),
        False,
        "cifar10",
    )


if __name__ == "__main__":
    script = autodl_script(Path(sys.argv[1]))
    serve_inside(run)
