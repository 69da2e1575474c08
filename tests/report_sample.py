"""A made-up but realistic result of a search, from a seed: what the tests of the report draw."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDTHS, KERNELS, EXPANSIONS, DEPTHS = (8, 16, 24, 32), (3, 5, 7), (1, 2, 4), (1, 2, 3)


def sample_result(seed: int = 0, trials: int = 150) -> dict[str, Any]:
    """A finished search on digits with three limits, the found network ahead of the baselines."""
    rng = np.random.default_rng(seed)
    rows = [_trial(rng, i, "search" if i < trials // 2 else "random") for i in range(trials)]
    network = _network()
    params, macs = (int(sum(layer[k] for layer in network)) for k in ("params", "macs"))
    best = _entry(rng, "found", 0.981, 0.283, params)
    best["metrics"]["macs"]["value"] = macs
    hand = _entry(rng, "scaled by hand", 0.961, 0.291, 52_100)
    chance = _entry(rng, "random search", 0.972, 0.276, 47_700)
    front = [
        best,
        _entry(rng, "found", 0.967, 0.171, 22_400),
        _entry(rng, "found", 0.942, 0.112, 9_870),
    ]
    return {
        "espalier": "0.1.0",
        "title": "mobilenet for digits",
        "question": _question(),
        "best": best,
        "front": front,
        "baselines": [hand, chance],
        "supernet": {"epochs": 60},
        "budget": {
            "asked": "2min",
            "seconds": 117.4,
            "trials": trials,
            "kept": {"latency_ms": True},
        },
        "seconds": {
            "calibrate": 9.1,
            "supernet": 41.0,
            "search": 14.2,
            "random": 13.9,
            "final": 39.2,
        },
        "files": {"onnx": "export/best.onnx", "pt2": "export/best.pt2"},
        "progress": _progress(rows),
        "trials": rows,
        "latency": _latency(rng),
        "decisions": _decisions(rows),
        "network": network,
        "notes": ["The machine was busy for 2 of 31 measurements; they were repeated."],
        "reproduce": {
            "command": "espalier search --task digits --family mobilenet --max latency_ms=0.3 "
            "--max params=60000 --max macs=2000000 --budget 2min --seed 0 --workers 2",
            "python": "esp.search('mobilenet', 'digits', within={'latency_ms': 0.3, 'params': '60k', "
            "'macs': '2M'}, budget='2min', seed=0)",
            "versions": {"python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        },
    }


def _question() -> dict[str, Any]:
    return {
        "task": {
            "name": "digits", "classes": 10, "shape": [1, 8, 8],
            "train": 1079, "validation": 359, "test": 359,
        },
        "family": {
            "name": "mobilenet",
            "size": 8_748_000.0,
            "decisions": [
                {"name": name, "kind": "ordinal", "options": list(options)}
                for name, options in _space().items()
            ],
        },
        "limits": [
            {"metric": "latency_ms", "op": "<=", "bound": 0.3, "unit": "ms"},
            {"metric": "params", "op": "<=", "bound": 60_000.0, "unit": ""},
            {"metric": "macs", "op": "<=", "bound": 2_000_000.0, "unit": ""},
        ],
        "runtime": {
            "name": "ONNX Runtime 1.31.1 on cpu, 1 thread, batch 1", "runtime": "onnxruntime",
            "version": "1.31.1", "device": "cpu", "threads": 1, "batch": 1, "precision": 0.02,
        },
        "machine": {
            "cpu": "Example CPU @ 2.50GHz", "cores": 2, "memory_gb": 7.6, "system": "Linux 6.1",
            "python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.31.1",
        },
        "seed": 0,
        "budget": "2min",
    }  # fmt: skip


def _space() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"resolution": (8, 12, 16)}
    for i in range(1, 4):
        out |= {f"depth{i}": DEPTHS, f"width{i}": WIDTHS}
        out |= {f"kernel{i}": KERNELS, f"expansion{i}": EXPANSIONS}
    return out


def _candidate(rng: np.random.Generator) -> dict[str, int]:
    return {name: int(rng.choice(options)) for name, options in _space().items()}


def _size(candidate: dict[str, int]) -> float:
    """Between 0 and 1: where the candidate's options stand on average."""
    ranks = [options.index(candidate[k]) / (len(options) - 1) for k, options in _space().items()]
    return float(np.mean(ranks))


def _trial(rng: np.random.Generator, index: int, phase: str) -> dict[str, Any]:
    candidate = _candidate(rng)
    size = _size(candidate)
    learned = 0.5 * index / 75 if phase == "search" else 0.0
    accuracy = 0.6 + 0.32 * (1 - np.exp(-3 * size - learned)) + rng.normal(0, 0.02)
    row: dict[str, Any] = {
        "id": index, "phase": phase, "candidate": candidate, "state": "done", "violation": 0.0,
        "accuracy": float(min(accuracy, 0.97)),
        "latency_ms": float(0.08 + 0.4 * size * (candidate["resolution"] / 16) ** 1.5),
        "params": float(4_000 + 90_000 * size**2),
        "macs": float(1e5 + 3e6 * size**2 * (candidate["resolution"] / 16) ** 2),
    }  # fmt: skip
    if index % 50 == 7:
        row |= {"state": "failed", "accuracy": None}
    if row["latency_ms"] > 0.3:
        row["violation"] = row["latency_ms"] / 0.3 - 1
    return row


def _entry(
    rng: np.random.Generator, name: str, accuracy: float, latency: float, params: int
) -> dict[str, Any]:
    def read(value: float, unit: str, how: str, split: str = "", **more: float) -> dict[str, Any]:
        return {"value": value, "unit": unit, "how": how, "split": split, **more}

    return {
        "id": f"{rng.integers(16**6):06x}",
        "name": name,
        "candidate": _candidate(rng),
        "metrics": {
            "accuracy": read(accuracy, "", "measured", "test"),
            "accuracy_validation": read(accuracy + 0.004, "", "measured", "validation"),
            "accuracy_estimated": read(accuracy - 0.06, "", "estimated", "validation"),
            "latency_ms": read(latency, "ms", "measured", spread=0.004),
            "latency_ms_predicted": read(latency * 0.97, "ms", "predicted"),
            "params": read(params, "", "counted"),
            "macs": read(params * 31.0, "", "counted"),
            "bytes": read(params * 4.2 + 9000, "B", "counted"),
            "activation_bytes": read(73_000, "B", "counted"),
        },
        "start": "supernet" if name == "found" else "scratch",
    }


def _progress(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for phase in ("search", "random"):
        best = 0.0
        for count, row in enumerate((r for r in rows if r["phase"] == phase), 1):
            if row["accuracy"] is not None and not row["violation"]:
                best = max(best, row["accuracy"])
            if best:
                out.append({"phase": phase, "trial": count, "seconds": 0.19 * count, "best": best})
    return out


def _latency(rng: np.random.Generator) -> dict[str, Any]:
    held_out = []
    for _ in range(20):
        candidate = _candidate(rng)
        true = 0.06 + 0.5 * _size(candidate)
        held_out.append(
            {"candidate": candidate, "measured": true, "predicted": true * rng.normal(1.0, 0.06)}
        )
    close = [abs(h["predicted"] / h["measured"] - 1) <= 0.1 for h in held_out]
    return {
        "spearman": 0.968, "within_10_percent": float(np.mean(close)), "held_out": held_out,
        "overhead_ms": 0.011, "scale": 1.02, "units": 214, "seconds": 8.3,
    }  # fmt: skip


def _decisions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = [r for r in rows if r["accuracy"] is not None]
    overall = [np.mean([r[k] for r in done]) for k in ("accuracy", "latency_ms")]
    out = []
    for name, options in _space().items():
        for option in options:
            chosen = [r for r in done if r["candidate"][name] == option]
            means = [np.mean([r[k] for r in chosen]) for k in ("accuracy", "latency_ms")]
            out.append(
                {
                    "decision": name, "option": option, "n": len(chosen),
                    "accuracy": float(means[0] - overall[0]), "cost": float(means[1] - overall[1]),
                }
            )  # fmt: skip
    return out


def _network() -> list[dict[str, Any]]:
    """A stem, nine inverted bottlenecks in three stages, a head: layers as `costs.layers` lists."""
    rows: list[dict[str, Any]] = []

    def conv(stage: str, name: str, into: int, out: int, side: int, kernel: int, stride: int = 1,
             groups: int = 1) -> int:  # fmt: skip
        after = side // stride
        params = into * out * kernel**2 // groups
        kind = "depthwise" if groups > 1 else "conv"
        shape = {"in_shape": [into, side, side], "out_shape": [out, after, after]}
        macs = params * after**2
        rows.append({
            "stage": stage, "name": f"{stage}.{name}", "kind": kind, **shape, "kernel": kernel,
            "stride": stride, "groups": groups, "params": params, "macs": macs, "latency_ms": None,
        })  # fmt: skip
        light = {**shape, "in_shape": [out, after, after], "kernel": None, "stride": None}
        for end, what, count in (("norm", "norm", 2 * out), ("act", "activation", 0)):
            rows.append({
                "stage": stage, "name": f"{stage}.{name}_{end}", "kind": what, **light,
                "groups": None, "params": count, "macs": 0, "latency_ms": None,
            })  # fmt: skip
        return after

    side, width = conv("stem", "conv", 1, 16, 16, 3), 16
    for stage, (out, kernel, expand, depth) in enumerate(
        ((12, 3, 2, 2), (16, 5, 4, 2), (32, 7, 4, 3))
    ):
        for block in range(depth):
            name, stride = f"stage{stage + 1}.{block}", 2 if block == 0 and stage else 1
            wide = width * expand
            conv(name, "expand", width, wide, side, 1)
            side = conv(name, "depthwise", wide, wide, side, kernel, stride, wide)
            conv(name, "project", wide, out, side, 1)
            width = out
    conv("head", "conv", width, 128, side, 1)
    rows.append({
        "stage": "head", "name": "head.linear", "kind": "linear", "in_shape": [128],
        "out_shape": [10], "kernel": None, "stride": None, "groups": None, "params": 1290,
        "macs": 1280, "latency_ms": None,
    })  # fmt: skip
    return rows
