"""Simulated 8-bit rounding: `espalier::fake_quantize` beside torch's operator, on one core.

Both round the same activations to 256 levels, in turns; medians and spans over rounds, forward alone and
with the gradient. That both give the same to the bit is in the tests.

    python benchmarks/rounding_speed.py [--rounds 30]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from espalier.export.quantisers import fake_quantize
from espalier.flows.machine import machine

RESULT = Path(__file__).parent / "results" / "rounding_speed.json"
SHAPES = ((1, 16, 32, 32), (100, 16, 32, 32), (100, 64, 8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale, zero = torch.tensor(0.031), torch.tensor(128, dtype=torch.int32)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "espalier": lambda x: fake_quantize(x, scale, zero, 255),
        "torch": lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255),
    }
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for gradient in (False, True):
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(options.rounds + 1):
                for name, way in ways.items():
                    given = x.clone().requires_grad_(gradient)
                    began = time.process_time()
                    made = way(given)
                    if gradient:
                        made.backward(x)
                    if turn:  # the first is warm-up
                        taken[name].append(1e3 * (time.process_time() - began))
            found = {n: [float(np.median(t)), min(t), max(t)] for n, t in taken.items()}
            faster = found["torch"][0] / found["espalier"][0]
            rows.append({"shape": shape, "gradient": gradient, "ms": found, "faster": faster})
            print(json.dumps(rows[-1]), flush=True)
    told = {"machine": machine(), "rounds": options.rounds, "rows": rows}
    options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
