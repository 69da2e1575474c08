"""Where a block may be left out only if what goes into it is as wide as what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

from espalier.compress.cut import BoundCut
from espalier.space import Decision, Forbid
from espalier.space.options import Option

Runs = Callable[[Mapping[str, Option]], bool]


def matched(cuts: Sequence[BoundCut], runs: Runs) -> list[Forbid]:
    """The combinations of widths around a block that do not fit when it is left out.

    A block whose input and output are of one group, as in residual networks, has none. `runs` says
    whether the model runs with some decisions changed, the others as in the original.
    """
    reach: dict[str, set[str]] = {}
    decisions = {d.name: d for cut in cuts for d in cut.decisions}
    for cut in cuts:
        for path, names in cut.layers().items():
            for name in names:
                reach.setdefault(name, set()).add(path)
    widths = [name for name in decisions if name.startswith("width:")]
    found: list[Forbid] = []
    for block in (name for name in decisions if name.startswith("depth:")):
        inside = reach.get(block, set())
        edges = [w for w in widths if reach.get(w, set()) & inside and reach[w] - inside]
        for pair in combinations(edges, 2):
            found += _unfit(block, [decisions[name] for name in pair], runs)
    return found


def _unfit(block: str, pair: Sequence[Decision], runs: Runs) -> list[Forbid]:
    """The combinations of two widths that the model does not run with when `block` is left out."""
    one, other = pair
    least, most = (tuple(d.options[i] for d in pair) for i in (0, -1))
    names = (one.name, other.name)

    def fits(options: Sequence[Option]) -> bool:
        return runs({block: 0, **dict(zip(names, options, strict=True))})

    if fits((least[0], most[1])) and fits((most[0], least[1])):
        return []
    alike = one.options == other.options and fits(least)
    return [
        Forbid({block: 0, one.name: a, other.name: b})
        for a, b in product(one.options, other.options)
        if not ((a == b) if alike else (a, b) == most)
    ]
