"""A network as ONNX, in memory."""

from __future__ import annotations

import io

import onnx
import torch
from torch import Tensor, nn

from espalier.errors import ExportError
from espalier.export.modes import deployed, plain_attention
from espalier.export.program import Program, to_program
from espalier.export.qdq import with_integers
from espalier.export.quantised import marked
from espalier.export.quantisers import carries
from espalier.export.quiet import quiet
from espalier.export.tidy import tidied

INPUT, OUTPUT = "input", "output"


def to_onnx(network: nn.Module, example: Tensor, *, fast: bool = False) -> bytes:
    """The network as one ONNX model of input "input" and output "output".

    `example` is an input with its batch dimension. By default torch's current exporter is used
    and the batch is dynamic where the network allows it. `fast` traces instead (about 10 ms
    instead of a second), for measuring many small pieces; its batch is called dynamic too, so that
    a runtime has the same to do, but only the example's batch is sure to work.
    Batch-norms are folded into convolutions either way, by the exporter or the runtime.
    Layers that carry fake quantisation become integers (see `export.quantised`).
    Errors: `ExportError` when the network can't be exported.
    """
    if carries(network):
        twin, roundings = marked(network)
        return with_integers(to_onnx(twin, example, fast=fast), roundings)
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
            model = tidied(exported.model_proto, program.dynamic)
            return bytes(model.SerializeToString())
    except Exception as error:
        raise _refused("ONNX", error) from error


def _traced(network: nn.Module, example: Tensor) -> bytes:
    buffer = io.BytesIO()
    try:
        with quiet(), deployed(network), plain_attention():
            torch.onnx.export(
                network,
                (example,),
                buffer,  # type: ignore[arg-type]  # its annotation forgets buffers
                dynamo=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                verbose=False,
            )
    except Exception as error:
        raise _refused("ONNX", error) from error
    return _pooled(buffer.getvalue())


def _pooled(data: bytes) -> bytes:
    """A traced model with its means over images tidied, as in files that are handed out."""
    if b"ReduceMean" not in data:
        return data
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    return bytes(tidied(model, False).SerializeToString())


def _refused(what: str, error: Exception) -> ExportError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(
        f"torch can't export this network to {what}: {first}; "
        "a network needs one tensor in, one tensor out and no control flow that depends on values"
    )
