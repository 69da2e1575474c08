"""The usual selection: every decision takes its likeliest option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from espalier.solvers.relax.state import Selection, SelectionState
from espalier.space import Candidate, Decision, Option, Space


class Magnitude(Selection):
    """The largest probability of each decision (DARTS, Liu et al., 2019).

    Options in `without` are passed over, as DARTS passes over "none". A decision that was not
    relaxed but wakes relaxed ones, such as which edges a node has, takes the option whose edges are
    strongest: the mean, over the decisions it wakes, of their largest probability times the strength
    of their edge. With pairs of edges that is DARTS's rule, the two strongest.
    """

    def __init__(self, without: Sequence[Option] = ()) -> None:
        self.without = tuple(without)

    def __call__(self, state: SelectionState) -> Candidate:
        """The candidate; repaired by the space where the constraints do not allow it."""
        space, scores = state.supernet.space, {}
        for name, found in state.probabilities.items():
            options = space[name].options
            allowed = [float(o not in self.without) for o in options]
            scores[name] = found * torch.tensor(allowed) if any(allowed) else found
        return assemble(space, scores, state.base, state.strengths, state.seed)


def assemble(
    space: Space,
    scores: Mapping[str, Tensor],
    base: Mapping[str, Option],
    strengths: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Candidate:
    """The candidate with the best-scored option of each decision, on the processor `(options,)`.

    Decisions without scores are chosen by those they wake, as `Magnitude` says, else taken from
    `base`, else their last option.
    """
    row = space.corner(last=True)
    for j, decision in enumerate(space.decisions):
        if decision.name in scores:
            row[0, j] = int(scores[decision.name].argmax())
        else:
            woken = _by_woken(space, decision, scores, strengths or {})
            if woken is not None:
                row[0, j] = woken
            elif decision.name in base:
                row[0, j] = decision.code(base[decision.name])
    row = space.canonical(row)
    if not space.valid(row).all():
        row = space.repair(row, np.random.default_rng(seed))
    return space.decode(row)[0]


def _by_woken(
    space: Space, parent: Decision, scores: Mapping[str, Tensor], strengths: Mapping[str, Tensor]
) -> int | None:
    """The option whose conditional decisions score best; None where it wakes none that score."""
    children = [d for d in space.decisions if parent.name in d.when and d.name in scores]
    if not children:
        return None
    best = {d.name: float(scores[d.name].max() * strengths.get(d.name, 1.0)) for d in children}
    means = []
    for option in parent.options:
        awake = [best[d.name] for d in children if option in d.when[parent.name]]
        means.append(sum(awake) / len(awake) if awake else 0.0)
    return int(np.argmax(means))
