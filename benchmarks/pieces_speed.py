"""How long it takes to list the pieces of a trained model: by shapes alone, and with real tensors.

A latency table and the exact program need every layer under every width once. ResNet-50 for images of
224x224 (transformers, weights at random), all widths and blocks, so many random candidates; each way in
turn, in one process, on one thread; what both find must be the same.

    python benchmarks/pieces_speed.py [--rows 20000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from espalier.compress import Depth, Pretrained, Widths
from espalier.compress.pieces import units
from espalier.costs.pieces import pieces_of
from espalier.flows.machine import machine
from espalier.train.seeds import global_seed

RESULT = Path(__file__).parent / "results" / "pieces_speed.json"
OUTLINE = units.outline


class Logits(torch.nn.Module):
    """The model's first output alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x).logits
        return found


def listed(model: torch.nn.Module, rows: int, whole: bool) -> tuple[float, dict[str, Any]]:
    """Seconds, and the counts and work of each distinct piece."""
    family = Pretrained(model, torch.randn(2, 3, 224, 224), (Widths(), Depth()))
    codes = family.space.sample(rows, np.random.default_rng(0))
    units.outline = (lambda *given: None) if whole else OUTLINE
    began = time.perf_counter()
    parts = pieces_of(family).parts(codes)
    found = {p.key: (p.count, p.work) for part in parts for p in part.pieces}
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with global_seed(0):
        model = Logits(ResNetForImageClassification(ResNetConfig(num_labels=10))).eval()
    seconds: dict[str, list[float]] = {"shapes alone": [], "real tensors": []}
    count = 0
    for _ in range(options.rounds):
        both = []
        for name in seconds:
            took, found = listed(model, options.rows, name == "real tensors")
            seconds[name].append(took)
            both.append(found)
            print(f"{name}: {took:.1f} s for {len(found)} pieces", flush=True)
        assert both[0] == both[1], "the two ways differ"
        count = len(both[0])
    found = {
        "settings": {"rows": options.rows, "threads": 1, "machine": machine()},
        "pieces": count,
        "seconds": seconds,
        "median": {name: statistics.median(some) for name, some in seconds.items()},
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
