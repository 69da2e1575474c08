"""What no strategy can do better: the choice by validation, and the noise between trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.bench.regret import Judge

if TYPE_CHECKING:
    from espalier.bench.table import Table


def ceiling(table: Table, found: Judge) -> dict[str, Any]:
    """The limits of a table.

    - `best`: the best reported number among all rows that keep the limits; `chosen`: that of the
      row that is best by what chooses, all that a strategy can hope for; `regret`: the difference.
    - `tau`: Kendall's tau between what chooses and what reports over those rows: above it no
      estimator that was fitted to the one can rank the other. Absent where they are one column.
    - `seeds`, `spread`, `seed_tau`: where the table has several trainings a row: how many, the mean
      standard deviation between them, and Kendall's tau between the first two.
    """
    from scipy.stats import kendalltau

    kept = np.flatnonzero(found.kept & ~np.isnan(found.report) & ~np.isnan(found.choice))
    top = float(found.report[found.winner])
    out: dict[str, Any] = {
        "rows": len(found.kept),
        "kept": int(found.kept.sum()),
        "best": float(found.shown(np.array([found.best]))[0]),
        "chosen": float(found.shown(np.array([top]))[0]),
        "regret": top - found.best,
    }
    if not np.array_equal(found.choice[kept], found.report[kept]):
        out["tau"] = float(kendalltau(found.choice[kept], found.report[kept]).statistic)
    curve = table.curves.get(found.report_name)
    if curve is not None and curve.shape[1] > 1:
        final = np.asarray(curve[:, :, -1], dtype=float)[kept]
        out["seeds"] = int(final.shape[1])
        out["spread"] = float(np.nanmean(np.nanstd(final, axis=1, ddof=1)))
        out["seed_tau"] = float(kendalltau(final[:, 0], final[:, 1]).statistic)
    return out
