"""DeepMAD's published budgets: designs of our program beside the published structures.

    python benchmarks/deepmad.py [--budgets R18 R34 R50 29M] [--seconds 50]

Goal: each design is within its budgets and scores at least what the published structure does, found
in less than 60 s on one core. Score, effectiveness and parameters are judged again by a walk through
the network that is built from the design: its convolutions, their fan-ins and the maps they give.
Writes results/deepmad.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.nets.bottlenecks import network
from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes.deepmad import PUBLISHED, published

RESULT = Path(__file__).parent / "results" / "deepmad.json"
GOAL_SECONDS = 60


def walked(model: nn.Module, wanted: deepmad.Wanted) -> dict[str, float]:
    """Score, effectiveness and parameters from a network that runs."""
    sides: dict[nn.Module, int] = {}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda m, x, y: sides.__setitem__(m, y.shape[-1]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, wanted.resolution, wanted.resolution))
    entropy, layers, now = 0.0, 0, (0, 0, 0.0, 0)
    ends: list[tuple[int, int, float, int]] = []
    for name, part in model.named_children():
        main = [
            m
            for path, m in part.named_modules()
            if isinstance(m, nn.Conv2d) and "shortcut" not in path and "weigh" not in path
        ]
        if name != "stem" and any(m.stride[0] == 2 for m in main):
            ends.append(now)
        for conv in main:
            entropy += 0.5 * math.log(conv.in_channels // conv.groups * conv.kernel_size[0] ** 2)
            layers += 1
            now = (conv.out_channels, sides[conv], entropy, layers)
    ends.append(now)
    stages = zip(wanted.weights, ends, strict=True)
    groups = wanted.layout.groups[wanted.uneven :]
    depths = [len(list(model.get_submodule(g).children())) for g in groups]
    penalty = 10 * math.exp(float(np.std(depths)))
    return {
        "score": sum(w * math.log(c * r * r) * e for w, (c, r, e, _) in stages) - penalty,
        "effectiveness": max(n / math.exp(2 * e / n) for *_, e, n in ends),
        "params": sum(p.numel() for name, p in model.named_parameters() if "linear" not in name),
    }


def measured(name: str, seconds: float) -> dict[str, Any]:
    """A design for one budget, judged twice."""
    wanted, _ = PUBLISHED[name]
    found = published(name, seconds)
    again = walked(network(found["choices"], wanted.layout, 3, 1000), wanted)
    found["walked"] = again
    found["same"] = all(math.isclose(found[k], again[k], rel_tol=1e-9) for k in again)
    if name == "29M":  # the authors' counter takes maps behind a squeeze and excitation for 1x1
        unsized = deepmad.measured(replace(wanted, sized=False), found["choices"])["score"]
        found["as_the_authors_count"] = {"score": unsized, "published": 11870.70}
    found["holds"] = (
        found["within"]
        and found["same"]
        and found["score"] >= found["published"]
        and found["processor_seconds"] < GOAL_SECONDS
    )
    print(
        f"{name}: {found['score']:,.2f} (published {found['published']:,.2f}), "
        f"{found['flops'] / 1e9:.3f}e9, {found['params'] / 1e6:.2f}e6, "
        f"effectiveness {found['effectiveness']:.4f}, {found['processor_seconds']:.1f} s of one "
        f"core, holds: {found['holds']}",
        flush=True,
    )
    return found


def main() -> None:
    """Runs it and writes the results, adding to what other budgets gave before."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budgets", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seconds", type=float, default=50)
    arguments = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"designs": {}}
    result["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1}
    for name in arguments.budgets:
        load = os.getloadavg()[0]
        result["designs"][name] = measured(name, arguments.seconds) | {"load": load}
        result["holds"] = all(d["holds"] for d in result["designs"].values())
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
