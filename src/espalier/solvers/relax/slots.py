"""What may be in the slots of a search, asked before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.errors import EspalierError, SpaceError
from espalier.solvers.relax.relaxation import Relaxation
from espalier.solvers.relax.rules import Rule
from espalier.solvers.relax.settings import Settings
from espalier.solvers.relax.terms import Term
from espalier.train import distributed


def check_slots(
    supernet: object,
    relaxation: object,
    rule: object,
    terms: Sequence[object],
    selection: object,
    settings: object,
    collapsed: int | None,
) -> None:
    """Refuses what would fail only once the search has begun, or ended."""
    if distributed.ranks() > 1:
        raise EspalierError(
            f"relax searches in one process, and {distributed.ranks()} are in the group: call it"
            " outside of distributed.group()"
        )
    if not all(
        hasattr(supernet, name) for name in ("space", "mixable", "joins", "mix", "activate")
    ):
        raise SpaceError(
            f"relax needs a supernet that can run mixtures, got {type(supernet).__name__}: use one"
            " of the families, or make it a subclass of Supernet"
        )
    wanted: list[tuple[str, object, type, str]] = [
        ("relaxation", relaxation, Relaxation, "Softmax()")
    ]
    wanted += [("rule", rule, Rule, "FirstOrder()"), ("settings", settings, Settings, "Settings()")]
    wanted += [("terms", term, Term, "Entropy()") for term in terms]
    wrong = [
        (name, value, like) for name, value, kind, like in wanted if not isinstance(value, kind)
    ]
    if not callable(selection) or isinstance(selection, type):
        wrong.append(("selection", selection, "Magnitude()"))
    for name, value, like in wrong:
        raise EspalierError(f"{name} of relax takes objects such as {like}, got {value!r}")
    if collapsed is not None and collapsed < 1:
        raise EspalierError(f"stop_when_collapsed is 1 or more, or None, got {collapsed!r}")
