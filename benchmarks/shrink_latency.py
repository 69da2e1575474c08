"""How well the latency table of a trained model predicts shrunk models, measured whole.

Random candidates of widths and depth of ResNet-20 (and other models of `models.py`), for those called
mixed also of layers in 8 bits beside layers in float: the table is calibrated, then candidates that it
has not seen are predicted, built, and measured in ONNX Runtime. A line over MACs, fitted to as many
whole networks as the calibration measures, is the comparison; for mixed ones also a line over the table
without its turns, the pieces where floats meet integers.
Each network is measured in rounds until it was once measured while the machine ran at its best
pace, as a small network timed before and after tells; `steady` is the share that was, the others
count with their least median.
Goal: Spearman at least 0.95 and 90% within 10% on 50 random shrunk ResNet-20s.

    python benchmarks/shrink_latency.py                   # ResNet-20, MobileNet, 3 seeds
    python benchmarks/shrink_latency.py --only resnet20 --seeds 1 --networks 50
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

import models
from espalier.compress import Bits, Cut, Depth, Pretrained, Widths
from espalier.costs import Counts, OnnxRuntime, PredictedLatency, machine
from espalier.costs.pace import STEADY, Pace
from espalier.costs.turn import Turn
from espalier.export import to_onnx

RESULT = Path(__file__).parent / "results" / "shrink_latency.json"
FLOAT: tuple[Cut, ...] = (Widths(), Depth())
MIXED = (*FLOAT, Bits())
SETTINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Sequence[Cut]]] = {
    "resnet20": (models.resnet20, (1, 3, 32, 32), FLOAT),
    "resnet20 pad": (lambda: models.resnet20("pad"), (1, 3, 32, 32), FLOAT),
    "resnet20 mixed": (models.resnet20, (1, 3, 32, 32), MIXED),
    "mobilenet": (models.mobilenet, (1, 3, 16, 16), FLOAT),
    "mobilenet mixed": (models.mobilenet, (1, 3, 16, 16), MIXED),
    "resnet56": (models.resnet56, (1, 3, 32, 32), FLOAT),
}
Array = NDArray[np.float64]


def agreement(predicted: Array, truth: Array) -> dict[str, float]:
    """Rank correlation, share within 10%, median and largest error."""
    off = np.abs(predicted / truth - 1)
    return {
        "spearman": float(spearmanr(predicted, truth).statistic),
        "within_10_percent": float(np.mean(off <= 0.1)),
        "median_error": float(np.median(off)),
        "largest_error": float(np.max(off)),
    }


def line(x: Array, y: Array, at: Array) -> Array:
    """A least-relative-squares line through (x, y), at other places."""
    columns = np.column_stack([np.ones(len(x)), x])
    slope = np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]
    return np.asarray(np.column_stack([np.ones(len(at)), at]) @ slope)


def once(name: str, seed: int, networks: int, runtime: OnnxRuntime, rounds: int) -> dict[str, Any]:
    """One calibration, and its judgement on candidates that it has not seen."""
    make, shape, cuts = SETTINGS[name]
    torch.manual_seed(seed)
    data = torch.randn(16, *shape[1:])
    family = Pretrained(make(), torch.zeros(shape), cuts, name, calibration=data)
    table = PredictedLatency(family, runtime)
    start = time.perf_counter()
    error = table.calibrate(seed=seed)["error"]
    seconds = time.perf_counter() - start
    space = family.space
    rows = space.sample(networks + 22, np.random.default_rng(1000 + seed))
    clocks = machine.snapshot()
    ends = np.concatenate([space.corner(False), space.corner(True)])
    every, steady = measured(family, runtime, np.concatenate([rows, ends]), rounds)
    truth, ends_ms = every[: len(rows)], every[len(rows) :]
    macs = Counts(family).estimate_codes(rows)["macs"]
    seen, held = slice(networks, None), slice(networks)
    every_ms = table.estimate_codes(rows)["latency_ms"]
    predicted, layers = every_ms[held], every_ms - turned(table, rows)
    ends_off = table.estimate_codes(ends)["latency_ms"] / ends_ms - 1
    return {
        "table": agreement(predicted, truth[held]),
        "line over macs": agreement(line(macs[seen], truth[seen], macs[held]), truth[held]),
        "without turns": agreement(line(layers[seen], truth[seen], layers[held]), truth[held]),
        "steady": steady,
        "seconds": seconds,
        "smallest_off": float(ends_off[0]),
        "original_off": float(ends_off[1]),
        "original_ms": float(ends_ms[1]),
        "load": machine.load_between(clocks, machine.snapshot()),
        "stated": {k: error[k] for k in ("spearman", "within_10_percent")},
        **{k: error[k] for k in ("units", "units_measured", "overhead_ms", "scale", "filler")},
        "candidates": [
            {"candidate": c.to_json(), "predicted_ms": float(p), "measured_ms": float(m)}
            for c, p, m in zip(space.decode(rows[held]), predicted, truth[held], strict=True)
        ],
    }


def turned(table: PredictedLatency, rows: Any) -> Array:
    """Milliseconds of the turns of each row."""
    terms, total = table.terms("latency_ms"), np.zeros(len(rows))
    for part in terms.pieces.parts(rows):
        if part.pieces and isinstance(terms.pieces.make(part.pieces[0])[0], Turn):
            total += part.values(np.array([terms.of(piece) for piece in part.pieces]))
    return total


def measured(
    family: Pretrained, runtime: OnnxRuntime, rows: Any, rounds: int
) -> tuple[Array, float]:
    """Milliseconds at the machine's best pace, and the share of networks that were met at it."""
    x = runtime.batched(family.example())
    built = [to_onnx(family.build(c), x, fast=True) for c in family.space.decode(rows)]
    pace = Pace(runtime)
    taken: list[list[tuple[float, float]]] = [[] for _ in built]  # pace, milliseconds
    for _ in range(rounds):
        best = max([1.0, *(p for tries in taken for p, _ in tries)])
        for tries, model in zip(taken, built, strict=True):
            if not any(p >= best * (1 - STEADY) for p, _ in tries):
                before = pace.now()
                ms = runtime.quick(model, x, least_seconds=0.05).median_ms
                tries.append((min(before, pace.now()), ms))
    best = float(np.quantile([max(p for p, _ in tries) for tries in taken], 0.9))
    steady = [[ms for p, ms in tries if p >= best * (1 - 2 * STEADY)] for tries in taken]
    least = [min(at or [ms for _, ms in t]) for at, t in zip(steady, taken, strict=True)]
    return np.array(least), float(np.mean([len(at) > 0 for at in steady]))


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest over the seeds."""
    out: dict[str, Any] = {}
    for name in ("table", "line over macs", "without turns"):
        out[name] = {k: _spread([run[name][k] for run in runs]) for k in runs[0][name]}
    for name in ("seconds", "scale", "overhead_ms", "smallest_off", "original_off", "load"):
        out[name] = _spread([run[name] for run in runs])
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Runs the settings, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="resnet20,mobilenet", help="names, or 'all'")
    parser.add_argument("--seconds", type=float, default=1.0, help="a timing's limit")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runtime = OnnxRuntime(seconds=args.seconds)
    result: dict[str, Any] = {
        "runtime": runtime.about(),
        "torch": torch.__version__,
        "load_before": round(machine.load_now(1.0), 2),
        "networks": args.networks,
        "settings": {},
    }
    if args.out.exists():  # settings that are not run again stay
        result["settings"] = json.loads(args.out.read_text())["settings"]
    for name in SETTINGS if args.only == "all" else args.only.split(","):
        runs = [once(name, seed, args.networks, runtime, args.rounds) for seed in range(args.seeds)]
        result["settings"][name] = {"summary": summary(runs), "seeds": runs}
        print(said(name, result["settings"][name]["summary"], runs[0]), flush=True)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out.name}")


def said(name: str, short: dict[str, Any], run: dict[str, Any]) -> str:
    """One line on a setting."""
    ours, macs, layers = (short[k] for k in ("table", "line over macs", "without turns"))
    return (
        f"{name:13} spearman {ours['spearman']['median']:.3f} (least {ours['spearman']['min']:.3f}),"
        f" within 10% {ours['within_10_percent']['median']:.0%} (least "
        f"{ours['within_10_percent']['min']:.0%}), off {ours['median_error']['median']:.1%}; macs "
        f"{macs['spearman']['median']:.3f}, {macs['within_10_percent']['median']:.0%}; without turns "
        f"{layers['spearman']['median']:.3f}, {layers['within_10_percent']['median']:.0%}; original "
        f"{run['original_ms']:.2f} ms, off {short['original_off']['median']:+.1%}; "
        f"{run['steady']:.0%} steady; "
        f"{run['units_measured']} of {run['units']} pieces, {short['seconds']['median']:.0f} s, "
        f"scale {run['scale']:.2f}, overhead {run['overhead_ms']:.3f} ms, "
        f"load {short['load']['median']:.1f}"
    )


if __name__ == "__main__":
    main()
