"""What autograd's graph tells about a network: which ReLUs its output comes through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_SAVED = {
    "ReluBackward0": "_saved_result",
    "HardtanhBackward0": "_saved_self",
    "LeakyReluBackward0": "_saved_self",
}


def nodes(outputs: Tensor) -> list[Any]:
    """The nodes behind a tensor, each once, in the order of the forward pass."""
    seen: set[Any] = set()
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [behind for behind, _ in node.next_functions]
    return sorted(seen, key=lambda node: node._sequence_nr())


def codes(outputs: Tensor, batch: int) -> list[Tensor]:
    """For each ReLU (ReLU6, leaky ReLU) on the way to `outputs`: where it is on, `(batch, units)`.

    Functions count as modules do; what does not reach the output does not count.
    """
    found = []
    for node in nodes(outputs):
        saved = _SAVED.get(node.name())
        if saved is not None:
            value: Tensor = getattr(node, saved)
            if value.shape[:1] == (batch,):
                # in the order of memory, so that flattening copies nothing
                value = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
                found.append((value > 0).flatten(1))
    return found
