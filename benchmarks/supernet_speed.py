"""How long a search step takes on the NAS-Bench-201 space, and how much memory, beside three peers.

    python benchmarks/supernet_speed.py --autodl CHECKOUT --naslib CHECKOUT --awnas CHECKOUT [--threads 1 2]

Checkouts of github.com/D-X-Y/AutoDL-Projects, github.com/automl/NASLib and github.com/walkerning/aw_nas;
what is not given is left out. All run in this environment, each case in a process of its own: what the
peers import beyond torch, numpy, scipy, networkx and yaml is not used by a step, and stand-ins take its
place (see peers/supernet_peer.py). A round runs every case once, so that a slow moment of the machine
meets all; ratios are taken within a round, and their median over rounds counts.

The same space (16 channels, 5 cells a stage, 32x32 images, batch 64), data, optimisers and clipping. Modes:
"darts", softmax over all operators; "gdas", one operator an edge by hard Gumbel softmax; "path", one
activated cell; the last two go through the same six cells in every tool. Of Espalier also "partial" (a
quarter of the channels is mixed, as in PC-DARTS) and "gates" (binary gates of two paths, ProxylessNAS).
Steps: "weights" learns the weights, "both" the architecture before them. Memory is the peak of the
resident set over the steps, less what it was before the first. NASLib has one size, so `--quick`
leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from espalier.costs import machine

RESULT = Path(__file__).parent / "results" / "supernet_speed.json"
SCRIPT = Path(__file__).parent / "peers" / "supernet_peer.py"
GOALS = {"fp32": 2.0, "bf16": 3.0}  # times faster than the fastest peer, at no more memory
GATES = 1.3  # memory of binary gates over that of one path
PARTIAL = {"peak_mib": 0.5, "seconds": 0.7}  # of partial channels over all of them
PEERS = {"xautodl": ("darts", "gdas", "path"), "naslib": ("darts", "gdas"), "awnas": ("darts", "path")}  # fmt: skip
OWN = ("darts", "gdas", "path", "partial", "gates")
Case = tuple[str, str, str]  # tool, mode, format


def cases(checkouts: dict[str, Path]) -> list[Case]:
    """Every case, those of a mode side by side."""
    found = [
        *((("espalier", mode, chosen)) for mode in OWN for chosen in GOALS),
        *((tool, mode, "fp32") for tool in checkouts for mode in PEERS[tool]),
    ]
    return sorted(found, key=lambda case: OWN.index(case[1]))


def run(case: Case, checkouts: dict[str, Path], sizes: dict[str, int]) -> dict[str, Any]:
    """One case in its own process: what it measured, or why it could not."""
    tool, mode, chosen = case
    request = {**sizes, "tool": tool, "mode": mode, "format": chosen}
    request["checkout"] = str(checkouts.get(tool, ""))
    threads = {f"{name}_NUM_THREADS": str(sizes["threads"]) for name in ("OMP", "MKL", "OPENBLAS")}
    load = machine.load_now(0.5)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, **threads},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"failed": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return {"load_before": round(load, 2), **found}


def median(rounds: list[dict[str, Any]], step: str, field: str) -> float | None:
    """The median over rounds; None where a round failed or has no such step."""
    values = [r[step][field] for r in rounds if step in r]
    return statistics.median(values) if values and len(values) == len(rounds) else None


def ratio(
    one: list[dict[str, Any]], other: list[dict[str, Any]], step: str, field: str
) -> float | None:
    """The median over rounds of one over the other."""
    pairs = [
        (a[step][field], b[step][field])
        for a, b in zip(one, other, strict=False)  # the last round may have been interrupted
        if step in a and step in b
    ]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def compared(found: dict[Case, list[dict[str, Any]]]) -> dict[str, Any]:
    """Espalier's cases against each peer of the mode, and whether the goals are met."""
    out: dict[str, Any] = {}
    for (tool, mode, chosen), own in found.items():
        if tool != "espalier":
            continue
        for step in ("weights", "both"):
            peers = {
                peer: {
                    "times_faster": ratio(rounds, own, step, "seconds"),
                    "times_less_cpu": ratio(rounds, own, step, "cpu_seconds"),
                    "memory": ratio(own, rounds, step, "peak_mib"),
                }
                for (peer, same, _), rounds in found.items()
                if peer != "espalier" and same == mode
            }
            peers = {name: row for name, row in peers.items() if row["times_faster"] is not None}
            if not peers:
                continue
            least = min(row["times_faster"] for row in peers.values())
            most = max(row["memory"] for row in peers.values())
            out[f"{mode} {chosen} {step}"] = {
                "peers": peers,
                "least_times_faster": least,
                "most_memory": most,
                "goal": GOALS[chosen],
                "met": least >= GOALS[chosen] and most <= 1,
            }
    return out


def own_ratios(found: dict[Case, list[dict[str, Any]]]) -> dict[str, Any]:
    """Gates against one path, and partial channels against all."""
    out: dict[str, Any] = {}
    for chosen in GOALS:
        case = {mode: found["espalier", mode, chosen] for mode in OWN}
        gates, path = (
            median(case["gates"], "both", "peak_mib"),
            median(case["path"], "weights", "peak_mib"),
        )
        if gates and path:
            out[f"gates over path, {chosen}"] = {
                "memory": gates / path,
                "goal": GATES,
                "met": gates / path <= GATES,
            }
        for step in ("weights", "both"):
            pairs = {f: ratio(case["partial"], case["darts"], step, f) for f in PARTIAL}
            if all(value is not None for value in pairs.values()):
                met = all((pairs[f] or 0) <= goal for f, goal in PARTIAL.items())
                out[f"partial over darts, {chosen} {step}"] = {**pairs, "goal": PARTIAL, "met": met}
    return out


def line(case: Case, rounds: list[dict[str, Any]]) -> str:
    parts = [f"{case[0]:9s} {case[1]:8s} {case[2]}"]
    failed = [r["failed"] for r in rounds if "failed" in r]
    if failed:
        return f"{parts[0]}  failed: {failed[0]}"
    for step in ("weights", "both"):
        if all(step in r for r in rounds):
            seconds, work, peak = (
                median(rounds, step, f) or 0 for f in ("seconds", "cpu_seconds", "peak_mib")
            )
            parts.append(f"{step} {seconds:.3f} s (cpu {work:.3f}), {peak:.0f} MiB")
    return "  ".join(parts)


def report(found: dict[Case, list[dict[str, Any]]]) -> dict[str, Any]:
    """All that is written of one number of threads."""
    return {
        "cases": [
            {"tool": tool, "mode": mode, "format": chosen, "rounds": rounds}
            for (tool, mode, chosen), rounds in found.items()
            if rounds
        ],
        "against_peers": compared(found),
        "of_espalier": own_ratios(found),
        "complete": len({len(rounds) for rounds in found.values()}) == 1,
    }


def main() -> None:
    """Runs every case in every round, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag in ("--autodl", "--naslib", "--awnas"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="repeats within a process")
    parser.add_argument("--quick", action="store_true", help="8 channels, 1 cell a stage, 1 round")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    given = {"xautodl": args.autodl, "naslib": args.naslib, "awnas": args.awnas}
    checkouts = {name: path.resolve() for name, path in given.items() if path}
    sizes = {"channels": 16, "cells": 5, "batch": 64, "rounds": args.steps}
    if args.quick:
        sizes |= {"channels": 8, "cells": 1, "rounds": 1}
        checkouts.pop("naslib", None)
    result: dict[str, Any] = {
        **sizes,
        "rounds": 1 if args.quick else args.rounds,
        "steps_a_round": sizes["rounds"],
        "processor": machine.processor(),
        "torch": torch.__version__,
        "goals_times_faster": GOALS,
        "threads": {},
    }
    for threads in args.threads:
        every = cases(checkouts)
        found: dict[Case, list[dict[str, Any]]] = {case: [] for case in every}
        for _ in range(result["rounds"]):
            for case in every:
                found[case].append(run(case, checkouts, {**sizes, "threads": threads}))
                print(f"{threads} threads  {line(case, found[case][-1:])}", flush=True)
                result["threads"][str(threads)] = report(found)  # what an interrupted run leaves
                args.out.write_text(json.dumps(result, indent=1) + "\n")
        comparison, own = compared(found), own_ratios(found)
        for name, row in comparison.items():
            print(
                f"{threads} threads  {name}: {row['least_times_faster']:.2f} times faster than the "
                f"fastest peer (goal {row['goal']:g}), memory at most {row['most_memory']:.2f} of a "
                f"peer's: {'met' if row['met'] else 'not met'}"
            )
        for name, row in own.items():
            print(f"{threads} threads  {name}: {row}")
    print(f"wrote {args.out.name}")


if __name__ == "__main__":
    main()
