"""How well latency predicted from measured pieces agrees with latency measured whole.

For each shipped family and input size: calibrate with each seed, then predict and measure fresh
random networks and the two extremes, none of which the calibration has seen. Two simpler
predictors are fitted to the same whole networks, for comparison: a line over MACs and a line over
parameters. One network is measured five times over, to say how far the measurement itself agrees
with itself.

    python benchmarks/latency_predictor.py              # 5 seeds, all settings: about 10 minutes
    python benchmarks/latency_predictor.py --seeds 1    # one seed
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

import espalier as esp
from espalier.costs import Counts, OnnxRuntime, PredictedLatency, machine
from espalier.costs.pieces import unseeded

RESULT = Path(__file__).parent / "results" / "latency_predictor.json"
SETTINGS = {
    f"{family} {name}": (family, shape)
    for family in ("mobilenet", "resnet")
    for name, shape in (
        ("digits 8x8", (1, 8, 8)),
        ("cifar 16x16", (3, 16, 16)),
        ("cifar 32x32", (3, 32, 32)),
    )
}
Array = NDArray[np.float64]


def measured(family: Any, runtime: OnnxRuntime, candidate: Any) -> float:
    """Median milliseconds of one fresh network."""
    with unseeded():
        network = family.build(candidate)
    return runtime.measure(network, family.example()).median_ms


def agreement(predicted: Array, truth: Array) -> dict[str, float]:
    """Rank correlation, shares within 10% and 5%, and median error."""
    off = np.abs(predicted / truth - 1)
    return {
        "spearman": float(spearmanr(predicted, truth).statistic),
        "within_10_percent": float(np.mean(off <= 0.1)),
        "within_5_percent": float(np.mean(off <= 0.05)),
        "median_error": float(np.median(off)),
    }


def line(x: Array, y: Array, at: Array) -> Array:
    """A least-relative-squares line through (x, y), at other places."""
    columns = np.column_stack([np.ones(len(x)), x])
    slope = np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]
    return np.asarray(np.column_stack([np.ones(len(at)), at]) @ slope)


def once(family_name: str, shape: tuple[int, ...], seed: int, networks: int) -> dict[str, Any]:
    """One calibration and its judgement on networks that it has not seen."""
    family = esp.nets.make(family_name, shape, 10)
    runtime = OnnxRuntime()
    space = family.space
    predictor = PredictedLatency(family, runtime)
    start = time.perf_counter()
    predictor.calibrate(seed=seed)
    seconds = time.perf_counter() - start
    codes = space.sample(networks, np.random.default_rng(1000 + seed))
    truth = np.array([measured(family, runtime, c) for c in space.decode(codes)])
    # the comparisons are given as many whole networks as the calibration measured
    seen = space.sample(22, np.random.default_rng(2000 + seed))
    seen_ms = np.array([measured(family, runtime, c) for c in space.decode(seen)])
    counts = Counts(family)
    here, there = counts.estimate_codes(seen), counts.estimate_codes(codes)
    ends = np.concatenate([space.corner(False), space.corner(True)])
    ends_truth = [measured(family, runtime, c) for c in space.decode(ends)]
    ends_off = predictor.estimate_codes(ends)["latency_ms"] / ends_truth - 1
    return {
        "predictor": agreement(predictor.estimate_codes(codes)["latency_ms"], truth),
        "line over macs": agreement(line(here["macs"], seen_ms, there["macs"]), truth),
        "line over params": agreement(line(here["params"], seen_ms, there["params"]), truth),
        "smallest_off": float(ends_off[0]),
        "largest_off": float(ends_off[1]),
        "stated": {k: predictor.error[k] for k in ("spearman", "within_10_percent")},
        "seconds": seconds,
        "latency_ms": [float(truth.min()), float(truth.max())],
        **{k: predictor.error[k] for k in ("units", "units_measured", "overhead_ms", "scale")},
        **{k: predictor.error[k] for k in ("filler", "load", "busy")},
    }


def repeated(family_name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """The same network measured five times: the range of the medians, relative to the middle."""
    family = esp.nets.make(family_name, shape, 10)
    found = [measured(family, OnnxRuntime(), family.uniform(0.5)) for _ in range(5)]
    middle = statistics.median(found)
    return {"median_ms": middle, "range": (max(found) - min(found)) / middle}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest over the seeds."""
    out: dict[str, Any] = {}
    for name in ("predictor", "line over macs", "line over params"):
        out[name] = {k: _spread([run[name][k] for run in runs]) for k in runs[0][name]}
    for name in ("seconds", "scale", "overhead_ms", "smallest_off", "largest_off", "load"):
        out[name] = _spread([run[name] for run in runs])
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Runs all settings, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--only", default="", help="a part of the setting's name")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "runtime": OnnxRuntime().about(),
        "torch": torch.__version__,
        "load_before": round(machine.load_now(1.0), 2),
        "networks": args.networks,
        "settings": {},
    }
    for name, (family, shape) in SETTINGS.items():
        if args.only not in name:
            continue
        runs = [once(family, shape, seed, args.networks) for seed in range(args.seeds)]
        short = summary(runs)
        repeat = repeated(family, shape)
        result["settings"][name] = {"summary": short, "repeated": repeat, "seeds": runs}
        ours, macs = short["predictor"], short["line over macs"]
        print(
            f"{name:22} spearman {ours['spearman']['median']:.3f} (least "
            f"{ours['spearman']['min']:.3f}), within 10% {ours['within_10_percent']['median']:.0%}"
            f" (least {ours['within_10_percent']['min']:.0%}), off {ours['median_error']['median']:.1%};"
            f" macs {macs['spearman']['median']:.3f}, {macs['within_10_percent']['median']:.0%};"
            f" {runs[0]['units_measured']} of {runs[0]['units']} pieces,"
            f" {short['seconds']['median']:.1f} s, load {short['load']['median']:.1f};"
            f" five times the same: {repeat['range']:.1%}",
            flush=True,
        )
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out.name}")


if __name__ == "__main__":
    main()
