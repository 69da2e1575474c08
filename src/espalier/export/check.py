"""Each written file is loaded back, as a stranger would, and compared with the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from espalier.errors import ExportError
from espalier.export.modes import deployed
from espalier.export.quiet import quiet

Forward = Callable[[Tensor], Tensor]
TOLERANCE = 1e-4  # of the largest output, or of 1 where all outputs are smaller
# Integer kernels add up exactly, torch in float: a sum near a tie may fall on the next level, and
# that goes on through the layers. Wrong scales or saturating kernels are off by far more.
INTEGERS = 0.1  # root mean square, of that of the outputs


def open_onnx(path: Path) -> Forward:
    """The ONNX file as a function, run by ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(np.asarray(session.run(None, {name: x.numpy()})[0]))


def open_pt2(path: Path) -> Forward:
    """The .pt2 file as a function, run by torch."""
    with quiet():
        module = torch.export.load(path).module()
    return lambda x: module(x)


def open_safetensors(path: Path, network: nn.Module) -> Forward:
    """The stored weights in a copy of the network that has forgotten its own.

    Buffers that are not in `state_dict` (numbers of positions) are the code's to make: they stay.
    """
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    load_model(twin, path)
    return lambda x: twin(x)


def difference(forward: Forward, network: nn.Module, inputs: list[Tensor]) -> float:
    """Largest absolute difference of outputs over all inputs, relative to the largest output.

    Outputs below 1 are compared absolutely. NaN or infinite outputs of the network are refused:
    nothing can be compared with them. Errors: `ExportError`.
    """
    worst = 0.0
    with deployed(network):
        for x in inputs:
            wanted = network(x)
            if not torch.isfinite(wanted).all():
                raise ExportError(
                    "the network's output is not finite (NaN or infinite) on an input of shape "
                    f"{tuple(x.shape)}: mend or retrain it before exporting"
                )
            got = forward(x)
            if got.shape != wanted.shape:
                return float("inf")
            gap = float((got - wanted).abs().max()) if wanted.numel() else 0.0
            worst = max(worst, gap / max(1.0, float(wanted.abs().max())))
    return worst


def deviation(forward: Forward, network: nn.Module, inputs: list[Tensor]) -> float:
    """Root mean square of the difference of outputs, of that of the outputs: for integers.

    Infinite where shapes differ or anything is not finite.
    """
    off = size = 0.0
    with deployed(network):
        for x in inputs:
            wanted, got = network(x), forward(x)
            if got.shape != wanted.shape:
                return float("inf")
            off += float((got - wanted).double().square().sum())
            size += float(wanted.double().square().sum())
    ratio = (off / max(size, 1e-12)) ** 0.5
    return ratio if ratio == ratio else float("inf")


def trials(example: Tensor, dynamic: bool, seed: int = 0) -> list[Tensor]:
    """Random inputs like the example: normal numbers of several batches where it is dynamic.

    Inputs of whole numbers can't be made up (they may be indices, as floats too): the example itself
    is used.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = (1, 2, 5) if dynamic else (len(example),) * 3
    if not example.is_floating_point() or whole_numbers(example):
        return [example[:1].repeat_interleave(b, dim=0) if dynamic else example for b in batches]
    return [torch.randn(b, *example.shape[1:], generator=generator) for b in batches]


def whole_numbers(example: Tensor) -> bool:
    """Whether floats may be indices: more than two values, all of them whole."""
    return bool((example == example.round()).all()) and len(torch.unique(example)) > 2


def chunks(inputs: Tensor, example: Tensor, dynamic: bool) -> list[Tensor]:
    """Real inputs in batches that the network takes; what does not fill a fixed batch is left."""
    size = 64 if dynamic else len(example)
    parts = torch.split(inputs.detach().cpu().to(example.dtype).contiguous(), size)
    return [p for p in parts if dynamic or len(p) == size]
