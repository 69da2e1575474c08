"""The answer of a race in sentences: who is better than random search, and who is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from espalier.bench.entrants import BASELINE
from espalier.bench.significance import ALPHA
from espalier.report import numbers


def unit_name(unit: str) -> str:
    """The unit of a difference, as an axis says it."""
    return "points" if unit in ("%", "share") else unit


def amount(value: float, unit: str) -> str:
    """A difference in a unit: per cent as points."""
    if unit == "%":
        return f"{value:.2f} points"
    if unit == "share":
        return f"{100 * value:.2f} points"
    return f"{numbers.significant(value, 3)}{' ' + unit if unit else ''}"


def chance(p: float) -> str:
    """A p-value as people write it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def verdicts(result: Mapping[str, Any], queries: int, seeds: int) -> list[str]:
    """A sentence for every strategy but the baseline, the best first; then what bounds them all."""
    volume = result["judged_by"] == "hypervolume"
    base = _score(result, BASELINE, volume)
    names = sorted(result["significance"], key=lambda n: result["ranks"]["mean"][n])
    out = []
    for name in names:
        test = result["significance"][name]
        score = _score(result, name, volume)
        if volume:
            figures = f"hypervolume {score:.4f} against {base:.4f}"
        else:
            unit = result["unit"]
            figures = f"mean test regret {amount(score, unit)} against {amount(base, unit)}"
        budget = "1 query" if queries == 1 else f"{queries} queries"
        line = f"{name} is {word(test)} than random search at equal budget ({budget}): "
        line += f"{figures}, {chance(test['p_holm'])} after Holm, {seeds} "
        line += "seed" if seeds == 1 else "seeds"
        ahead = word(test) == "not better" and test["difference"] < 0
        line += "; its lead may be luck." if ahead else "."
        out.append(line)
    least = fewest(len(names))
    if names and seeds < least:
        out.append(
            f"With {seeds} {'seed' if seeds == 1 else 'seeds'} no difference can be significant: "
            f"give at least {least}, better 30."
        )
    return out


def word(test: Mapping[str, Any]) -> str:
    """How a strategy stands against the baseline."""
    return "better" if test["better"] else "worse" if test["worse"] else "not better"


def fewest(strategies: int) -> int:
    """Seeds that a two-sided sign-flip test needs to reach 0.05 at all, after Holm."""
    return 1 + math.ceil(math.log2(max(strategies, 1) / ALPHA))


def _score(result: Mapping[str, Any], name: str, volume: bool) -> float:
    if volume:
        return float(result["hypervolume"][name]["mean"][-1])
    return float(result["regret"][name])
