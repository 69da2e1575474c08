"""Where a block may be left out only if what goes into it is as wide as what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise, product

from espalier.compress.cut import BoundCut
from espalier.space import Decision, Forbid
from espalier.space.options import Option

Runs = Callable[[Mapping[str, Option]], bool]


def matched(decisions: Sequence[Decision], cuts: Sequence[BoundCut], runs: Runs) -> list[Forbid]:
    """The combinations of widths around a block that do not fit when it is left out.

    A block whose input and output are of one group, as in residual networks, has none. `runs` says
    whether the model runs, and gives the shape it gave, with some decisions changed, the others as
    in the original.
    """
    reach = _reach(cuts)
    widths = [d for d in decisions if d.name.startswith("width:")]
    edges: dict[str, list[Decision]] = {}
    blocks = [d for d in decisions if d.name.startswith("depth:")]
    for block in blocks:
        inside = reach.get(block.name, set())
        around = [w for w in widths if reach.get(w.name, set()) & inside]
        edges[block.name] = [w for w in around if reach[w.name] - inside]
    found: list[Forbid] = []
    for some in _apart([b for b in blocks if edges[b.name]]):
        if not _any_widths_fit(some, edges, runs):
            for block in some:
                found += _unfit(block, edges[block.name], runs)
    return found


def _reach(cuts: Iterable[BoundCut]) -> dict[str, set[str]]:
    """Decision -> the layers it changes."""
    reach: dict[str, set[str]] = {}
    for cut in cuts:
        for path, names in cut.layers().items():
            for name in names:
                reach.setdefault(name, set()).add(path)
    return reach


def _apart(blocks: Sequence[Decision]) -> list[list[Decision]]:
    """Blocks to be tried at once: none within another, no two that follow each other, so that what
    one gives is taken by layers that are there."""
    found: dict[tuple[int, int], list[Decision]] = {}
    level: dict[int, int] = {}
    for block in blocks:
        depth = len(block.when)
        level[depth] = level.get(depth, 0) + 1
        found.setdefault((depth, level[depth] % 2), []).append(block)
    return list(found.values())


def _any_widths_fit(
    blocks: Sequence[Decision], edges: Mapping[str, Sequence[Decision]], runs: Runs
) -> bool:
    """Whether the model runs without these blocks whatever the widths around them."""
    around = list({w.name: w for b in blocks for w in edges[b.name]}.values())
    out = {b.name: b.options[0] for b in blocks}
    # by the bits of its number each width is less at least once, and once where another is not
    draws = [
        {w.name: w.options[-2] for j, w in enumerate(around, 1) if j >> bit & 1}
        for bit in range(len(around).bit_length())
    ]
    draws.append({w.name: w.options[0] for w in around})
    return all(runs({**out, **drawn}) for drawn in draws)


def _unfit(block: Decision, edges: Sequence[Decision], runs: Runs) -> list[Forbid]:
    """The combinations of widths that the model does not run with when `block` is left out."""
    # within a block around it that is left out itself, nothing is asked
    out = {**{outer: kept[-1] for outer, kept in block.when.items()}, block.name: block.options[0]}

    def fit(some: Sequence[Decision]) -> bool:
        return all(runs({**out, **{w.name: w.options[at] for w in some}}) for at in (0, -2))

    bound = [w for w in edges if not fit([w])]
    free = [w for w in edges if w not in bound]
    tied = _tied(bound, fit)
    if not all(fit([*some, *free]) for some in (tied or [[]])):
        free, tied, bound = [], [], list(edges)
    found: list[dict[str, Option]] = []
    for some in tied:
        for one, other in pairwise(some):
            both = product(one.options, other.options)
            found += [{one.name: a, other.name: b} for a, b in both if a != b]
    alone = [w for w in bound if not any(w in some for some in tied)]
    found += [{w.name: option} for w in alone for option in w.options[:-1]]
    return [Forbid({**out, **options}) for options in found]


def _tied(
    bound: Sequence[Decision], fit: Callable[[Sequence[Decision]], bool]
) -> list[list[Decision]]:
    """The widths that may be less together where none may alone: all of them, or some in pairs."""

    def alike(some: Sequence[Decision]) -> bool:
        return len({w.options for w in some}) == 1 and fit(some)

    if len(bound) > 1 and alike(bound):
        return [list(bound)]
    found: list[list[Decision]] = []
    for pair in combinations(bound, 2):
        if not any(w in some for w in pair for some in found) and alike(pair):
            found.append(list(pair))
    return found
