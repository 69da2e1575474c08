"""A strategy of your own: a hill climber, which asks what lies next to the best it knows."""

import numpy as np

import espalier as esp
from espalier.solvers.strategies.fresh import Seen


class HillClimber(esp.Strategy):
    name = "hill-climber"

    def __init__(self, space, seed=0):
        super().__init__(space, seed)
        self.seen, self.best, self.score = Seen(space), None, [1e300, 1e300]

    def ask(self, n):
        return self.seen.fresh(n, self.rng, self.near)  # random rows once the neighbours are known

    def near(self, n):
        if self.best is None:
            return self.space.sample(n, self.rng)
        return self.rng.permutation(self.space.neighbours(np.array(self.best, self.space.dtype)))

    def tell(self, codes, values, violations):
        self.seen.add(codes)
        scores = np.nan_to_num(np.column_stack([violations, values[:, 0]]), nan=1e300)
        for row, score in zip(codes.tolist(), scores.tolist(), strict=True):
            if score < self.score:  # limits first, then the first objective
                self.best, self.score = row, score

    def state(self):
        rng, seen = self.rng.bit_generator.state, self.seen.to_json()
        return {"rng": rng, "seen": seen, "best": self.best, "score": self.score}

    def load(self, state):
        self.seen = Seen.from_json(self.space, state["seen"])
        self.best, self.score = state["best"], state["score"]
        self.rng.bit_generator.state = state["rng"]
