"""ModelOpt's auto_quantize: its sensitivity table of a model, and what its own program chooses.

    python modelopt_bits_peer.py MODELS.py MAKER WEIGHTS.npz DATA.npz BUDGETS

Weights only, per channel, at each of BITS, beside no quantisation; scores by gradients, its default.
Writes JSON: for each layer the formats' costs and scores, and for each budget of effective bits the
format chosen for each layer, the sum of scores, the bits it comes to, seconds of the program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization import algorithms
from torch.nn import functional

BITS = (2, 3, 4, 5, 6, 8)
# a loss that is a mean over so many positions, as of language models, has scores 1 / positions^2
POSITIONS = (1, 256)
_BATCH = 64


def formats() -> list[dict[str, Any]]:
    """Weights in whole numbers of so many bits, a scale a channel."""
    found = []
    for bits in BITS:
        found.append(
            {
                "quant_cfg": [
                    {"quantizer_name": "*", "enable": False},
                    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                ],
                "algorithm": "max",
            }
        )
    return found


def searched(model: torch.nn.Module, data: str) -> Any:
    """The state of a search: the table is in it."""
    with np.load(data) as arrays:
        x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    loader = list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 5.0},
        quantization_formats=formats(),
        data_loader=loader,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=lambda output, batch: functional.cross_entropy(output, batch[1]),
        num_calib_steps=len(loader),
        num_score_steps=len(loader),
    )
    return state


def chosen(state: Any, bits: float) -> dict[str, Any]:
    """What its program makes of the table for a budget of effective bits."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        best = algorithms._resolve_best_recipe(state, {"effective_bits": bits})
    seconds = time.perf_counter() - start
    stats = state["candidate_stats"]
    picks = {name: stats[name]["formats"].index(recipe) for name, recipe in best.items()}
    return {
        "picks": picks,
        "seconds": seconds,
        "warned": any("FAILED" in str(w.message) for w in told),
    }


def scaled(state: Any, positions: int) -> Any:
    """The state with the scores of a loss that is a mean over so many positions."""
    stats = {
        name: {**stat, "scores": [score / positions**2 for score in stat["scores"]]}
        for name, stat in state["candidate_stats"].items()
    }
    return {**state, "candidate_stats": stats}


def main() -> None:
    """Reads its arguments, writes one line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    file, maker, weights, data, budgets = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("model_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = getattr(module, maker)()
    with np.load(weights) as state:
        model.load_state_dict({k: torch.from_numpy(state[k]) for k in state.files})
    start = time.perf_counter()
    found = searched(model.eval(), data)
    seconds = time.perf_counter() - start
    table = {
        name: {
            "formats": [str(f) for f in stat["formats"]],
            "costs": stat["costs"],
            "scores": stat["scores"],
            "whole": stat["uncompressed_cost"],
        }
        for name, stat in found["candidate_stats"].items()
    }
    answers.write(
        json.dumps(
            {
                "table": table,
                "chosen": {
                    n: {b: chosen(scaled(found, n), float(b)) for b in budgets.split(",")}
                    for n in POSITIONS
                },
                "seconds": seconds,
            }
        )
        + "\n"
    )
    answers.flush()


if __name__ == "__main__":
    main()
