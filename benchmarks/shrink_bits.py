"""Bits by layer: our program on ModelOpt's own sensitivity table, at every budget from 3 to 8 bits.

    python benchmarks/shrink_bits.py [--models resnet20 resnet56]

ModelOpt 0.47, in an environment of its own, scores each layer of ResNets for CIFAR-10 at 2 to 8 bits
and unquantised, and its program chooses for each budget. On the same table our program must reach the
true optimum: proved by its bound, found again by HiGHS on the same numbers scaled to 1 and without a
gap, and on the first layers alone by enumeration of every allocation. Then the same with the scores of
a loss that is a mean over 256 positions, as those of language models are: 65,536 times smaller. Writes results/shrink_bits.json
beside this file. ESPALIER_DATA must point to the data.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import models
from espalier import tasks
from espalier.flows.machine import machine
from espalier.problem import Limit
from espalier.solvers.allocate import Factor, Program
from espalier.space import Space, ordinal
from peers.environments import python

HERE = Path(__file__).parent
RESULT = HERE / "results" / "shrink_bits.json"
CACHE = HERE.parent / ".cache" / "shrink_bits"
BUDGETS = tuple(3 + k / 4 for k in range(21))
_IMAGES = 512
_SMALL = 6  # layers that are enumerated
_SAME = 1e-9


def sensitivity(model: str) -> dict[str, Any]:
    """ModelOpt's table of a model and its choices, made once."""
    path = CACHE / f"{model}.json"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        weights = Path(os.environ["ESPALIER_DATA"]) / "weights" / models.WEIGHTS[model]
        network = models.load(models.MODELS[model](), weights)
        state, data = CACHE / f"{model}.npz", CACHE / "images.npz"
        np.savez(state, **{k: v.numpy() for k, v in network.state_dict().items()})
        task = tasks.make(f"cifar10:train={_IMAGES},validation=64,test=64")
        x, y = next(iter(task.batches("train", _IMAGES)))
        np.savez(data, x_train=x.numpy(), y_train=y.numpy())
        script = str(HERE / "peers" / "modelopt_bits_peer.py")
        given = [str(HERE / "models.py"), model, str(state), str(data)]
        budgets = ",".join(f"{b:g}" for b in BUDGETS)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [str(python("modelopt")), script, *given, budgets]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread
        )
        path.write_text(done.stdout.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


class Case:
    """A table with budgets: layers, and for each its options' scores and costs in bits."""

    def __init__(self, table: dict[str, Any], layers: int | None = None) -> None:
        self.names = list(table)[:layers]
        rows = [table[name] for name in self.names]
        self.scores = [np.array(row["scores"]) for row in rows]
        # bits of all weights: whole numbers, in place of ModelOpt's shares of 16
        self.costs = [np.round(16 * np.array(row["costs"])) for row in rows]
        self.weights = sum(float(row["whole"]) for row in rows)

    def limit(self, bits: float) -> float:
        """Bits of all weights at so many a weight."""
        return bits * self.weights

    def scaled(self, positions: int) -> Case:
        """The table of a loss that is a mean over so many positions."""
        twin = copy.copy(self)
        twin.scores = [s / positions**2 for s in self.scores]
        return twin

    def solved(self, bits: float) -> dict[str, Any]:
        """Our program, and our greedy allocation."""
        space = Space(
            [ordinal(n, *range(len(s))) for n, s in zip(self.names, self.scores, strict=True)]
        )
        harm, cost = (
            [Factor((n,), v) for n, v in zip(self.names, values, strict=True)]
            for values in (self.scores, self.costs)
        )
        program = Program(space, harm, {"bits": cost}, [Limit("bits", self.limit(bits))])
        start = time.perf_counter()
        greedy = program.greedy()
        middle = time.perf_counter()
        found = program.solve(seconds=60)
        return {
            "score": found.harm,
            "bits": found.costs["bits"] / self.weights,
            "bound": found.bound,
            "proved": found.optimal,
            "seconds": time.perf_counter() - middle,
            "greedy": greedy.harm,
            "greedy_seconds": middle - start,
        }

    def highs(self, bits: float) -> float:
        """The optimum as HiGHS finds it, scores scaled to 1."""
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import block_diag, csr_matrix

        score, cost = np.concatenate(self.scores), np.concatenate(self.costs)
        scale = float(score.max())
        one = block_diag([np.ones((1, len(s))) for s in self.scores])
        found = milp(
            score / scale,
            integrality=np.ones(len(score)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(csr_matrix(one), 1, 1),
                LinearConstraint(cost[None] / self.limit(bits), -np.inf, 1.0 + 1e-12),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": 60},
        )
        picks = [
            int(p.argmax())
            for p in np.split(found.x, np.cumsum([len(s) for s in self.scores])[:-1])
        ]
        return self.sum(self.scores, picks)

    def theirs(self, chosen: dict[str, Any], bits: float, best: float) -> dict[str, Any]:
        """What ModelOpt's choice comes to, on the table as it is."""
        picks = [chosen["picks"][name] for name in self.names]
        score, used = self.sum(self.scores, picks), self.sum(self.costs, picks)
        return {
            "score": score,
            "bits": used / self.weights,
            "within": used <= self.limit(bits) * (1 + _SAME),
            "seconds": chosen["seconds"],
            "times_the_optimum": score / best,
        }

    def sum(self, values: list[NDArray[np.float64]], picks: list[int]) -> float:
        """What a choice comes to."""
        return float(sum(v[p] for v, p in zip(values, picks, strict=True)))

    def enumerated(self, bits: float) -> float:
        """The least score of every allocation within the budget."""
        grid = np.array(list(product(*(range(len(s)) for s in self.scores))))
        score, cost = (
            sum(v[grid[:, k]] for k, v in enumerate(values)) for values in (self.scores, self.costs)
        )
        return float(score[cost <= self.limit(bits)].min())


def whole(model: str) -> dict[str, Any]:
    """All layers: ours, ModelOpt's and HiGHS's at each budget."""
    found = sensitivity(model)
    case = Case(found["table"])
    rows = {}
    for bits in BUDGETS:
        row = case.solved(bits)
        row["highs"] = case.highs(bits)
        row["optimal"] = row["proved"] and row["score"] <= row["highs"] * (1 + _SAME)
        for n in map(int, found["chosen"]):
            again = case.scaled(n).solved(bits)
            row["optimal"] &= (
                again["proved"] and abs(again["score"] * n**2 / row["score"] - 1) < 1e-9
            )
        row["modelopt"] = {
            f"mean over {n}": case.theirs(chosen[f"{bits:g}"], bits, row["score"])
            for n, chosen in found["chosen"].items()
        }
        rows[f"{bits:g}"] = row
        told = "; ".join(
            f"ModelOpt ({name}) {m['times_the_optimum']:.4f} times that at {m['bits']:.3f}"
            for name, m in row["modelopt"].items()
        )
        print(
            f"{model} {bits:g} bits: {row['score']:.4g} at {row['bits']:.3f} ({row['seconds']:.2f} s, "
            f"optimal: {row['optimal']}); {told}; greedy {row['greedy']:.4g}",
            flush=True,
        )
    return {"layers": len(case.names), "scoring_seconds": found["seconds"], "budgets": rows}


def small(model: str) -> dict[str, Any]:
    """The first layers alone, against every allocation."""
    case = Case(sensitivity(model)["table"], _SMALL)
    rows = {}
    for bits in BUDGETS:
        best, ours = case.enumerated(bits), case.solved(bits)
        same = abs(ours["score"] - best) <= _SAME * best
        rows[f"{bits:g}"] = {"enumerated": best, "score": ours["score"], "same": same}
    options = [len(s) for s in case.scores]
    return {"layers": _SMALL, "allocations": int(np.prod(options)), "budgets": rows}


def peers(rows: dict[str, Any]) -> dict[str, Any]:
    """How often ModelOpt's program reached the optimum, and how far off it was at worst."""
    found = {}
    for name in next(iter(rows.values()))["modelopt"]:
        own = [row["modelopt"][name] for row in rows.values()]
        good = [m["within"] and m["times_the_optimum"] <= 1 + 1e-6 for m in own]
        worst = max(m["times_the_optimum"] for m in own)
        unused = max(float(b) - m["bits"] for b, m in zip(rows, own, strict=True))
        found[name] = {"optimal": sum(good), "worst_times": worst, "most_bits_unused": unused}
    return found


def main() -> None:
    """Runs it and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    arguments = parser.parse_args()
    if "ESPALIER_DATA" not in os.environ:
        sys.exit("ESPALIER_DATA must point to the data")
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    for model in arguments.models:
        one = {"whole": whole(model), "small": small(model)}
        optimal = [row["optimal"] for row in one["whole"]["budgets"].values()]
        one["summary"] = {
            "budgets": len(optimal),
            "optimal": sum(optimal),
            "enumerated_same": sum(row["same"] for row in one["small"]["budgets"].values()),
            "modelopt": peers(one["whole"]["budgets"]),
            "holds": all(optimal) and all(r["same"] for r in one["small"]["budgets"].values()),
        }
        print(model, one["summary"], flush=True)
        result["models"][model] = one
        result["machine"] = machine()
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
