"""How many candidates a space has, without listing them."""

from __future__ import annotations

import math
from functools import cache

from espalier.space.layout import Layout

# what is still open: (column, the gates (parent, allowed codes) that have not been settled)
_Open = frozenset[tuple[int, frozenset[tuple[int, frozenset[int]]]]]


def size(layout: Layout) -> int | float:
    """The number of candidates, conditions honoured, constraints not; inf with a real decision."""
    if any(layout.real):
        return math.inf
    gates = {
        g.child: frozenset((p, frozenset(a.tolist())) for p, a in g.parents) for g in layout.gates
    }
    counts = layout.counts

    @cache
    def count(decisions: _Open) -> int:
        parents = {p for _, conditions in decisions for p, _ in conditions}
        ready = [j for j, conditions in decisions if not conditions]
        total = math.prod(counts[j] for j in ready if j not in parents)
        rest = frozenset(d for d in decisions if d[1] or d[0] in parents)
        return total * math.prod(branch(part) for part in _islands(rest))

    @cache
    def branch(decisions: _Open) -> int:
        """One island: settles one decision that others wait for, then counts the rest."""
        root = min(j for j, conditions in decisions if not conditions)
        asked = sorted(
            {a for _, conditions in decisions for p, a in conditions if p == root}, key=sorted
        )
        # options that the same conditions hold under leave the same rest: counted once
        kinds: dict[tuple[bool, ...], int] = {}
        seen: set[int] = set().union(*asked)
        for code in seen:
            kind = tuple(code in a for a in asked)
            kinds[kind] = kinds.get(kind, 0) + 1
        if counts[root] > len(seen):
            kinds[tuple(False for _ in asked)] = counts[root] - len(seen)
        return sum(
            times
            * count(_settled(decisions, root, {a for a, on in zip(asked, kind, strict=True) if on}))
            for kind, times in kinds.items()
        )

    return count(frozenset((j, gates.get(j, frozenset())) for j in range(layout.width)))


def _settled(decisions: _Open, root: int, holding: set[frozenset[int]]) -> _Open:
    """The rest once `root` has an option: conditions that hold go, decisions that fail go."""
    left: dict[int, frozenset[tuple[int, frozenset[int]]]] = {}
    gone = {root}
    for j, conditions in decisions:
        if j == root:
            continue
        if any(p == root and a not in holding for p, a in conditions):
            gone.add(j)
        else:
            left[j] = frozenset((p, a) for p, a in conditions if p != root)
    while True:
        failed = {j for j, conditions in left.items() if any(p in gone for p, _ in conditions)}
        if not failed:
            return frozenset(left.items())
        gone |= failed
        left = {j: c for j, c in left.items() if j not in failed}


def _islands(decisions: _Open) -> list[_Open]:
    """Groups of decisions that no condition links to one another."""
    group = {j: {j} for j, _ in decisions}
    for j, conditions in decisions:
        for p, _ in conditions:
            if group[p] is not group[j]:
                group[p] |= group[j]
                for member in group[j]:
                    group[member] = group[p]
    found = {id(g): g for g in group.values()}
    return [frozenset(d for d in decisions if d[0] in g) for g in found.values()]
