"""An ONNX model opened in ONNX Runtime and bound to made-up inputs, ready to be run over and over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from espalier.errors import DataError, EspalierError, unknown

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def provider(device: str) -> str:
    """The execution provider of a device. Errors: `EspalierError` when this build lacks it."""
    if device not in PROVIDERS:
        raise EspalierError(unknown("device", device, PROVIDERS))
    name = PROVIDERS[device]
    if name not in ort.get_available_providers():
        raise EspalierError(
            f"this build of onnxruntime can't run on {device!r} ({name} is absent): install the "
            f"onnxruntime package for that device, or use device='cpu'"
        )
    return name


def open_session(
    model: bytes | str | Path, device: str, threads: int, spinning: bool
) -> ort.InferenceSession:
    """The model in a session: sequential, `threads` threads inside an operator, one between them.

    Errors: `DataError` when it is not an ONNX model that ONNX Runtime runs.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    what = "the given bytes" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise DataError(f"no file {what}: give the path of an ONNX model")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(source, options, providers=[provider(device)])
    except EspalierError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"ONNX Runtime can't load {what} as an ONNX model: {first}") from error


def make_inputs(
    session: ort.InferenceSession, batch: int, example: NDArray[Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for every input of the model: the example for the first, seeded noise otherwise.

    A dynamic first dimension becomes `batch`. Errors: `DataError` for another dynamic dimension
    or a type that can't be made up, when no example is given.
    """
    rng = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for i, entry in enumerate(session.get_inputs()):
        if i == 0 and example is not None:
            inputs[entry.name] = example
            continue
        shape = [
            batch if j == 0 and not isinstance(d, int) else d for j, d in enumerate(entry.shape)
        ]
        if not all(isinstance(d, int) and d >= 0 for d in shape) or entry.type not in _DTYPES:
            raise DataError(
                f"can't make up the input {entry.name!r} of type {entry.type} and shape "
                f"{entry.shape}: only the first dimension may be dynamic; give an example input"
            )
        noise = rng.standard_normal(shape)
        kind = np.dtype(_DTYPES[entry.type])
        # whole numbers may be indices: zeros are always in range
        inputs[entry.name] = (noise if kind.kind == "f" else np.zeros(shape)).astype(kind)
    return inputs


def bind(session: ort.InferenceSession, inputs: dict[str, NDArray[Any]]) -> Callable[[], None]:
    """A function that runs the model once on these inputs, outputs in memory bound beforehand.

    Binding leaves out what Python does around a run. Inputs and outputs are in host memory, so on
    other devices the copies are part of the time. Errors: `DataError` when the model does not run.
    """
    held: list[Any] = []  # older runtimes bind memory without keeping it alive

    def value_of(array: NDArray[Any]) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        held.extend((array, value))
        return value

    try:
        outputs = session.run(None, inputs)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, value_of(array))
        for entry, value in zip(session.get_outputs(), outputs, strict=True):
            if isinstance(value, np.ndarray):
                binding.bind_ortvalue_output(entry.name, value_of(value))
            else:
                binding.bind_output(entry.name)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shapes = {name: array.shape for name, array in inputs.items()}
        raise DataError(f"the ONNX model does not run on inputs {shapes}: {first}") from error

    def run(held: Any = held) -> None:
        session.run_with_iobinding(binding)

    return run
