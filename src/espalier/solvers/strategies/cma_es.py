"""CMA-ES through Optuna: a normal distribution over all decisions that follows the good rows.

Hansen & Ostermeier, "Completely Derandomized Self-Adaptation in Evolution Strategies" (2001); with
margin, so that whole numbers keep their choice (Hamano et al., 2022). What differs: a categorical
decision is a coordinate an option, of which the largest wins. Extra "bayes".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.errors import EspalierError, MissingExtra
from espalier.solvers.strategies.sampled import Sampled, imported
from espalier.solvers.strategies.strategy import Array, Codes
from espalier.space import Categorical, Real, Space

_TRIES = 10  # so many suggestions in a row that are known already: the distribution has converged
_BROKEN, _FAILED = 1e100, 1e300  # beyond any value that is kept


class CMAES(Sampled):
    """Generations of `population` rows (4 + 3 ln of the coordinates by default).

    All coordinates always vary, those of inactive decisions too. Only the order within a
    generation counts: rows that keep the limits, then those that break them by how much, then
    those that failed. Several objectives are made one: the largest of the objectives, each
    scaled to the range told so far, plus 5% of their sum (Knowles, 2006, with equal weights), so
    the search goes to the middle of the front and not along it. A suggestion known already is
    answered from memory; when ten in a row are, the distribution has converged, and what is asked
    from then on are mutations of the best rows. Rows told that were not asked only count as known.
    """

    name = "cmaes"
    learns = False  # it does learn with one objective (its own tests), and not along a front

    def __init__(self, space: Space, seed: int = 0, population: int | None = None) -> None:
        super().__init__(space, seed)
        if population is not None and population < 4:
            raise EspalierError(f"a generation has at least 4 rows, got {population}")
        self.population = population

    def _begin(self) -> None:
        super()._begin()
        try:
            import cmaes  # noqa: F401
        except ImportError:
            raise MissingExtra("cmaes", "bayes") from None
        self._known: dict[Any, tuple[Array, float]] = {}
        self._codes: dict[Any, Codes] = {}
        self._converged = False
        self._low: Array | None = None
        self._high: Array | None = None

    def _sampler(self) -> Any:
        return imported().samplers.CmaEsSampler(
            seed=self.seed,
            popsize=self.population,
            with_margin=True,
            n_startup_trials=1,
            warn_independent_sampling=False,
        )

    def _new_study(self, objectives: int) -> Any:
        study = super()._new_study(1)
        # the sampler learns of its coordinates from a finished trial
        first = study.ask()
        self._suggest(first)
        study.tell(first, _FAILED)
        return study

    def _suggest(self, trial: Any) -> Codes:
        row = self.space.corner(last=False)
        coordinates = 0
        for j, decision in enumerate(self.space.decisions):
            name = decision.name
            if isinstance(decision, Real):
                row[0, j] = trial.suggest_float(name, decision.low, decision.high, log=decision.log)
                coordinates += 1
            elif isinstance(decision, Categorical) and decision.count > 2:
                weights = [trial.suggest_float(f"{name}={o}", 0, 1) for o in decision.options]
                row[0, j] = int(np.argmax(weights))
                coordinates += decision.count
            elif decision.count > 1:
                row[0, j] = trial.suggest_int(name, 0, decision.count - 1)
                coordinates += 1
        for k in range(coordinates, 2):
            trial.suggest_float(f"spare {k}", 0, 1)  # a covariance has two dimensions or more
        return row

    def _propose(self, n: int, drawn: list[tuple[Any, Any]]) -> Codes:
        """n rows of the sampler; those known are told at once and others drawn in their place."""
        if self._converged:
            return self._near(n)
        rows = [self.space.corner(last=False)[:0]]
        for missing in range(self._allowed(n), 0, -1):
            for _ in range(_TRIES):
                row = self._draw(drawn)
                key, trial = drawn[-1]
                if key not in self._known:
                    rows.append(row)
                    break
                drawn.pop()
                self._study.tell(trial, self._scalar(*self._known[key]))
            else:
                self._converged = True
                rows.append(self._near(missing))
                break
        return np.concatenate(rows)

    def _near(self, n: int) -> Codes:
        """n mutated copies of rows among the best tenth known (five at least)."""
        codes, values = list(self._codes.values()), list(self._known.values())
        order = np.argsort([self._scalar(*v) for v in values], kind="stable")
        parents = self._draws.choice(order[: max(5, len(order) // 10)], n)
        return self.space.mutate(np.stack([codes[i] for i in parents]), self._draws)

    def _report(self, codes: Codes, values: Array, violations: Array) -> None:
        kept = values[(violations <= 0) & ~np.isnan(values).any(axis=1)]
        if len(kept):
            low, high = kept.min(axis=0), kept.max(axis=0)
            self._low = low if self._low is None else np.minimum(self._low, low)
            self._high = high if self._high is None else np.maximum(self._high, high)
        keys = self.space.keys(codes).tolist()
        for key, row, value, broken in zip(keys, codes, values, violations, strict=True):
            self._known[key] = (value, float(broken))
            self._codes[key] = np.array(row)
            trial = self._open.pop(key, None)
            if trial is not None:
                self._study.tell(trial, self._scalar(value, float(broken)))

    def _scalar(self, value: Array, broken: float) -> float:
        if broken > 0:
            return _BROKEN * (1.0 + min(broken, _BROKEN))
        if np.isnan(value).any() or self._low is None or self._high is None:
            return _FAILED
        if len(value) == 1:
            return float(np.clip(value[0], -_BROKEN / 2, _BROKEN / 2))
        span = self._high - self._low
        scaled = (value - self._low) / np.where(span > 0, span, 1.0)
        return float(scaled.max() + 0.05 * scaled.sum())
