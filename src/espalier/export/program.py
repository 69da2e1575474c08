"""A network captured by torch.export: what .pt2 files hold and what ONNX is made from."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from espalier.errors import ExportError
from espalier.export.modes import frozen
from espalier.export.quiet import quiet


@dataclass(frozen=True)
class Program:
    """A captured network; `dynamic` says whether it takes any batch or the example's only."""

    exported: ExportedProgram
    dynamic: bool


def to_program(network: nn.Module, example: Tensor) -> Program:
    """Captures the network in evaluation mode, on the CPU, in float32.

    Errors: `ExportError` when it can't be captured with a dynamic nor with a fixed batch.
    """
    twin, example = frozen(network), example.detach().cpu()
    with quiet():
        try:
            # torch.export takes a size of 1 for a constant: capture with a batch of 2
            pair = torch.cat([example[:1], example[:1]])
            return Program(_exported(twin, pair, ({0: Dim("batch")},)), True)
        except Exception:
            pass  # a network that fixes its batch: capture it as it is
        try:
            return Program(_exported(twin, example, None), False)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"torch.export can't capture this network: {first}; remove control flow that "
                "depends on values, or export the part of it that has none"
            ) from error


def _exported(network: nn.Module, x: Tensor, dynamic: Any) -> ExportedProgram:
    program = torch.export.export(network, (x,), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which files would carry
    return program


def program_to_pt2(program: Program) -> bytes:
    """The program as the bytes of a .pt2 file, which torch alone loads."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program.exported, buffer)
    return buffer.getvalue()
