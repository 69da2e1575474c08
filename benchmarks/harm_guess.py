"""What importances tell of harm, where there is no time to measure it.

For the originals of shrink_vs_peers.py: what the furthest option of every width harms (divergence on 256
training images), and the importance of the channels that it takes away, read on many images and on
few. Told are the rank correlation, and by what factor the harm is off in the median when it is the
importance times the median of harm by importance over a quarter of the widths, drawn at random; beside it the
same where every width is thought to harm as much as the median of that quarter does.

    python benchmarks/harm_guess.py [--models resnet20 resnet56] [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

import shrink_vs_peers as peers
from espalier.compress import Depth, Pretrained, Widths
from espalier.estimators.calibration import Calibrated
from espalier.flows.importances import importances
from espalier.flows.machine import machine

RESULT = Path(__file__).parent / "results" / "harm_guess.json"
BASELINE = {"resnet20": 150.0, "resnet56": 300.0, "mobilenet": 600.0}
IMAGES, FEW, JUDGED, LEAST = (512, 16), 0.25, 256, 1e-9
Numbers = NDArray[np.float64]


def off(harm: Numbers, guess: Numbers, seed: int) -> float:
    """The median factor between harm and what a quarter of it says of the rest."""
    order = np.random.default_rng(seed).permutation(len(harm))
    told, rest = np.split(order, [max(round(FEW * len(harm)), 2)])
    scale = np.median(harm[told] / guess[told])
    apart = np.log(np.maximum(harm[rest], LEAST) / np.maximum(scale * guess[rest], LEAST))
    return float(np.exp(np.median(np.abs(apart))))


def rows(name: str, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each number of images."""
    task = peers.without_test(peers.task_of(name, peers.DATA[name]))
    model = peers.original_of(name, task, BASELINE[name], folder)[0]
    cuts = (Widths(), Depth())
    example = next(task.batches("train", 2))[0]
    family = Pretrained(model, example, cuts)
    scores = {n: importances(family, cuts, task, 0, n) for n in IMAGES}
    family = family.with_scores(scores[IMAGES[0]])
    widths = [d for d in family.space.decisions if d.name.startswith("width:")]
    judge = Calibrated(family, task, measure="divergence", images=JUDGED)
    cut = [{**family.original, d.name: d.options[0]} for d in widths]
    harm = judge.harm([family.space.candidate(c) for c in cut])
    harm -= judge.harm([family.original])[0]
    found = []
    for images, some in scores.items():
        ordered = [some[d.name.removeprefix("width:")].sort().values for d in widths]
        gone = zip(ordered, widths, strict=True)
        guess = np.array([float(v[: len(v) - int(d.options[0])].sum()) for v, d in gone])
        found.append(
            {
                "model": name,
                "images": images,
                "widths": len(widths),
                "rank_correlation": float(spearmanr(guess, harm).statistic),
                "off": [off(harm, guess, seed) for seed in range(seeds)],
                "off_constant": [off(harm, np.ones(len(harm)), s) for s in range(seeds)],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/shrink_vs_peers"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = [row for name in options.models for row in rows(name, options.folder, options.seeds)]
    for row in found:
        middle = {k: statistics.median(row[k]) for k in ("off", "off_constant")}
        print(json.dumps({**row, **middle}), flush=True)
    settings = {"judged": JUDGED, "told": FEW, "threads": 1, "machine": machine()}
    options.out.write_text(json.dumps({"settings": settings, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
