"""Bayesian samplers of Optuna (Akiba et al., 2019): tree-structured Parzen estimators and
Gaussian processes. CMA-ES is in `cma_es.py`.

Discrete decisions are ordered numbers or categories of their codes, real ones floats (with `log`
where the decision has it). An inactive decision is not suggested. Extra "bayes".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.sampled import Sampled, imported
from espalier.solvers.strategies.strategy import Array, Codes
from espalier.solvers.strategies.turns import Turns
from espalier.space import Categorical, Decision, Real, Space


class Suggested(Sampled):
    """Suggests decision by decision, parents first; every told row is a trial of the study.

    Limits are a constraint of the study: a row's violation v counts as v / (1 + v), which keeps
    the order and makes infinity 1. A row that failed is left out, as samplers do with failed trials.
    """

    def __init__(self, space: Space, seed: int = 0, startup: int = 10) -> None:
        super().__init__(space, seed)
        if startup < 2:
            raise EspalierError(f"a sampler starts with at least 2 random rows, got {startup}")
        self.startup = startup

    def _begin(self) -> None:
        super()._begin()
        self._turns = Turns(self.space)
        self._distributions = [_distribution(d) for d in self.space.decisions]
        self._trials: list[Any] = []
        self._limited = False
        self._worst: Array | None = None

    def _suggest(self, trial: Any) -> Codes:
        row = self.space.corner(last=False)
        masks = np.zeros(row.shape, dtype=np.bool_)
        for j in self._turns.order:
            masks[:, j] = self._turns.active(j, row, masks)
            if masks[0, j]:
                row[0, j] = self._one(trial, self.space.names[j], self._distributions[j])
        return row

    def _one(self, trial: Any, name: str, distribution: Any) -> float:
        if hasattr(distribution, "choices"):
            return float(trial.suggest_categorical(name, distribution.choices))
        kind = "int" if isinstance(distribution.low, int) else "float"
        suggest = getattr(trial, f"suggest_{kind}")
        return float(suggest(name, distribution.low, distribution.high, log=distribution.log))

    def _report(self, codes: Codes, values: Array, violations: Array) -> None:
        done = [self._open.pop(k, None) for k in self.space.keys(codes).tolist()]
        for trial in filter(None, done):
            self._drop(trial)  # its place is taken by the trial added below
        if (violations > 0).any() and not self._limited:
            self._limit(values.shape[1])
        known = values[~np.isnan(values).any(axis=1)]
        if len(known):
            worst = known.max(axis=0)
            self._worst = worst if self._worst is None else np.maximum(self._worst, worst)
        masks = self.space.active(codes)
        for row, mask, value, broken in zip(codes, masks, values, violations, strict=True):
            self._add(self._params(row, mask), value, float(broken))

    def _limit(self, objectives: int) -> None:
        """Begins the study anew, with a constraint that all rows so far keep.

        Without broken limits there is none: a Gaussian process would be fit to it at each ask.
        """
        self._limited = True
        before, self._trials = self._trials, []
        self._open.clear()
        self._study = self._new_study(objectives)
        for params, value in before:
            self._add(params, value, 0.0)

    def _add(self, params: dict[str, Any], value: Array, broken: float) -> None:
        optuna = imported()
        if not self._limited:
            self._trials.append((params, value))
        if np.isnan(value).any():
            if broken <= 0:
                return  # failed: nothing is known that a sampler could be told
            # hardly looked at where a limit is broken, but must be a number
            value = np.zeros(len(value)) if self._worst is None else self._worst
        names = self.space.names
        trial = optuna.trial.create_trial(
            params=params,
            distributions={
                n: d for n, d in zip(names, self._distributions, strict=True) if n in params
            },
            values=[float(v) for v in value],
            constraints={"limits": _squashed(broken)} if self._limited else None,
        )
        self._study.add_trial(trial)

    def _params(self, row: Codes, mask: Codes) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for j, decision in enumerate(self.space.decisions):
            if mask[j]:
                out[decision.name] = float(row[j]) if isinstance(decision, Real) else int(row[j])
        return out


class TPE(Suggested):
    """Tree-structured Parzen estimators (Bergstra et al., 2011), over all decisions jointly
    (Falkner et al., 2018); several objectives by non-domination (Ozaki et al., 2022).

    The first `startup` rows are random. A row that is being evaluated counts as a bad one, so
    that a batch spreads.
    """

    name = "tpe"
    learns = False  # it does learn (its own tests): the suite's long runs would take minutes

    def _sampler(self) -> Any:
        return imported().samplers.TPESampler(
            seed=self.seed,
            n_startup_trials=self.startup,
            multivariate=True,
            group=True,  # decisions of different conditions are models of their own
            constant_liar=True,
        )


class GP(Suggested):
    """Gaussian process with expected improvement, of hypervolume with several objectives.

    The first `startup` rows are random. An ask takes 0.1 s to seconds and grows with decisions and
    rows: for tens to hundreds of dear trials. Of a batch at most `most` rows are the process's, the
    others random. Decisions with a condition are drawn at random.
    """

    name = "gp"
    learns = False  # it does learn (its own tests): the suite's long runs would take hours

    def __init__(self, space: Space, seed: int = 0, startup: int = 10, most: int = 8) -> None:
        super().__init__(space, seed, startup)
        if most < 1:
            raise EspalierError(f"of a batch at least 1 row is the process's, got most={most}")
        self.most = most

    def _sampler(self) -> Any:
        return imported().samplers.GPSampler(
            seed=self.seed, n_startup_trials=self.startup, deterministic_objective=True
        )


def _distribution(decision: Decision) -> Any:
    kinds = imported().distributions
    if isinstance(decision, Real):
        return kinds.FloatDistribution(decision.low, decision.high, log=decision.log)
    if isinstance(decision, Categorical):
        return kinds.CategoricalDistribution(tuple(range(decision.count)))
    return kinds.IntDistribution(0, decision.count - 1)


def _squashed(violation: float) -> float:
    return 1.0 if np.isinf(violation) else violation / (1.0 + violation)
