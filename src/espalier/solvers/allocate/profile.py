"""Sensitivity: how much each option alone harms a trained model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.solvers.allocate.factor import Array, Factor, columns
from espalier.solvers.allocate.pricing import closed
from espalier.space import Candidate, Categorical, Space

Harm = Callable[[Sequence[Candidate]], NDArray[np.float64]]
Record = Callable[[str, Callable[[], Any]], Any]
Progress = Callable[[int, int, str], None]
Codes = NDArray[Any]
_LEAST = 8  # furthest options with a guess that are measured before any is guessed
_SPREAD = 0xF4  # purpose of the random stream


@dataclass(frozen=True)
class Profile:
    """The harm of every option alone, as factors: 0 for the original's.

    `base` is the harm of the original itself, `measure` what harm is, `samples` on how many
    examples it was seen, `seconds` how long that took, `of` the fingerprint of the space. For want of
    time, `drawn` are decisions of which only the furthest option was measured, and `guessed` those of
    which none was.
    """

    factors: tuple[Factor, ...]
    measure: str = ""
    samples: int = 0
    seconds: float = 0.0
    base: float = 0.0
    of: str = ""
    drawn: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()

    def smoothed(self, space: Space) -> Profile:
        """The same with harm of ordered options made to fall towards the original's, and not
        below 0: what rises or is negative is noise (isotonic regression; Barlow et al., 1972)."""
        return replace(self, factors=tuple(_falling(space, f) for f in self.factors))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "factors": [f.to_json() for f in self.factors]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The profile that `to_json` wrote."""
        factors = tuple(map(Factor.from_json, data["factors"]))
        names = {key: tuple(data.get(key, ())) for key in ("drawn", "guessed")}
        return cls(**{**data, "factors": factors, **names})


def profile(
    family: Any,
    harm: Harm,
    *,
    pairs: Iterable[tuple[str, str]] = (),
    record: Record | None = None,
    progress: Progress | None = None,
    measure: str = "",
    samples: int = 0,
    hurried: Callable[[str], bool] | None = None,
    late: Callable[[str], bool] | None = None,
    guess: Mapping[str, float] | None = None,
) -> Profile:
    """Measures the harm of every option alone, the rest as in the original.

    `harm` gives a number a candidate, such as `Calibrated(...).harm`. For each of `pairs` of
    decisions it also measures every combination, which tells what two changes do beyond the sum of
    each. A decision that is not active in the original is measured where it is made active; an
    option that the space's constraints do not let stand beside the original's is forbidden.
    `record(key, compute)` is a study's `once`: what it holds is not measured again, so a profile
    that was stopped goes on. `progress(done, total, text)` counts candidates.
    With `hurried`, asked with the name of a decision, the option furthest from the original's is
    measured of every ordered decision first; where it says yes, those between are drawn as the square
    of the way there, which harm is near a minimum of the loss (LeCun et al., 1990). With `late`, asked
    alike, the furthest option is not measured either where it says yes and `guess` has the decision: its
    harm is the guess, above 0, times what the harm of those measured was of theirs (the median).
    Errors: `EspalierError` where the original itself has no finite harm.
    """
    owner = getattr(harm, "__self__", None)
    measure = measure or str(getattr(owner, "measure", ""))
    samples = samples or int(getattr(owner, "samples", 0))
    work = _Measuring(family, harm, record, progress, f"{measure}:{samples}")
    space: Space = family.space
    parts = [(d.name,) for d in space.decisions if d.count > 1] + _pairs(space, pairs)
    work.total = 1 + sum(math.prod(space[n].count - 1 for n in names) for names in parts)
    base = work.one()
    alone: dict[str, Array] = {}
    factors, drawn = [], []
    furthest = _furthest(work, late, guess or {}) if hurried is not None else {}
    guessed = [d.name for d in space.decisions if d.name in furthest and d.name not in work.told]
    for names in parts:
        known = furthest.get(names[0]) if len(names) == 1 else None
        if known is None:
            values = work.changes(names)
        elif names[0] in guessed:
            values = known[0] * work.way(names[0]) ** 2
            work.skip(names[0], 1)
        elif hurried is not None and np.isfinite(known[0]) and hurried(names[0]):
            values = known[0] * work.way(names[0]) ** 2
            drawn.append(names[0])
            work.skip(names[0])
        else:
            values = np.append(known[:1], work.changes(names, "between")[1:])
        if len(names) == 1:
            alone[names[0]] = values
        else:
            values = values - alone[names[0]][:, None] - alone[names[1]][None, :]
            values[np.isnan(values) | np.isneginf(values)] = 0.0  # one forbids it already
        factors.append(_where_active(space, names, values))
    found = tuple(factors)
    return Profile(
        found, measure, samples, work.seconds, base, space.fingerprint, tuple(drawn), tuple(guessed)
    )


def _furthest(
    work: _Measuring, late: Callable[[str], bool] | None, guess: Mapping[str, float]
) -> dict[str, Array]:
    """What the furthest option of every ordered decision harms, measured or guessed."""
    names = [d.name for d in work.space.decisions if work.between(d.name)]
    if late is not None:  # what is measured when time is up is to stand for the rest
        names = [names[i] for i in np.random.default_rng(_SPREAD).permutation(len(names))]
    found: dict[str, Array] = {}
    missing = []
    times: list[float] = []  # what was measured, by what would have been guessed
    for name in names:
        known = guess.get(name, 0.0) > 0
        if late is not None and known and len(times) >= _LEAST and late(name):
            missing.append(name)
            continue
        found[name] = work.changes((name,), "furthest")
        if known and math.isfinite(found[name][0]) and found[name][0] > 0:
            times.append(float(found[name][0] / guess[name]))
    work.told = set(found)
    return found | {name: np.array([np.median(times) * guess[name]]) for name in missing}


def _pairs(space: Space, given: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Each pair once, in the order of the space; those of which one can't change add nothing."""
    pairs = [tuple(space.names[j] for j in sorted(columns(space, pair))) for pair in given]
    return [p for p in dict.fromkeys(pairs) if all(space[name].count > 1 for name in p)]


class _Measuring:
    """Harm of changes of the original, each measured once."""

    def __init__(
        self, family: Any, harm: Harm, record: Record | None, progress: Progress | None, key: str
    ) -> None:
        self.space: Space = family.space
        given = getattr(family, "original", None)
        self.original = self.space.encode([given]) if given else self.space.corner(True)
        self._harm, self._record = harm, record or (lambda key, compute: compute())
        self._progress = progress or (lambda done, total, text: None)
        self._key = f"harm:{self.space.fingerprint}:{key}"
        self.total, self.done, self.seconds = 0, 0, 0.0
        self.told: set[str] = set()  # whose furthest option was measured

    def one(self) -> float:
        """The harm of the original."""
        found = float(self._measured("original", self.original)[0])
        if not math.isfinite(found):
            raise EspalierError(f"the original's own harm must be a finite number, got {found}")
        self._base = found
        return found

    def between(self, name: str) -> int:
        """How many options lie between the original's and the furthest one of an ordered decision."""
        decision = self.space[name]
        at = int(self._active((name,))[0, columns(self.space, [name])[0]])
        last = not isinstance(decision, Categorical) and at == decision.count - 1
        return max(decision.count - 2, 0) if last else 0

    def way(self, name: str) -> Array:
        """How far each option is on the way from the last to the first one, by its number if it is one."""
        options = self.space[name].options
        if not all(isinstance(o, int | float) for o in options):
            return np.linspace(1, 0, len(options))
        values = np.array(options, dtype=np.float64)
        found: Array = (values[-1] - values) / (values[-1] - values[0])
        return found

    def skip(self, name: str, more: int = 0) -> None:
        """Counts options between the original's and the furthest as done, and so many more."""
        self.done += self.between(name) + more
        self._progress(self.done, self.total, f"sensitivity: {name}")

    def changes(self, names: tuple[str, ...], only: str = "") -> Array:
        """What every combination of some decisions' options adds to the harm; of one decision also
        `only` the "furthest" option, or those "between"."""
        shape = tuple(self.space[n].count for n in names)
        start = self._active(names)
        rows = np.repeat(start, math.prod(shape), axis=0)
        grid = np.indices(shape).reshape(len(shape), len(rows))
        rows[:, columns(self.space, names)] = grid.T
        before = self._base
        if (start != self.original).any():
            before = float(self._measured(f"before {'+'.join(names)}", start)[0])
        # a row that changes less than all of them was measured before, or is the start itself
        new = (rows[:, columns(self.space, names)] != start[:, columns(self.space, names)]).all(
            axis=1
        )
        new &= self.space.valid(rows)
        if only:
            new &= (np.arange(len(rows)) == 0) == (only == "furthest")
        found = np.full(len(rows), math.inf)
        part = "+".join(names) + (f":{only}" if only else "")
        found[new] = self._measured(part, rows[new]) - before
        values = found.reshape(shape)
        at = tuple(int(c) for c in start[0, columns(self.space, names)])
        if len(names) == 1:
            values[at] = 0.0
        else:  # beside an original option nothing is added to what the other does alone
            for axis, code in enumerate(at):
                place: list[Any] = [slice(None)] * len(at)
                place[axis] = code
                values[tuple(place)] = np.nan
        return values

    def _active(self, names: Sequence[str]) -> Codes:
        """The original, with what must be so that the decisions are active."""
        row = self.original.copy()
        for name in closed(self.space, names):
            decision = self.space[name]
            on = self.space.active(row)[0, columns(self.space, [name])[0]]
            for parent, allowed in decision.when.items() if not on else ():
                row[0, columns(self.space, [parent])[0]] = self.space[parent].code(allowed[-1])
            if not on and name in names:  # the last option stands for the original's
                row[0, columns(self.space, [name])[0]] = decision.count - 1
        return self.space.canonical(row)

    def _measured(self, name: str, rows: Codes) -> Array:
        self._progress(self.done, self.total, f"sensitivity: {name}")

        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            harms: Any = self._harm(self.space.decode(rows)) if len(rows) else ()
            plain = [float(h) if math.isfinite(h) else None for h in harms]
            return {"harm": plain, "seconds": time.perf_counter() - start}

        found = self._record(f"{self._key}:{name}", compute)
        self.done += len(rows)
        self.seconds += found["seconds"]
        self._progress(self.done, self.total, f"sensitivity: {name}")
        return np.array([math.inf if h is None else h for h in found["harm"]], dtype=np.float64)


def _where_active(space: Space, names: tuple[str, ...], values: Array) -> Factor:
    """Values of decisions as a factor that counts only where they are active."""
    values = np.where(np.isnan(values), 0.0, values)
    scope = closed(space, names)
    if scope == names:
        return Factor(names, values, name=" x ".join(names))
    rows = np.indices([space[n].count for n in scope]).reshape(len(scope), -1).T
    codes = np.repeat(space.corner(True), len(rows), axis=0)
    codes[:, columns(space, scope)] = rows
    on = space.active(codes)[:, columns(space, names)].all(axis=1)
    at = tuple(rows[:, scope.index(n)] for n in names)
    full = np.where(on, values[at], 0.0).reshape([space[n].count for n in scope])
    return Factor(scope, full, name=" x ".join(names))


def _falling(space: Space, factor: Factor) -> Factor:
    """Harm of one ordered decision that falls along its options; others as they are."""
    name = factor.name
    if name not in factor.decisions or isinstance(space[name], Categorical):
        return factor

    def fall(line: Array) -> Array:
        known = np.isfinite(line)
        out = line.copy()
        if known.any() and line[-1] == 0:
            out[known] = np.maximum(_isotonic(line[known][::-1])[::-1], 0.0)
            out[-1] = 0.0
        return out

    axis = factor.decisions.index(name)
    return replace(factor, values=np.apply_along_axis(fall, axis, factor.values))


def _isotonic(line: Array) -> Array:
    """The rising line that is nearest in least squares, by the formula of largest least means."""
    n = len(line)
    sums = np.concatenate([[0.0], np.cumsum(line)])
    return np.array(
        [
            max(
                min((sums[k] - sums[j]) / (k - j) for k in range(i + 1, n + 1))
                for j in range(i + 1)
            )
            for i in range(n)
        ]
    )
