"""Exact counts of one network: parameters, multiply-accumulates, activation memory, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from espalier.costs.record import Record, record
from espalier.costs.storages import storage_of
from espalier.export.quantisers import Quantised, Quantiser


@dataclass(frozen=True)
class Count:
    """Counts for one input (batch 1).

    - `params`: parameters, tied ones once; no buffers.
    - `macs`: multiply-accumulates of convolutions, linear layers and matrix products, attention's
      included; biases, norms, activations and pooling are not counted.
    - `activation_bytes`: the most memory that live activations take at once; see `peak`. Quantised
      tensors count as the float ones that they stand for.
    - `bytes`: the weights on disk: parameters and floating buffers at 4 bytes, integer buffers as
      they are. A safetensors file has these bytes and a header; ONNX has fewer (batch-norms are
      folded) and its graph.
    """

    params: int
    macs: int
    activation_bytes: int
    bytes: int


def count(network: nn.Module, example: Tensor) -> Count:
    """Counts a network on the first input of `example` `(b, ...)`.

    Errors: `ExportError` when the network does not run on it.
    """
    return counted(network, record(network, example[:1]))


def counted(network: nn.Module, run: Record) -> Count:
    """The counts of a network from the record of one pass."""
    return Count(
        params=sum(p.numel() for p in network.parameters()),
        macs=sum(operation.macs for operation in run.operations),
        activation_bytes=peak(run),
        bytes=weight_bytes(network),
    )


def weight_bytes(network: nn.Module) -> int:
    """Bytes of every tensor of `state_dict`, tied ones once, floating ones at 4 bytes.

    A quantised layer's weight counts its bits, and 4 bytes for the scale of a channel or block;
    scales and zero points of activations, 5 bytes each, are left out.
    """
    total, whole = _quantised_bytes(network)
    seen = set()
    for name, tensor in network.state_dict().items():
        if name in whole:
            continue
        place = (storage_of(tensor), tuple(tensor.shape), tensor.storage_offset())
        if tensor.numel() and place not in seen:
            seen.add(place)
            total += tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
    return total


def _quantised_bytes(network: nn.Module) -> tuple[int, set[str]]:
    """The bytes of what is quantised, and the names in `state_dict` that they stand for."""
    total, names = 0, set[str]()
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Quantised):
            total += module.weight_bytes()
            names |= {f"{prefix}weight", f"{prefix}weight_scale"}
        elif isinstance(module, Quantiser):
            names |= {f"{prefix}scale", f"{prefix}zero_point"}
    return total, names


def peak(run: Record) -> int:
    """Peak bytes of live activations when the operations run one after the other.

    A tensor lives from the operation that makes it to the last one that reads it; input and
    output count. Views take nothing. A pointwise operation (activation, addition, batch-norm in
    evaluation mode) writes over an operand of the same size that nothing reads later, as runtimes
    do. Workspaces inside an operator (im2col) are not counted.
    """
    last = _last_uses(run)
    live = {s: run.sizes[s] for s in run.inputs}
    most, now = sum(live.values()), sum(live.values())
    for i, operation in enumerate(run.operations):
        dying = [s for s in operation.reads if last[s] == i and s in live]
        for new in operation.writes:
            if new in live:
                continue
            room = run.sizes[new]
            host = next((s for s in dying if live.get(s) == room), None)
            if operation.pointwise and host is not None:
                now -= live.pop(host)
                dying.remove(host)
            live[new] = room
            now += room
        most = max(most, now)
        for gone in [s for s in live if last[s] <= i]:
            now -= live.pop(gone)
    return most


def _last_uses(run: Record) -> dict[int, int]:
    """Storage to the index of the last operation that touches it; outputs live beyond all."""
    last = dict.fromkeys(run.sizes, -1)
    for i, operation in enumerate(run.operations):
        for storage in (*operation.reads, *operation.writes):
            last[storage] = i
    last.update(dict.fromkeys(run.outputs, len(run.operations)))
    return last
