"""aw_nas times its own regularised evolution on the NAS-Bench-201 space, asking and telling.

Run by strategies_speed.py in this environment (it needs torch), one JSON request on standard input; the
answer on standard output is a list of {"wall", "cpu"} in seconds. The checkout runs as it is; only what
reads a cell from its text is the space's own instead of the NAS-Bench-201 package's, which is absent.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_peer import clocked
from supernet_peer import stand_in


def run(request: dict[str, Any]) -> dict[str, float]:
    """One run: population 30, tournament 10, `batch` candidates at a time."""
    found: Any = importlib.import_module("aw_nas.btcs.nasbench_201")
    evolution: Any = importlib.import_module("aw_nas.controller.evo")
    space = found.NasBench201SearchSpace(load_nasbench=False)
    found.API = types.SimpleNamespace(str2matrix=space.str2matrix)
    controller = evolution.EvoController(
        space,
        torch.device("cpu"),
        rollout_type="nasbench-201",
        mode="train",
        population_size=30,
        parent_pool_size=10,
    )
    np.random.seed(request["seed"])  # noqa: NPY002  it draws from numpy's global generator
    slope = np.arange(1, len(space.idx[0]) + 1, dtype=float)

    def work() -> None:
        for _ in range(request["queries"] // request["batch"]):
            rollouts = controller.sample(request["batch"])
            for rollout in rollouts:
                rollout.set_perf(float(rollout.arch[space.idx] @ slope), "reward")
            controller.step(rollouts)

    return clocked(work)


def main() -> None:
    """Every repeat of one request."""
    request = json.loads(sys.stdin.read())
    stand_in(Path(request["checkout"]))
    answer, sys.stdout = sys.stdout, sys.stderr  # it logs to standard output
    logging.disable(logging.CRITICAL)
    times = [run({**request, "seed": seed}) for seed in range(request["repeats"])]
    print(json.dumps(times), file=answer)


if __name__ == "__main__":
    main()
