"""The decisions of a space one after the other, parents first: for strategies that build a row
decision by decision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import Space

Codes = NDArray[Any]
Mask = NDArray[np.bool_]


class Turns:
    """`order` holds the columns, each after the decisions that its condition names."""

    def __init__(self, space: Space) -> None:
        column = {name: j for j, name in enumerate(space.names)}
        self._when: list[list[tuple[int, NDArray[Any]]]] = []
        for decision in space.decisions:
            self._when.append(
                [
                    (column[name], np.array([space[name].code(o) for o in options]))
                    for name, options in decision.when.items()
                ]
            )
        self.order: list[int] = []
        while len(self.order) < len(space):
            self.order += [
                j
                for j, when in enumerate(self._when)
                if j not in self.order and all(p in self.order for p, _ in when)
            ]

    def conditional(self, j: int) -> bool:
        """Whether column j has a condition."""
        return bool(self._when[j])

    def active(self, j: int, codes: Codes, masks: Mask) -> Mask:
        """In which rows `(n,)` column j is active, by the columns before it in `order`.

        `masks` `(n, d)` says where those are.
        """
        out = np.ones(len(codes), dtype=np.bool_)
        for parent, allowed in self._when[j]:
            out &= masks[:, parent] & np.isin(codes[:, parent], allowed)
        return out
