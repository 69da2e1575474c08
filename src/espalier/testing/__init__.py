"""Conformance suites that ship: give one an own part, and it says which law the part breaks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.testing.cost import check_cost as check_cost
    from espalier.testing.estimator import check_estimator as check_estimator
    from espalier.testing.executor import check_executor as check_executor
    from espalier.testing.family import check_family as check_family
    from espalier.testing.fidelity import check_fidelity as check_fidelity
    from espalier.testing.ledger import check_ledger as check_ledger
    from espalier.testing.search import check_search as check_search
    from espalier.testing.space import check_space as check_space
    from espalier.testing.strategy import check_strategy as check_strategy
    from espalier.testing.table import check_table as check_table
    from espalier.testing.task import check_task as check_task

_SUITES = (
    "cost",
    "estimator",
    "executor",
    "family",
    "fidelity",
    "ledger",
    "search",
    "space",
    "strategy",
    "table",
    "task",
)
__all__ = [f"check_{suite}" for suite in _SUITES]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{name.removeprefix('check_')}"), name)
    raise AttributeError(f"module 'espalier.testing' has no attribute {name!r}")
