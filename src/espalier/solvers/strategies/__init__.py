"""Strategies propose candidates and learn from how they did: batched ask and tell.

`make("nsga2", space, seed=0)` makes one by name; `STRATEGIES` lists the names. A strategy's file is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, unknown
from espalier.solvers.strategies.strategy import Strategy
from espalier.space import Space

if TYPE_CHECKING:
    from espalier.solvers.strategies.asha import ASHA
    from espalier.solvers.strategies.bohb import BOHB
    from espalier.solvers.strategies.cma_es import CMAES
    from espalier.solvers.strategies.eeea import EEEA
    from espalier.solvers.strategies.evolution import Evolution
    from espalier.solvers.strategies.grid import Grid
    from espalier.solvers.strategies.guided import Guided
    from espalier.solvers.strategies.halving import Hyperband, SuccessiveHalving
    from espalier.solvers.strategies.local import LocalSearch
    from espalier.solvers.strategies.mcts import MCTS
    from espalier.solvers.strategies.nsga2 import NSGA2
    from espalier.solvers.strategies.optuna import GP, TPE
    from espalier.solvers.strategies.random import Random
    from espalier.solvers.strategies.reinforce import Reinforce

_CLASSES = {
    "ASHA": "asha",
    "BOHB": "bohb",
    "CMAES": "cma_es",
    "EEEA": "eeea",
    "Evolution": "evolution",
    "GP": "optuna",
    "Grid": "grid",
    "Guided": "guided",
    "Hyperband": "halving",
    "LocalSearch": "local",
    "MCTS": "mcts",
    "NSGA2": "nsga2",
    "Random": "random",
    "Reinforce": "reinforce",
    "SuccessiveHalving": "halving",
    "TPE": "optuna",
}
STRATEGIES: dict[str, str] = {
    "random": "Random",
    "grid": "Grid",
    "local": "LocalSearch",
    "evolution": "Evolution",
    "nsga2": "NSGA2",
    "eeea": "EEEA",
    "reinforce": "Reinforce",
    "mcts": "MCTS",
    "tpe": "TPE",
    "gp": "GP",
    "cmaes": "CMAES",
    "halving": "SuccessiveHalving",
    "hyperband": "Hyperband",
    "asha": "ASHA",
    "bohb": "BOHB",
    "guided": "Guided",
}


def make(name: str, space: Space, seed: int = 0, **options: Any) -> Strategy:
    """The strategy of a name, over a space. `options` go to its class.

    Raises `EspalierError` for a name that is not in `STRATEGIES`.
    """
    if name not in STRATEGIES:
        raise EspalierError(unknown("strategy", name, STRATEGIES))
    made: Strategy = __getattr__(STRATEGIES[name])(space, seed, **options)
    return made


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)


__all__ = [
    "ASHA",
    "BOHB",
    "CMAES",
    "EEEA",
    "GP",
    "MCTS",
    "NSGA2",
    "STRATEGIES",
    "TPE",
    "Evolution",
    "Grid",
    "Guided",
    "Hyperband",
    "LocalSearch",
    "Random",
    "Reinforce",
    "Strategy",
    "SuccessiveHalving",
    "make",
]
