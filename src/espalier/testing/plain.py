"""What leaves Espalier is plain: none of its classes is in it."""

from __future__ import annotations

import torch
from torch import nn


def check_plain(network: nn.Module, label: str = "the network") -> None:
    """No class of Espalier is anywhere in the network, nor called by it."""
    for path, module in network.named_modules():
        for kind in type(module).__mro__:
            assert not _ours(kind), (
                f"{label}: {path or 'the root'} is a {kind.__name__} of Espalier"
            )
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                assert not _ours(node.target), f"{label}: calls {node.target} of Espalier"
                noted = node.meta.get("nn_module_stack", {})
                assert not noted, f"{label}: node {node} still names the classes it came from"


def _ours(thing: object) -> bool:
    module = getattr(thing, "__module__", None) or ""
    return module == "espalier" or module.startswith("espalier.")
