"""How much each channel of a model matters, as the widths of a shrink ask for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from espalier.compress import Cut, Pretrained, Widths
from espalier.compress.importance import scores
from espalier.compress.widths import BoundWidths
from espalier.tasks import Task
from espalier.train.seeds import generator

_BATCHES, _EACH = 8, 64  # of train, for the kinds that look at data


def importances(
    family: Pretrained, cuts: Sequence[Cut], task: Task, seed: int
) -> dict[str, Tensor]:
    """The importance of every unit `(units,)`, by group: what was given, else what is read."""
    found: dict[str, Tensor] = {}
    for cut in cuts:
        if not isinstance(cut, Widths):
            continue
        for bound in family.cuts:
            if isinstance(bound, BoundWidths):
                batches = itertools.islice(task.batches("train", _EACH, generator(seed)), _BATCHES)
                found |= scores(family.model, bound.groups, cut.importance, batches, task.loss)
                found |= {n: s for n, s in (cut.scores or {}).items() if n in bound.groups}
    return found
