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

MOST_IMAGES = 512  # of train, for the kinds that look at data
_EACH = 64


def asked_for(cuts: Sequence[Cut]) -> bool:
    """Whether widths are to keep first what data says, not what their weights or their caller do."""
    widths = [cut for cut in cuts if isinstance(cut, Widths)]
    return any(cut.scores is None and cut.importance != "magnitude" for cut in widths)


def importances(
    family: Pretrained, cuts: Sequence[Cut], task: Task, seed: int, images: int = MOST_IMAGES
) -> dict[str, Tensor]:
    """The importance of every unit `(units,)`, by group: what was given, else what is read, on so
    many images of train in batches."""
    each = min(_EACH, images)
    found: dict[str, Tensor] = {}
    for cut in cuts:
        if not isinstance(cut, Widths):
            continue
        for bound in family.cuts:
            if isinstance(bound, BoundWidths):
                given = {n: s for n, s in (cut.scores or {}).items() if n in bound.groups}
                if len(given) < len(bound.groups):
                    batches = task.batches("train", each, generator(seed))
                    few = itertools.islice(batches, -(-images // each))
                    found |= scores(family.model, bound.groups, cut.importance, few, task.loss)
                found |= given
    return found
