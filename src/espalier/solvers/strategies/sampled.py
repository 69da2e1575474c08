"""What the strategies through Optuna share: a study in memory, told rows as its trials."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from espalier.errors import MissingExtra
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.replayed import Replayed
from espalier.solvers.strategies.strategy import Array, Codes

_REDRAWS = 4  # or a quarter of a batch: rows drawn again in place of those known, in one ask


class Sampled(Replayed):
    """Asks a sampler of Optuna for rows and tells its study how they did.

    Before the first tell, rows are random: only a tell says how many objectives there are. Rows
    that the sampler repeats are drawn anew, and filled up at random where it goes on repeating.
    State: the log of asks and tells, replayed. Errors: `MissingExtra` without Optuna.
    """

    most: float = math.inf  # rows of one ask that the sampler gives; the others are random

    def _begin(self) -> None:
        imported()
        self._draws = np.random.default_rng(self.seed)
        self._seen = Seen(self.space)
        self._told: set[Any] = set()
        self._study: Any = None
        self._ended = False  # the space has no row left
        self._open: dict[Any, Any] = {}  # trials that run, by the key of their row

    @abstractmethod
    def _sampler(self) -> Any:
        """A new sampler, from `self.seed`."""

    @abstractmethod
    def _suggest(self, trial: Any) -> Codes:
        """The row `(1, d)` that a trial suggests; it need not be canonical nor valid."""

    @abstractmethod
    def _report(self, codes: Codes, values: Array, violations: Array) -> None:
        """Tells the study of rows, none told before."""

    def _ask(self, n: int) -> Codes:
        with quiet():
            if self._study is None or self._ended:
                return self._seen.fresh(n, self._draws)
            drawn: list[tuple[Any, Any]] = []
            self._redraws = max(_REDRAWS, n // 4)
            self._first = int(min(n, self.most, self.space.size - len(self._seen)))
            codes = self._seen.fresh(n, self._draws, lambda k: self._propose(k, drawn))
            asked = set(self.space.keys(codes).tolist())
            for key, trial in drawn:
                if key in asked and key not in self._open:
                    self._open[key] = trial
                else:
                    self._drop(trial)
            self._ended = len(codes) < n
            return codes

    def _propose(self, n: int, drawn: list[tuple[Any, Any]]) -> Codes:
        """n rows of the sampler; what is drawn is noted with its trial."""
        rows = [self.space.corner(last=False)[:0]]
        rows += [self._draw(drawn) for _ in range(self._allowed(n))]
        return np.concatenate(rows)

    def _draw(self, drawn: list[tuple[Any, Any]]) -> Codes:
        """One row of the sampler `(1, d)`, canonical and valid; noted with its trial."""
        trial = self._study.ask()
        row = self.space.canonical(self._suggest(trial))
        valid = bool(self.space.valid(row)[0])
        # what is mended is not what the trial suggested: its row is reported without it
        drawn.append((self.space.keys(row).tolist()[0] if valid else None, trial))
        return row if valid else self.space.repair(row, self._draws)

    def _allowed(self, n: int) -> int:
        """How many of n rows may still be drawn in this ask: each once, and a few again."""
        first = min(n, self._first)
        again = min(n - first, self._redraws)
        self._first -= first
        self._redraws -= again
        return first + again

    def _tell(self, codes: Codes, values: Array, violations: Array) -> None:
        keys = self.space.keys(codes).tolist()
        new = [i for i, k in enumerate(keys) if k not in self._told and k not in keys[:i]]
        if not new:
            return
        self._seen.add(codes[new])
        self._told.update(keys[i] for i in new)
        with quiet():
            if self._study is None:
                self._study = self._new_study(values.shape[1])
            broken = np.nan_to_num(violations[new], nan=np.inf, posinf=np.inf)
            self._report(codes[new], values[new], np.maximum(broken, 0.0))

    def _new_study(self, objectives: int) -> Any:
        directions = ["minimize"] * objectives
        return imported().create_study(sampler=self._sampler(), directions=directions)

    def _drop(self, trial: Any) -> None:
        """Ends a trial that has no result."""
        self._study.tell(trial, state=imported().trial.TrialState.FAIL)


def imported() -> Any:
    """The module optuna. Errors: `MissingExtra`."""
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "bayes") from None
    return optuna


@contextmanager
def quiet() -> Iterator[None]:
    """No lines of Optuna's log, no warnings that parts of it are experimental; then as before."""
    logging = imported().logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
