"""Torch-Pruning's group Taylor importance, over all groups at once ("global") or in each ("local").

Pruned step by step as its documentation has it: gradients on training batches, one step of its pruner,
again, until the share of multiply-accumulates asked for is reached.
"""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from pruned import Pruning, serve
from torch import nn
from torch.nn import functional

_STEPS = 100  # a step takes one percent of the channels
_BATCH, _BATCHES = 128, 2
_MOST = 0.95  # of a group: a layer without channels is no network


class TorchPruning(Pruning):
    """One descent."""

    def __init__(self, begin: dict[str, Any]) -> None:
        super().__init__(begin)
        self.network = self.original()
        self.macs = tp.utils.count_ops_and_params(self.network, self.example)[0]
        ends = [m for m in self.network.modules() if isinstance(m, nn.Linear)][-1:]
        self.pruner = tp.pruner.BasePruner(
            self.network,
            self.example,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=begin["method"] == "global",
            pruning_ratio=1.0,
            max_pruning_ratio=_MOST,
            iterative_steps=_STEPS,
            ignored_layers=ends,
            round_to=begin["multiple"],
        )
        self.done = 0

    def prune(self, amount: float) -> nn.Module:
        """Steps until the share is reached, or there is nothing more to prune."""
        while self.done < _STEPS and self._share() > amount:
            self.network.zero_grad()
            for x, y in self.batches(_BATCH, _BATCHES):
                functional.cross_entropy(self.network(x), y).backward()
            self.pruner.step()
            self.done += 1
        return self.network

    def _share(self) -> float:
        return float(tp.utils.count_ops_and_params(self.network, self.example)[0] / self.macs)


if __name__ == "__main__":
    serve(TorchPruning)
