"""Slimming by measured latency: one action after the other, the least importance lost for the time.

As in EfficientFormer (Li et al., 2022), see `recipes.efficientformer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier.nets.metapath import ATTENTION, IDENTITY, POOL
from espalier.space import Candidate, Space

CLOSE = 0.05  # how far below the target nothing more is tried
_ROUNDS = 12  # of correcting the table by what is measured
_HOPELESS = 1.3  # times the target: what the table puts above is not measured
Codes = NDArray[Any]
Milliseconds = Callable[[Codes], NDArray[np.float64]]


class Slimming:
    """Goes down from the largest network, by the least importance lost for a millisecond saved.

    `chances`: of each operator, by decision. The importance of a block is the chance of its operator
    over that of "identity"; that of a stage is the sum over its blocks. Three actions: drop the least
    important block, turn the first attention into a pool, take a step of width off the least
    important stage, which loses that share of its importance.
    """

    def __init__(
        self, space: Space, chances: Mapping[str, list[float]], price: Milliseconds
    ) -> None:
        self.space, self.price = space, price
        self.importance = {
            name: {
                o: p / found[0]
                for o, p in zip(_options(space, name), found, strict=True)
                if o != IDENTITY
            }
            for name, found in chances.items()
        }

    def path(self) -> Iterator[dict[str, Any]]:
        """Each network gone through, from the largest to the smallest: `codes`, `ms`, `action`."""
        row, action = self.space.corner(True), "the largest"
        while True:
            ms = float(self.price(row)[0])
            yield {"codes": row, "ms": ms, "action": action}
            actions = list(self._actions(self.space.decode(row)[0]))
            rows = [self.space.encode([self.space.candidate(other)]) for _, other, _ in actions]
            saved = [ms - float(self.price(r)[0]) for r in rows]
            able = [i for i, s in enumerate(saved) if s > 0]
            if not able:
                return
            best = min(able, key=lambda i: actions[i][2] / saved[i])
            row, action = rows[best], actions[best][0]

    def _actions(self, now: Candidate) -> Iterator[tuple[str, dict[str, Any], float]]:
        """What may be done: its name, the network then, the importance that is lost."""
        worth = {n: v.get(now[n], 0.0) for n, v in self.importance.items()}
        runs = [n for n, value in worth.items() if now[n] != IDENTITY]
        if runs:
            least = min(runs, key=worth.__getitem__)
            yield f"drop {least}", {**now, least: IDENTITY}, worth[least]
        first = next((n for n in runs if now[n] == ATTENTION), None)
        if first is not None:
            lost = max(0.0, worth[first] - self.importance[first][POOL])
            yield f"pool {first}", {**now, first: POOL}, lost
        stages = {
            n: sum(worth[b] for b in runs if _stage(b) == _stage(n)) for n in self._widths(now)
        }
        if stages:
            width = min(stages, key=stages.__getitem__)
            options = _options(self.space, width)
            smaller = options[options.index(now[width]) - 1]
            lost = stages[width] * (1 - int(smaller) / int(now[width]))
            yield f"shrink {width} to {smaller}", {**now, width: smaller}, lost

    def undone(self, row: Codes) -> list[tuple[str, Codes]]:
        """The networks with one option a step larger, the slowest by the table first."""
        found = []
        for column, decision in enumerate(self.space.decisions):
            if row[0, column] + 1 < decision.count:
                other = row.copy()
                other[0, column] += 1
                name = f"give back {decision.name}: {decision.option(int(other[0, column]))}"
                found.append((name, other))
        return sorted(found, key=lambda pair: -float(self.price(pair[1])[0]))

    def _widths(self, now: Candidate) -> list[str]:
        """Widths that can be smaller."""
        names = [n for n in self.space.names if n.endswith(".width")]
        return [n for n in names if now[n] != _options(self.space, n)[0]]


def _options(space: Space, name: str) -> tuple[Any, ...]:
    return tuple(space[name].options)


def _stage(name: str) -> str:
    return name.partition(".")[0]


def met(
    slim: Slimming,
    build: Callable[[Candidate], nn.Module],
    most: float,
    measure: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """The first network on the way whose measured share of the largest's latency is at most `most`.

    The table says where to look; what is measured corrects it, until the step before is too slow. Steps
    are coarse: where much of the time is left, options are given back as long as that keeps the target.
    """
    steps = list(slim.path())
    known: dict[int, float] = {}

    def share(step: int) -> float:
        if step not in known:
            known[step] = measure(build(slim.space.decode(steps[step]["codes"])[0]))
        return known[step]

    largest = steps[0]["ms"]
    at = next((i for i, s in enumerate(steps) if s["ms"] <= most * largest), len(steps) - 1)
    for _ in range(_ROUNDS):
        if share(at) > most and at + 1 < len(steps):
            at += 1
        elif at > 0 and share(at) <= most and share(at - 1) <= most:
            at -= 1
        else:
            break
    row, reached = steps[at]["codes"], share(at)
    taken = [s["action"] for s in steps[1 : at + 1]]
    looks = len(known)
    while reached < (1 - CLOSE) * most:
        ms = float(slim.price(row)[0])
        for action, larger in slim.undone(row):
            if reached * float(slim.price(larger)[0]) / ms > _HOPELESS * most:
                continue
            looks += 1
            found = measure(build(slim.space.decode(larger)[0]))
            if reached < found <= most:
                row, reached = larger, found
                taken.append(action)
                break
        else:
            break
    return {
        "candidate": slim.space.decode(row)[0],
        "share": reached,
        "predicted": float(slim.price(row)[0]) / largest,
        "actions": taken,
        "measured": looks,
    }
