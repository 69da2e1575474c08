"""NePS as a peer: bayesian_optimization, regularized_evolution."""

from __future__ import annotations

import logging
import random
import warnings

import neps
import numpy as np
import torch
from neps.optimizers import algorithms
from neps.optimizers.ask_and_tell import AskAndTell
from serve import serve

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


class Run:
    def __init__(
        self, counts: list[int], kinds: list[str], objectives: int, seed: int, method: str
    ) -> None:
        # NePS draws from the global generators
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        self.names = [f"x{i}" for i in range(len(counts))]
        if method == "bayesian_optimization":
            space = neps.SearchSpace(
                {
                    name: neps.HPOInteger(0, n - 1)
                    if kind == "ordinal"
                    else neps.HPOCategorical(list(range(n)))
                    for name, n, kind in zip(self.names, counts, kinds, strict=True)
                }
            )
            made = algorithms.bayesian_optimization(space)
        else:
            decisions = {
                name: neps.Integer(0, n - 1)
                if kind == "ordinal"
                else neps.Categorical(tuple(range(n)))
                for name, n, kind in zip(self.names, counts, kinds, strict=True)
            }
            space = type("Decisions", (neps.PipelineSpace,), decisions)()
            made = algorithms.neps_regularized_evolution(space, population_size=20)
        self.study = AskAndTell(made)

    def ask(self) -> list[list[int]]:
        self.trial = self.study.ask()
        config = self.trial.config
        if self.names[0] in config:  # a plain search space keeps its names
            return [[config[name] for name in self.names]]
        return [[_option(config, name) for name in self.names]]

    def tell(self, values: list[list[float]]) -> None:
        self.study.tell(self.trial, values[0][0] if len(values[0]) == 1 else values[0])


def _option(config: dict[str, int], name: str) -> int:
    """The choice of a decision in the flat form of a sampled pipeline."""
    return next(int(v) for k, v in config.items() if f".{name}::" in k)


if __name__ == "__main__":
    serve(Run)
