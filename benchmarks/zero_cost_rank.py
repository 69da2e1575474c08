"""How well zero-cost proxies rank NAS-Bench-201, beside parameters, MACs and published scores.

    ESPALIER_DATA=... python benchmarks/zero_cost_rank.py [--cells 300] [--seconds 1500]

Networks as published (16 channels, 5 cells a stage, fresh weights), one batch of 64 lossless
CIFAR-10 images. The cells are a fixed random sample of the 725 for which NAS-Bench-Suite-Zero
(Krishnakumar et al., 2022) published scores, so that both are ranked on the same cells. The scores
of a CIFAR-10 network are also ranked against CIFAR-100 accuracy; the published ones there were
computed on CIFAR-100. Scores are kept in runs/zero_cost_rank.json and not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier import tasks
from espalier.bench import tables
from espalier.bench.criteria import kendall, spearman
from espalier.costs import machine
from espalier.estimators.zero_cost import ALL, ZeroCost
from espalier.nets.nb201 import NB201

RESULT = Path(__file__).parent / "results" / "zero_cost_rank.json"
CACHE = Path("runs") / "zero_cost_rank.json"
DATASETS = ("cifar10", "cifar100")
Array = NDArray[np.float64]

# NASLib's order of edges and operators, in ours
_EDGES, _OPERATORS = (0, 1, 3, 2, 4, 5), (1, 0, 3, 2, 4)
# our measure, and the column of the published scores
PUBLISHED = {
    "grad_norm": "grad_norm",
    "snip": "snip",
    "grasp": "grasp",
    "fisher": "fisher",
    "jacob_cov": "jacov",
    "synflow": "synflow",
    "plain": "plain",
    "l2": "l2_norm",
    "naswot": "nwot",
    "epe_nas": "epe_nas",
    "zen": "zen",
    "params": "params",
    "macs": "flops",
}


def published(folder: Path) -> dict[str, dict[str, Array]]:
    """Published scores by dataset: codes `(n, 6)` in our order, and every column `(n,)`."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "zero_cost_proxies" / "zero_cost_nb201.parquet").to_pydict()
    out: dict[str, dict[str, Array]] = {}
    for dataset in DATASETS:
        rows = [i for i, name in enumerate(table["dataset"]) if name == dataset]
        texts = [table["arch"][i].strip("()").split(",") for i in rows]
        theirs = np.array([[int(t) for t in text] for text in texts])
        codes = np.array(_OPERATORS)[theirs[:, _EDGES]]
        columns = {
            k: np.array([table[k][i] for i in rows], dtype=float) for k in set(PUBLISHED.values())
        }
        order = np.lexsort(codes.T[::-1])
        accuracy = np.array([table["val_metric"][i] for i in rows])
        out[dataset] = {k: v[order] for k, v in columns.items()}
        out[dataset] |= {"codes": codes[order], "val_metric": accuracy[order]}
    return out


def computed(codes: Array, folder: Path, seconds: float) -> dict[str, Any]:
    """Scores of as many cells as the time allows, in the order given; kept as they come."""
    done: dict[str, Any] = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    task = tasks.images(folder / "cifar10" / "cifar10_train_first4000_lossless.npz")
    family = NB201()
    estimator = ZeroCost(family, task, batch=64, seed=0)
    started = time.monotonic()
    for candidate in family.space.decode(codes):
        if candidate.id in done:
            continue
        if time.monotonic() - started > seconds:
            break
        begin, work = time.perf_counter(), time.process_time()
        found = estimator.estimate([candidate])
        done[candidate.id] = {
            "scores": {name: float(found[name][0]) for name in ALL},
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - work,
        }
        CACHE.parent.mkdir(exist_ok=True)
        CACHE.write_text(json.dumps(done))
    return done


def ranked(scores: Array, truth: Array) -> dict[str, Any]:
    """Spearman and Kendall with 95% bootstrap intervals over cells; where a score is missing, the
    cell is left out."""
    known = np.isfinite(scores)
    a, b = scores[known], truth[known]
    if len(np.unique(a)) < 2:
        return {"spearman": None, "kendall": None, "cells": int(known.sum())}
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(a), size=len(a)) for _ in range(400)]
    taus = [kendall(a[d], b[d]) for d in draws]
    rhos = [spearman(a[d], b[d]) for d in draws]
    return {
        "spearman": spearman(a, b),
        "spearman_95": np.percentile(rhos, [2.5, 97.5]).tolist(),
        "kendall": kendall(a, b),
        "kendall_95": np.percentile(taus, [2.5, 97.5]).tolist(),
        "cells": int(known.sum()),
    }


def main() -> None:
    """Scores the sample, ranks it and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1500.0)
    args = parser.parse_args()
    if "ESPALIER_DATA" not in os.environ:
        raise SystemExit("set ESPALIER_DATA to the folder of real data")
    folder = Path(os.environ["ESPALIER_DATA"])
    torch.set_num_threads(1)
    theirs = published(folder)
    pool = theirs["cifar10"]["codes"]
    order = np.random.default_rng(0).permutation(len(pool))[: args.cells]
    load = machine.load_now(1.0)
    done = computed(pool[order], folder, args.seconds)
    space = NB201().space
    ids = [c.id for c in space.decode(pool[order])]
    rows = np.array([i for i, name in zip(order, ids, strict=True) if name in done])
    mine = [done[name] for name in ids if name in done]
    columns = {m: np.array([one["scores"][m] for one in mine]) for m in ALL}
    vote = ("synflow", "jacob_cov", "snip")
    columns["vote"] = np.sum([np.argsort(np.argsort(columns[m])) for m in vote], axis=0)
    result: dict[str, Any] = {
        "cells": len(rows),
        "batch": 64,
        "vote_of": list(vote),
        "processor": machine.processor(),
        "load_before": round(load, 2),
        "cpu_seconds_a_cell": float(np.median([one["cpu_seconds"] for one in mine])),
        "seconds_a_cell": float(np.median([one["seconds"] for one in mine])),
        "datasets": {},
    }
    for dataset in DATASETS:
        table = tables.load(f"nb201:dataset={dataset}")
        codes = pool[rows]
        test = table.columns["test_acc"][table.rows(codes)]
        validation = table.columns["val_acc"][table.rows(codes)]
        assert np.abs(validation - theirs[dataset]["val_metric"][rows]).max() < 0.01
        found: dict[str, Any] = {}
        for name, values in columns.items():
            found[name] = ranked(values, test)
            if name in PUBLISHED:
                found[name]["published"] = ranked(theirs[dataset][PUBLISHED[name]][rows], test)
                found[name]["agreement"] = spearman(
                    values, np.nan_to_num(theirs[dataset][PUBLISHED[name]][rows])
                )
        result["datasets"][dataset] = found
        print(f"{dataset}, test accuracy, {len(rows)} cells: Spearman, Kendall; published scores")
        for name, one in sorted(found.items(), key=lambda kv: -kv[1]["spearman"]):
            other = one.get("published", {})
            tail = (
                f"{other['spearman']:7.3f} {other['kendall']:7.3f}" if other.get("kendall") else ""
            )
            print(f"  {name:14} {one['spearman']:7.3f} {one['kendall']:7.3f}   {tail}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
