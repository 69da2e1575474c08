"""The JSON card beside the files: what goes in, what comes out, how to load each file."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.errors import ExportError

RESERVED = ("format", "input", "output", "dynamic_batch", "files", "made_with")

_LOAD = {
    "onnx": [
        "import onnxruntime",
        "session = onnxruntime.InferenceSession({file!r})",
        'outputs = session.run(None, {{"input": inputs}})[0]  # inputs: a {dtype} numpy array',
    ],
    "pt2": [
        "import torch",
        "network = torch.export.load({file!r}).module()",
        "outputs = network(inputs)  # inputs: a {dtype} torch tensor",
    ],
    "safetensors": [
        "from safetensors.torch import load_model",
        "network = ...  # weights alone: build the same architecture first; the .pt2 file has it",
        "load_model(network, {file!r})",
    ],
}


def how_to_load(form: str, file: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Three lines of Python that load the file, run in the folder it lies in; `dtype` of inputs."""
    return [line.format(file=file, dtype=_name(dtype)) for line in _LOAD[form]]


def card(
    example: Tensor,
    output: Tensor,
    dynamic: bool,
    files: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> bytes:
    """The card as JSON text. `extra` is the caller's: candidate, normalisation, classes ...

    Errors: `ExportError` when `extra` is not JSON or takes a name that the card uses itself.
    """
    taken = sorted(set(extra) & set(RESERVED))
    if taken:
        raise ExportError(f"the card's own entries can't be given: {', '.join(taken)}")
    content = {
        "format": 1,
        "input": {"name": "input", **_described(example, dynamic)},
        "output": {"name": "output", **_described(output, dynamic)},
        "dynamic_batch": dynamic,
        **extra,
        "files": files,
        "made_with": {"espalier": _version("espalier"), "torch": torch.__version__},
    }
    try:
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"the card must be plain JSON (no tensors, arrays, NaN): {error}"
        ) from error


def _described(tensor: Tensor, dynamic: bool) -> dict[str, Any]:
    batch: str | int = "batch" if dynamic else int(tensor.shape[0])
    return {
        "shape": [batch, *map(int, tensor.shape[1:])],
        "dtype": _name(tensor.dtype),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
