"""How long zero-cost proxies take on NAS-Bench-201 networks, beside zero-cost-nas and NASLib.

    python benchmarks/zero_cost_speed.py --zero-cost-nas CHECKOUT --naslib CHECKOUT [--cells 5]

Checkouts of github.com/SamsungLabs/zero-cost-nas and github.com/automl/NASLib; what is not given is
left out. All measure the same network objects (16 channels, 5 cells a stage) on the same batch of
64 random images, one after the other for each cell, so that a slow moment of the machine meets all;
the least of the repeats counts. Each peer's measures are summed; ours are asked for together, the
peer's set and the whole one. The values are compared too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.costs import machine
from espalier.estimators.zero_cost import ALL, scores
from espalier.nets.nb201 import NB201

RESULT = Path(__file__).parent / "results" / "zero_cost_speed.json"
GOAL = 4.0  # times faster than zero-cost-nas, for its measures
# ours, and the peers' names
NAMES = {
    "grad_norm": "grad_norm",
    "snip": "snip",
    "grasp": "grasp",
    "fisher": "fisher",
    "jacob_cov": "jacob_cov",
    "plain": "plain",
    "synflow": "synflow",
}
NASLIB = {**NAMES, "jacob_cov": "jacov", "epe_nas": "epe_nas", "l2": "l2_norm", "naswot": "nwot"}
NASLIB["zen"] = "zen"
_WEIGHED = (
    "grad_norm",
    "snip",
    "fisher",
    "grasp",
    "jacob_cov",
    "synflow",
    "epe_nas",
    "l2",
    "naswot",
)

Measure = Callable[[str, nn.Module, Tensor, Tensor], Any]


class Network(nn.Module):
    """A network as the peers want it: with its features before the pooling at hand."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out

    def forward_before_global_avg_pool(self, x: Tensor) -> Tensor:
        """The last feature map."""
        found: list[Tensor] = []
        pools = [m for m in self.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
        handle = pools[-1].register_forward_pre_hook(lambda m, args: found.append(args[0]))
        self(x)
        handle.remove()
        return found[0]


def zero_cost_nas(checkout: Path) -> Measure:
    """The measures of zero-cost-nas, called as its own entry point calls them."""
    sys.path.insert(0, str(checkout))
    return _peer("foresight.pruners")


def naslib(checkout: Path) -> Measure:
    """The measures of NASLib. Its packages import dozens of others on the way: only what is under
    `pruners` is needed, so the packages above are entered without running them."""
    for name in ("naslib", "naslib.predictors", "naslib.predictors.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["naslib.predictors.utils.models"] = types.ModuleType("models")
    counting = types.ModuleType("tensorwatch")  # not used here, but named in a signature
    counting.ModelStats = object  # type: ignore[attr-defined]
    sys.modules["tensorwatch"] = counting
    return _peer("naslib.predictors.utils.pruners")


def _peer(package: str) -> Measure:
    entry = importlib.import_module(f"{package}.predictive")
    measures = importlib.import_module(f"{package}.measures")

    def measure(name: str, network: nn.Module, x: Tensor, y: Tensor) -> Any:
        if not hasattr(network, "get_prunable_copy"):
            network.get_prunable_copy = types.MethodType(entry.copynet, network)
        found = measures.calc_measure(
            name, network, "cpu", x, y, loss_fn=cross_entropy, split_data=1
        )
        if isinstance(found, (list, tuple)):
            return float(sum(float(torch.sum(part)) for part in found))
        return float(np.real(found))

    return measure


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, wall ms and ms of processor time."""
    start, work = time.perf_counter(), time.process_time()
    found = run()
    return found, (time.perf_counter() - start) * 1e3, (time.process_time() - work) * 1e3


def one_cell(
    made: nn.Module,
    x: Tensor,
    y: Tensor,
    peers: dict[str, tuple[Measure, dict[str, str]]],
    repeats: int,
) -> dict[str, Any]:
    """Times of one network by every tool, the least over the repeats, and values."""
    best: dict[str, dict[str, list[float]]] = {}
    values: dict[str, dict[str, float]] = {}

    def note(tool: str, name: str, got: tuple[Any, float, float]) -> None:
        kept = best.setdefault(tool, {}).setdefault(name, [math.inf, math.inf])
        kept[:] = [min(kept[0], got[1]), min(kept[1], got[2])]

    for _ in range(repeats):
        got = timed(lambda: scores(made, x, y))
        note("espalier", "all", got)
        values["espalier"] = got[0]
        for tool, (measure, names) in peers.items():
            note(
                "espalier", f"as {tool}", timed(lambda names=names: scores(made, x, y, list(names)))
            )
            network = Network(made).train()
            for name, theirs in names.items():
                got = timed(lambda n=theirs, m=measure, net=network: m(n, net, x.clone(), y))
                note(tool, name, got)
                values.setdefault(tool, {})[name] = got[0]
    return {"ms": best, "values": values}


def differences(cells: list[dict[str, Any]], tool: str) -> dict[str, float]:
    """The largest relative difference of each measure from a peer's, over cells."""
    out: dict[str, float] = {}
    for name in _WEIGHED:
        pairs = [(c["values"]["espalier"][name], c["values"][tool].get(name)) for c in cells]
        known = [(a, b) for a, b in pairs if b is not None and math.isfinite(b)]
        if name == "synflow":
            known = [(a, math.log(b)) for a, b in known if b > 0]
        if known:
            out[name] = max(abs(a - b) / max(abs(b), 1e-12) for a, b in known)
    return out


def summary(cells: list[dict[str, Any]], tools: list[str]) -> dict[str, Any]:
    """Medians over cells, and paired ratios."""
    out: dict[str, Any] = {
        "espalier": {
            "all_ms": statistics.median(c["ms"]["espalier"]["all"][0] for c in cells),
            "all_cpu_ms": statistics.median(c["ms"]["espalier"]["all"][1] for c in cells),
        }
    }
    for tool in tools:
        own = [c["ms"]["espalier"][f"as {tool}"] for c in cells]
        sums = [[sum(t[i] for t in c["ms"][tool].values()) for i in (0, 1)] for c in cells]
        ratios = [[s[i] / o[i] for i in (0, 1)] for s, o in zip(sums, own, strict=True)]
        out[tool] = {
            "measures": list(cells[0]["ms"][tool]),
            "ms": {
                name: statistics.median(c["ms"][tool][name][0] for c in cells)
                for name in cells[0]["ms"][tool]
            },
            "total_ms": statistics.median(s[0] for s in sums),
            "total_cpu_ms": statistics.median(s[1] for s in sums),
            "espalier_ms": statistics.median(o[0] for o in own),
            "espalier_cpu_ms": statistics.median(o[1] for o in own),
            "times_faster": {
                "median": statistics.median(r[0] for r in ratios),
                "min": min(r[0] for r in ratios),
                "max": max(r[0] for r in ratios),
                "median_cpu": statistics.median(r[1] for r in ratios),
            },
            "largest_relative_difference": differences(cells, tool),
        }
    return out


def main() -> None:
    """Times every tool on the same cells and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--zero-cost-nas", type=Path)
    parser.add_argument("--naslib", type=Path)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    peers: dict[str, tuple[Measure, dict[str, str]]] = {}
    if args.zero_cost_nas:
        peers["zero-cost-nas"] = (zero_cost_nas(args.zero_cost_nas), NAMES)
    if args.naslib:
        peers["naslib"] = (naslib(args.naslib), NASLIB)
    family = NB201()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=random)
    y = torch.randint(0, 10, (64,), generator=random)
    candidates = family.space.decode(family.space.sample(args.cells, np.random.default_rng(0)))
    result: dict[str, Any] = {
        "cells": [c.to_json() for c in candidates],
        "batch": 64,
        "repeats": args.repeats,
        "goal_times_faster": GOAL,
        "processor": machine.processor(),
        "torch": torch.__version__,
        "measures": list(ALL),
        "threads": {},
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        load = machine.load_now(1.0)
        cells = []
        for candidate in candidates:
            torch.manual_seed(0)
            made = family.build(candidate)
            cells.append(one_cell(made, x, y, peers, args.repeats))
        found = {"load_before": round(load, 2), **summary(cells, list(peers))}
        result["threads"][str(threads)] = found
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{threads} threads: all {len(ALL)} measures {found['espalier']['all_ms']:.0f} ms")
        for tool in peers:
            one = found[tool]
            print(
                f"  {tool}: {one['total_ms']:.0f} ms for {len(one['measures'])} measures, here "
                f"{one['espalier_ms']:.0f} ms: {one['times_faster']['median']:.1f} times faster "
                f"({one['times_faster']['min']:.1f} to {one['times_faster']['max']:.1f}; "
                f"by processor time {one['times_faster']['median_cpu']:.1f})"
            )
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
