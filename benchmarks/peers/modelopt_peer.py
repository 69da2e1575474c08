"""ModelOpt's FastNAS: one sensitivity map, then a search for each limit on FLOPs.

Channels are multiples of what the first message says, as its own multiple of 32 leaves nothing to decide
in networks this small.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
import torch
from modelopt.torch.prune.fastnas import FastNASModeDescriptor
from pruned import Pruning, Unreachable, serve
from torch import nn

_SCORED = 512  # images of validation that a score is taken on
_UNREACHABLE = "NOT all constraints can be satisfied"
_BATCH, _BATCHES = 32, 50  # it keeps 50 batches for its batch norms, or warns


class FastNAS(Pruning):
    """The map is made at the first limit; later ones read it."""

    def __init__(self, begin: dict[str, Any]) -> None:
        super().__init__(begin)
        self.checkpoint = (
            Path(begin["folder"]) / f"fastnas-{begin['multiple']}-{begin['model']}-{self.seed}.pth"
        )
        self.checkpoint.unlink(missing_ok=True)
        self.loader = self.batches(_BATCH, _BATCHES)

    def prune(self, amount: float) -> nn.Module:
        """The network of the search under a limit on FLOPs."""
        try:
            network, _ = mtp.prune(
                self.original(),
                mode=[("fastnas", self._settings())],
                constraints={"flops": f"{100 * amount:.2f}%"},
                dummy_input=self.example,
                config={
                    "data_loader": self.loader,
                    "collect_func": lambda batch: batch[0],
                    "score_func": self._score,
                    "checkpoint": str(self.checkpoint),
                    "verbose": False,
                },
            )
        except ValueError as error:
            if _UNREACHABLE in str(error):
                raise Unreachable from error
            raise
        return network

    def _settings(self) -> dict[str, Any]:
        settings = copy.deepcopy(FastNASModeDescriptor().config_class().model_dump())
        for rules in settings.values():
            for rule in rules.values() if isinstance(rules, dict) else ():
                for name in ("channel_divisor", "feature_divisor"):
                    if isinstance(rule, dict) and name in rule:
                        rule[name] = self.begin["multiple"]
        return settings

    @torch.inference_mode()
    def _score(self, network: nn.Module) -> float:
        x, y = self.data["x_validation"][:_SCORED], self.data["y_validation"][:_SCORED]
        return float((network(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    serve(FastNAS)
