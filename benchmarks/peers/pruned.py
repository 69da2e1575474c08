"""What every pruning peer's script does: answers each message with the weights of a pruned network.

Messages are lines of JSON on standard input. {"begin": {"file", "model", "weights", "data", "method",
"multiple", "seed", "folder"}} gives a Python file and the function in it that makes the model, an .npz of
its state, an .npz of data (x_train, y_train, x_validation, y_validation, ready for the model), what widths
are multiples of, and where to write. {"amount": a} asks for a network with at most the share `a` of the
model's multiply-accumulates; amounts fall, unless the peer finds any of them alone. The answer to either
is {"state": path of an .npz, or null where there is no such network, "seconds": of work}. The caller makes
the layers again from the shapes, measures and asks for another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Unreachable(Exception):
    """The peer has no network so small."""


class Pruning(ABC):
    """One run of a peer on one model."""

    def __init__(self, begin: dict[str, Any]) -> None:
        self.begin, self.seed = begin, int(begin["seed"])
        torch.manual_seed(self.seed)
        with np.load(begin["data"]) as data:
            self.data = {name: torch.from_numpy(data[name]) for name in data.files}
        self.example = self.data["x_train"][:1]

    def original(self) -> nn.Module:
        """The model with its weights, a new one each time."""
        spec = importlib.util.spec_from_file_location("model_file", self.begin["file"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        network: nn.Module = getattr(module, self.begin["model"])()
        with np.load(self.begin["weights"]) as state:
            network.load_state_dict({k: torch.from_numpy(state[k]) for k in state.files})
        return network.eval()

    def batches(self, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Training batches, another draw each time, decided by the seed."""
        n = len(self.data["y_train"])
        rows = torch.randperm(n)[: size * count].split(size)
        return [(self.data["x_train"][r], self.data["y_train"][r]) for r in rows]

    @abstractmethod
    def prune(self, amount: float) -> nn.Module:
        """The network with at most this share of the multiply-accumulates.

        Errors: `Unreachable`.
        """

    def written(self, amount: float) -> str | None:
        """The file with the network's weights; None where there is no such network."""
        try:
            network = self.prune(amount)
        except Unreachable:
            return None
        path = Path(self.begin["folder"]) / f"{self.begin['method']}-{os.getpid()}.npz"
        np.savez(path, **{k: v.detach().numpy() for k, v in network.state_dict().items()})
        return str(path)


def serve(kind: type[Pruning]) -> None:
    """Runs until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run: Pruning | None = None
    for line in sys.stdin:
        message, start, state = json.loads(line), time.perf_counter(), None
        if "begin" in message:
            run = kind(message["begin"])
        else:
            assert run is not None
            state = run.written(float(message["amount"]))
        spent = time.perf_counter() - start
        answers.write(json.dumps({"state": state, "seconds": spent}) + "\n")
        answers.flush()
