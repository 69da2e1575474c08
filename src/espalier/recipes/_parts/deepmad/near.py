"""The program of a design near another one: its options, rules, tables and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import Limit
from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes._parts.deepmad.entropy import Wanted
from espalier.solvers.allocate import Factor
from espalier.space import Candidate, Constraint, Linear, Space, integer, ordinal

Array = NDArray[np.float64]
Choices = Mapping[str, Any]
_REACH = 3  # steps to each side
_MARGIN = (
    100.0  # added to both sides of the limit on effectiveness, so that it is a positive number
)
_CODE = 100  # inner width and kernel as one option: inner * _CODE + kernel


class Near:
    """The program near one design."""

    def __init__(self, wanted: Wanted, center: Choices, step: float | None) -> None:
        self.wanted, self.center = wanted, center
        self.names = wanted.layout.groups
        widest = wanted.widest
        self.stem = list(wanted.stems)
        self.outs = [_near(center[f"{g}.out"], step, widest) for g in self.names]
        inner = [_near(center[f"{g}.inner"], step, 6 * widest) for g in self.names]
        self.bodies = [[(i, k) for i in found for k in wanted.kernels] for found in inner]
        self.depths = [self._depths(n, step) for n in range(len(self.names))]
        self.space = Space(self._decisions(), self._rules())

    def _depths(self, n: int, step: float | None) -> list[int]:
        at = self.center[f"{self.names[n]}.depth"]
        most = 3 if n == 0 else self.wanted.deepest
        reach = (1, 2, 4) if step and step > 1.2 else (1, 2)
        found = {at, *(at + r for r in reach), *(at - r for r in reach)}
        return sorted(d for d in found if 1 <= d <= most)

    # --- the space: totals of blocks beside the decisions ------------------------------------

    def _decisions(self) -> list[Any]:
        found: list[Any] = [ordinal("stem", *self.stem)]
        for n, g in enumerate(self.names):
            found.append(ordinal(f"{g}.out", *self.outs[n]))
            found.append(ordinal(f"{g}.body", *(i * _CODE + k for i, k in self.bodies[n])))
            found.append(ordinal(f"{g}.depth", *self.depths[n]))
        for n in self._stage_ends():
            low = sum(d[0] for d in self.depths[: n + 1])
            high = sum(d[-1] for d in self.depths[: n + 1])
            found.append(integer(f"blocks{n + 1}", low, high))
        return found

    def _rules(self) -> list[Constraint]:
        rules: list[Constraint] = []
        before = "stem"
        for g in self.names:
            rules.append(Linear({before: 4.0, f"{g}.out": -1.0}, ">=", 0.0))
            if self.wanted.layout.depthwise:
                rules.append(Linear({f"{g}.out": 1.0, before: -1.0}, ">=", 0.0))
            before = f"{g}.out"
        for n in self._stage_ends():
            terms = {f"{g}.depth": 1.0 for g in self.names[: n + 1]} | {f"blocks{n + 1}": -1.0}
            rules += [Linear(terms, "<=", 0.0), Linear(terms, ">=", 0.0)]
        return rules

    def _stage_ends(self) -> list[int]:
        """The last group of each stage that has groups."""
        stages = self.wanted.stages
        return [n for n, s in enumerate(stages) if n + 1 == len(stages) or stages[n + 1] != s]

    def encoded(self, choices: Choices) -> Candidate:
        """A design as a candidate of the program."""
        out: dict[str, Any] = {"stem": choices["stem"]}
        for g in self.names:
            out[f"{g}.out"], out[f"{g}.depth"] = choices[f"{g}.out"], choices[f"{g}.depth"]
            out[f"{g}.body"] = choices[f"{g}.inner"] * _CODE + choices[f"{g}.kernel"]
        for n in self._stage_ends():
            out[f"blocks{n + 1}"] = sum(choices[f"{g}.depth"] for g in self.names[: n + 1])
        return self.space.candidate(out)

    def decoded(self, candidate: Mapping[str, Any]) -> dict[str, int]:
        """A candidate of the program as a design."""
        out = {"stem": int(candidate["stem"])}
        for g in self.names:
            inner, kernel = divmod(int(candidate[f"{g}.body"]), _CODE)
            out |= {f"{g}.out": int(candidate[f"{g}.out"]), f"{g}.inner": inner}
            out |= {f"{g}.kernel": kernel, f"{g}.depth": int(candidate[f"{g}.depth"])}
        return out

    # --- tables ------------------------------------------------------------------------------

    def _inputs(self, n: int) -> tuple[str, Array]:
        """The decision that a group's input width is, and its options."""
        if n == 0:
            return "stem", np.array(self.stem, dtype=float)
        return f"{self.names[n - 1]}.out", np.array(self.outs[n - 1], dtype=float)

    def _group(self, n: int) -> tuple[Array, Array, Array, Array]:
        """Outs `(o, 1, 1)`, inner widths and kernels `(b, 1)`, depths `(d,)`, to be broadcast."""
        body = np.array(self.bodies[n], dtype=float)
        outs = np.array(self.outs[n], dtype=float)[:, None, None]
        return outs, body[:, 0, None], body[:, 1, None], np.array(self.depths[n], dtype=float)

    def _scope(self, n: int) -> tuple[str, str, str]:
        g = self.names[n]
        return f"{g}.out", f"{g}.body", f"{g}.depth"

    def _entropies(self, n: int) -> list[Factor]:
        """The entropy of a group: of its input's width, and of the rest."""
        name, inputs = self._inputs(n)
        out, inner, kernel, depth = self._group(n)
        one = deepmad.entropy(self.wanted, 1.0, inner, kernel)
        body = depth * one + (depth - 1) * 0.5 * np.log(out)
        return [Factor((name,), 0.5 * np.log(inputs)), Factor(self._scope(n), body)]

    def harm(self) -> list[Factor]:
        """The score, negative, linear around the center in products; the penalty exactly."""
        wanted, center = self.wanted, deepmad.stages(self.wanted, self.center)
        weights = [w * s.size for w, s in zip(wanted.weights, center, strict=True)]
        factors: list[Factor] = []
        for n, stage in enumerate(wanted.stages):
            share = sum(weights[stage:])
            factors += [_times(f, -share) for f in self._entropies(n)]
        for n, stage in zip(self._stage_ends(), sorted(set(wanted.stages)), strict=True):
            name, options = self._inputs(n + 1)
            slope = wanted.weights[stage] * center[stage].entropy
            if n + 1 == len(self.names) and wanted.layout.head:
                # the head's width is given; its entropy is that of its input
                factors.append(Factor((name,), -weights[-1] * 0.5 * np.log(options)))
            else:
                factors.append(Factor((name,), -slope * np.log(options)))
        if 0 not in wanted.stages:
            slope = wanted.weights[0] * center[0].entropy
            factors.append(Factor(("stem",), -slope * np.log(np.array(self.stem, dtype=float))))
        return [*factors, self._penalty(), *self._shapes()]

    def _penalty(self) -> Factor:
        late = range(self.wanted.uneven, len(self.names))
        grid = np.stack(np.meshgrid(*(self.depths[n] for n in late), indexing="ij"), axis=-1)
        depths = np.concatenate([np.zeros((*grid.shape[:-1], self.wanted.uneven)), grid], axis=-1)
        names = tuple(f"{self.names[n]}.depth" for n in late)
        return Factor(names, self.wanted.depth_penalty(depths))

    def _shapes(self) -> list[Factor]:
        """Inner widths that do not go with an outer one are forbidden."""
        factors = []
        for n, g in enumerate(self.names):
            out, inner, _, _ = (a[..., 0] for a in self._group(n))
            if self.wanted.layout.depthwise:
                good = (inner >= 1.5 * out) & (inner <= 6 * out)
            else:
                good = (inner <= out) & (10 * inner >= out)
            factors.append(Factor((f"{g}.out", f"{g}.body"), np.where(good, 0.0, np.inf)))
        return factors

    def costs(self) -> dict[str, list[Factor]]:
        """Flops, parameters, and for each stage what effectiveness needs."""
        wanted = self.wanted
        last, options = self._inputs(len(self.names))
        stem = np.array(self.stem, dtype=float)
        zero = deepmad.ends(wanted, 0.0, 0.0)
        both: list[list[Factor]] = [[], []]
        for k, (a, b) in enumerate(
            zip(deepmad.ends(wanted, stem, 0.0), deepmad.ends(wanted, 0.0, options), strict=True)
        ):
            both[k] += [Factor(("stem",), a), Factor((last,), b - zero[k] + 0.0 * options)]
        for n, g in enumerate(self.names):
            name, inputs = self._inputs(n)
            out, inner, kernel, depth = self._group(n)
            flat = inner[:, 0]
            for scope, pair in (
                ((name, f"{g}.body"), deepmad.narrowing(wanted, n, inputs[:, None], flat)),
                ((name, f"{g}.out"), deepmad.projecting(wanted, n, inputs[:, None], out[:, 0, 0])),
                (self._scope(n), deepmad.rest(wanted, n, inner, kernel, out, depth)),
            ):
                for k in range(2):
                    both[k].append(Factor(scope, pair[k]))
        return {"flops": both[0], "params": both[1], **self._effectiveness()}

    def _effectiveness(self) -> dict[str, list[Factor]]:
        """Logs of widths less what so many layers need: 0 or more where it is kept."""
        rho = self.wanted.effectiveness
        if rho is None:
            return {}
        found, sums = {}, [Factor((), np.array(_MARGIN + math.log(9 * self.wanted.channels)))]
        for n in range(len(self.names)):
            sums = [*sums, *(_times(f, 2.0) for f in self._entropies(n))]
            if n not in self._stage_ends():
                continue
            decision = self.space[f"blocks{n + 1}"]
            layers = 1.0 + 3.0 * np.array([int(o) for o in decision.options])
            more: list[Factor] = []
            if n + 1 == len(self.names) and self.wanted.layout.head:
                name, options = self._inputs(n + 1)
                layers, more = layers + 1.0, [Factor((name,), np.log(options))]
            needed = Factor((decision.name,), -layers * np.log(layers / rho))
            found[f"effectiveness{n + 1}"] = [*sums, *more, needed]
        return found

    def limits(self) -> list[Limit]:
        """The limits on these costs."""
        found = [Limit("flops", self.wanted.flops), Limit("params", self.wanted.params)]
        if self.wanted.effectiveness is not None:
            found += [Limit(f"effectiveness{n + 1}", _MARGIN, ">=") for n in self._stage_ends()]
        return found


def _times(factor: Factor, by: float) -> Factor:
    return Factor(factor.decisions, by * factor.values)


def eight(x: float) -> int:
    """The nearest multiple of 8, at least 8."""
    return max(8, round(x / 8) * 8)


def _near(value: int, step: float | None, most: int) -> list[int]:
    """Widths around a width, multiples of 8."""
    reach = range(-_REACH, _REACH + 1)
    found = {eight(value * step**t) if step else value + 8 * t for t in reach}
    return sorted(w for w in found | {value} if 8 <= w <= most)
