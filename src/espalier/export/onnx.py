"""A network as ONNX, in memory."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from espalier.errors import ExportError
from espalier.export.modes import deployed
from espalier.export.program import Program, to_program
from espalier.export.quiet import quiet

INPUT, OUTPUT = "input", "output"


def to_onnx(network: nn.Module, example: Tensor, *, fast: bool = False) -> bytes:
    """The network as one ONNX model of input "input" and output "output".

    `example` is an input with its batch dimension. By default torch's current exporter is used
    and the batch is dynamic where the network allows it. `fast` traces instead (about 10 ms
    instead of a second) and fixes the batch to the example's: right for measuring many small
    pieces. Batch-norms are folded into convolutions either way, by the exporter or the runtime.
    Errors: `ExportError` when the network can't be exported.
    """
    return _traced(network, example) if fast else program_to_onnx(to_program(network, example))


def program_to_onnx(program: Program) -> bytes:
    """ONNX of a network that torch.export has captured already."""
    try:
        with quiet():
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                external_data=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
            assert exported is not None
            model = exported.model_proto
            if program.dynamic:
                _name_batch(model)
            return bytes(model.SerializeToString())
    except Exception as error:
        raise _refused("ONNX", error) from error


def _name_batch(model: object) -> None:
    """Calls the dynamic first dimension of inputs and outputs "batch", whatever torch called it."""
    graph = model.graph  # type: ignore[attr-defined]
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"


def _traced(network: nn.Module, example: Tensor) -> bytes:
    buffer = io.BytesIO()
    try:
        with quiet(), deployed(network):
            torch.onnx.export(
                network,
                (example,),
                buffer,  # type: ignore[arg-type]  # its annotation forgets buffers
                dynamo=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:
        raise _refused("ONNX", error) from error
    return buffer.getvalue()


def _refused(what: str, error: Exception) -> ExportError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(
        f"torch can't export this network to {what}: {first}; "
        "a network needs one tensor in, one tensor out and no control flow that depends on values"
    )
