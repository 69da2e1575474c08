"""Optuna's samplers as a peer: tpe, gp, nsga2."""

from __future__ import annotations

import warnings

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from serve import serve

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


class Run:
    def __init__(
        self, counts: list[int], kinds: list[str], objectives: int, seed: int, method: str
    ) -> None:
        samplers = optuna.samplers
        sampler = {
            "tpe": lambda: samplers.TPESampler(seed=seed),
            "gp": lambda: samplers.GPSampler(seed=seed),
            # as many as Espalier's evolution and pymoo have here; Optuna's own default is 50
            "nsga2": lambda: samplers.NSGAIISampler(population_size=20, seed=seed),
        }[method]()
        self.study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
        self.space = {
            f"x{i}": IntDistribution(0, n - 1)
            if kind == "ordinal"
            else CategoricalDistribution(list(range(n)))
            for i, (n, kind) in enumerate(zip(counts, kinds, strict=True))
        }

    def ask(self) -> list[list[int]]:
        self.trial = self.study.ask(self.space)
        return [[self.trial.params[name] for name in self.space]]

    def tell(self, values: list[list[float]]) -> None:
        self.study.tell(self.trial, values[0])


if __name__ == "__main__":
    serve(Run)
