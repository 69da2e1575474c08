"""The space: named decisions with conditions and constraints, and its whole-array operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError, unknown
from espalier.space import border, counting, features, listing, rows, serial, vary
from espalier.space.activity import active, settle
from espalier.space.candidate import Candidate
from espalier.space.constraints import Constraint
from espalier.space.decisions import Decision
from espalier.space.layout import Codes, Layout, Mask, checked, own
from espalier.space.neighbours import corner, neighbours
from espalier.space.repair import repair, sample, valid
from espalier.space.rules import bind

Rng = np.random.Generator


@final
class Space:
    """Named decisions; immutable.

    A set of n candidates is one array of codes `(n, d)`: a column a decision, the index of the
    option for a discrete one, the value for a real one. Inactive columns are canonical (0; a real
    one its low end), so equal candidates have equal rows. Arrays given back are new, and stored by
    columns. Errors: `SpaceError` for decisions, conditions or constraints that do not fit together.
    """

    def __init__(
        self, decisions: Iterable[Decision], constraints: Iterable[Constraint] = ()
    ) -> None:
        self._layout = Layout(_listed(decisions, "decisions"))
        self._constraints: tuple[Constraint, ...] = _listed(constraints, "constraints")
        self._rules = bind(self._constraints, self._layout)

    # --- what it is -------------------------------------------------------------------------

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The decisions, a column each."""
        return self._layout.decisions

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions' names."""
        return self._layout.names

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The rules between decisions."""
        return self._constraints

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of codes: a small signed integer, float64 with a real decision."""
        return self._layout.dtype

    @cached_property
    def size(self) -> int | float:
        """The number of candidates, conditions honoured, constraints not; inf with a real one."""
        return counting.size(self._layout)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that equal spaces share, in every process and on every machine."""
        return serial.fingerprint(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return serial.to_json(self._layout, self._constraints)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """The space that `to_json` wrote. Errors: `SpaceError`."""
        return cls(*serial.read(data))

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, name: str) -> Decision:
        if name not in self._layout.index:
            raise SpaceError(unknown("decision", str(name), self.names))
        return self.decisions[self._layout.index[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._layout.index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return Space, (self.decisions, self._constraints)

    def __repr__(self) -> str:
        more = f", {len(self._constraints)} constraints" if self._constraints else ""
        return f"Space({', '.join(self.names)}{more}; {self.size:,} candidates)"

    # --- making and varying rows ------------------------------------------------------------

    def sample(self, n: int, rng: Rng) -> Codes:
        """n valid rows `(n, d)`; each active decision is drawn on its own, its options alike.

        Constraints are kept by rejection. Errors: `SpaceError` when hardly any draw keeps them.
        """
        return sample(self._layout, self._rules, _count(n, "n"), _generator(rng))

    def enumerate(self, limit: int = 1_000_000) -> Codes:
        """Every valid row, in lexicographic order.

        Errors: `SpaceError` when there are more than `limit`, or a decision is real.
        """
        return listing.expand(self._layout, self._rules, _count(limit, "limit"))

    def mutate(self, codes: Codes, rng: Rng, rate: float | None = None) -> Codes:
        """Valid rows near `codes`: each active decision changes with probability `rate`.

        A discrete decision goes to another option, each alike; a real one takes a normal step of
        15% of its range (of its logarithm if log), clipped. Decisions that become active are
        drawn. Without a rate it is one over the decisions that have a choice, and every row changes
        in at least one. Rows that then break constraints are repaired.
        """
        if rate is not None and not 0 <= rate <= 1:
            raise SpaceError(f"a mutation rate is a share from 0 to 1, got {rate!r}")
        out = vary.mutate(self._layout, checked(self._layout, codes), _generator(rng), rate)
        return self._kept(out, rng)

    def cross(self, a: Codes, b: Codes, rng: Rng) -> Codes:
        """Valid rows: each decision from row i of `a` or of `b` (uniform; Syswerda, 1989).

        A decision that only one of them has active comes from that one; one that neither has is
        drawn. Rows that then break constraints are repaired.
        """
        first, second = checked(self._layout, a), checked(self._layout, b)
        if len(first) != len(second):
            raise SpaceError(
                f"cross needs as many rows in both, got {len(first)} and {len(second)}"
            )
        return self._kept(vary.cross(self._layout, first, second, _generator(rng)), rng)

    def repair(self, codes: Codes, rng: Rng) -> Codes:
        """Canonical, valid rows: valid ones stay as they are, others change in few decisions.

        Errors: `SpaceError` when a row can't be mended and hardly any draw keeps the constraints.
        """
        return repair(self._layout, self._rules, checked(self._layout, codes), _generator(rng))

    def _kept(self, codes: Codes, rng: Rng) -> Codes:
        return repair(self._layout, self._rules, codes, rng) if self._rules else codes

    # --- reading rows -----------------------------------------------------------------------

    def canonical(self, codes: Codes) -> Codes:
        """The rows with every inactive column at its first code."""
        out = own(self._layout, codes)
        settle(self._layout, out)
        return out

    def valid(self, codes: Codes) -> Mask:
        """Rows `(n,)` whose active codes are in range and keep every constraint."""
        try:
            ready = checked(self._layout, codes)
        except SpaceError:
            if np.ndim(codes) != 2 or np.shape(codes)[1] != len(self):
                raise
            # codes that the dtype can't hold are just not valid
            ready = np.asarray(codes, dtype=np.float64)
        return valid(self._layout, self._rules, ready)

    def active(self, codes: Codes) -> Mask:
        """Which decisions `(n, d)` of each row are active."""
        return active(self._layout, checked(self._layout, codes))

    def keys(self, codes: Codes) -> NDArray[Any]:
        """A hashable, sortable key `(n,)` for each canonical row; equal rows have equal keys.

        uint64 where a row fits 64 bits, else bytes.
        """
        return rows.keys(self._layout, checked(self._layout, codes))

    def unique(self, codes: Codes) -> NDArray[np.int64]:
        """Indices, increasing, of the first of each kind of (canonical) row."""
        return rows.unique(self._layout, checked(self._layout, codes))

    def distance(self, a: Codes, b: Codes) -> NDArray[np.float64]:
        """Distances `(n, m)` in 0..1: the mean over decisions of the gap (Gower, 1971)."""
        return features.distance(self._layout, checked(self._layout, a), checked(self._layout, b))

    def one_hot(self, codes: Codes) -> NDArray[np.float32]:
        """Features `(n, k)`, named by `one_hot_names`; an inactive decision is all 0.

        A column an option; a real decision, or an integer of more than 64 options, is one column
        scaled to 0..1.
        """
        return features.one_hot(self._layout, checked(self._layout, codes))

    @cached_property
    def one_hot_names(self) -> tuple[str, ...]:
        """The names of `one_hot`'s columns: "width=16", "dropout"."""
        return features.one_hot_names(self._layout)

    def neighbours(self, row: Codes) -> Codes:
        """Every valid row that differs from `row` in one active decision, canonical.

        Decisions that the change activates are at their first option. A real decision, or an
        integer of more than 64 options, gives its ends and steps of 10% of the range to both
        sides.
        """
        ready = checked(self._layout, np.atleast_2d(row))
        if len(ready) != 1:
            raise SpaceError(f"neighbours are those of one row, got {len(ready)} rows")
        return neighbours(self._layout, self._rules, ready)

    def corner(self, last: bool) -> Codes:
        """The row `(1, d)` with every decision at its first or last option, canonical.

        Constraints are not looked at: `valid` tells.
        """
        return corner(self._layout, last)

    # --- candidates -------------------------------------------------------------------------

    def decode(self, codes: Codes) -> list[Candidate]:
        """A candidate a row. Errors: `SpaceError` for a code that a decision does not have."""
        return border.decode(self._layout, checked(self._layout, codes))

    def encode(self, candidates: Iterable[Mapping[str, Any]]) -> Codes:
        """A canonical row `(n, d)` a candidate. Inactive decisions may be left out.

        Errors: `SpaceError` for unknown decisions or options, or an active one left out.
        Constraints are not looked at: `valid` tells.
        """
        return border.encode(self._layout, candidates)

    def candidate(self, options: Mapping[str, Any]) -> Candidate:
        """A checked candidate; inactive decisions may be left out, and are.

        Errors: `SpaceError` for unknown decisions or options, an active decision left out, or a
        constraint that is broken.
        """
        codes = self.encode([options])
        masks = {j: np.asarray(on) for j, on in enumerate(self.active(codes).T)}
        for constraint, rule in zip(self._constraints, self._rules, strict=True):
            if rule.violation(codes, masks)[0] > 0:
                shown = ", ".join(f"{n}={options[n]!r}" for n in constraint.names)
                raise SpaceError(
                    f"a candidate must keep the constraint ({constraint}), got {shown}"
                )
        return self.decode(codes)[0]


def _listed(items: Any, what: str) -> tuple[Any, ...]:
    kind = {"decisions": Decision, "constraints": Constraint}[what]
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise SpaceError(f"a space takes a list of {what}, got {items!r}")
    listed = tuple(items)
    for item in listed:
        if not isinstance(item, kind):
            raise SpaceError(f"a space takes a list of {what}, got {item!r} in it")
    return listed


def _count(n: Any, what: str) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
        raise SpaceError(f"{what} is a whole number from 0, got {n!r}")
    return int(n)


def _generator(rng: Any) -> Rng:
    if not isinstance(rng, np.random.Generator):
        rule = "rng must be a numpy Generator, like numpy.random.default_rng(0)"
        raise SpaceError(f"{rule}, got {rng!r}")
    return rng
