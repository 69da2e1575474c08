"""The model that a user gives: a module, a function that makes one, a file; and its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.errors import DataError, EspalierError
from espalier.tasks import Task
from espalier.train.evaluate import evaluating

ModelLike = nn.Module | str | Path | Callable[..., nn.Module]
_NESTED = ("state_dict", "model", "model_state_dict", "net", "ema")


def given_model(
    model: ModelLike, task: Task, weights: str | Path | None, example: Tensor | None
) -> tuple[nn.Module, Tensor]:
    """The module with its weights, in evaluation mode, and an example input of two rows.

    Errors: `EspalierError` in one line where it is no module, does not run, or its output is not
    the task's.
    """
    made = _module(model, task)
    if weights is not None:
        load_weights(made, weights)
    if example is None:
        example = next(iter(task.batches("train", 2)))[0]
    example = example[:2].detach().cpu()
    _check(made, example, task)
    return made, example


def _module(model: ModelLike, task: Task) -> nn.Module:
    if isinstance(model, (str, Path)):
        from espalier.flows.files import from_file

        return from_file(Path(model))
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        needed = [
            p
            for p in inspect.signature(model).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        made = model(task.shape, task.classes) if len(needed) == 2 else model()
        if isinstance(made, nn.Module):
            return made
        raise EspalierError(
            f"{getattr(model, '__name__', 'the function')} must give a torch.nn.Module, "
            f"got {type(made).__name__}"
        )
    raise EspalierError(
        "a model is a torch.nn.Module, a function that makes one, or a file, "
        f"got {type(model).__name__}"
    )


def _check(model: nn.Module, example: Tensor, task: Task) -> None:
    try:
        with evaluating(model), torch.no_grad():
            output = model(example)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EspalierError(
            f"the model does not run on an input of the task {task.name}, shape "
            f"{tuple(example.shape)}: {first}"
        ) from error
    if not isinstance(output, Tensor):
        raise EspalierError(
            f"a model must return one tensor, got {type(output).__name__}: wrap it in a module "
            "that returns the part that is wanted"
        )
    if output.shape[-1] != task.classes:
        raise EspalierError(
            f"the model's output has width {output.shape[-1]}, the task {task.name} needs "
            f"{task.classes}: give a model that was trained for this task"
        )
    if not bool(torch.isfinite(output).all()):
        raise EspalierError("the model's output is not finite (NaN or infinity): mend it first")


# --- weights ---------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Reads a .safetensors, .npz or (as tensors only, nothing in it is run) .pt file into a model.

    Errors: `DataError` where the file can't be read, or its names or shapes are others.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no weights file {str(path)!r}: give a .safetensors, .npz or .pt file")
    found = _plain_names(_read(path), model)
    own = model.state_dict()
    # counters of batches are no weights, and some savers leave them out
    lacks = [k for k in own if k not in found and not k.endswith("num_batches_tracked")]
    extra = [k for k in found if k not in own]
    if lacks or extra:
        raise DataError(f"{path} does not fit the model: {_differences(lacks, extra)}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{path} does not fit the model: {name!r} has shape {tuple(tensor.shape)} in the "
                f"file and {tuple(own[name].shape)} in the model"
            )
    model.load_state_dict(found, strict=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                return {k: torch.from_numpy(np.array(arrays[k])) for k in arrays.files}
        read: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, EOFError, RuntimeError, ImportError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # what torch's reader of tensors refuses to load
        raise _unreadable(path, error) from error
    while isinstance(read, Mapping) and (inner := [k for k in _NESTED if k in read]):
        read = read[inner[0]]
    if not isinstance(read, Mapping) or not all(isinstance(v, Tensor) for v in read.values()):
        raise DataError(f"{path} holds no state dict: save model.state_dict() and give that file")
    return dict(read)


def _unreadable(path: Path, error: Exception) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"can't read weights from {path}: {first[:160]}; write them with "
        "safetensors.torch.save_file(model.state_dict(), path)"
    )


def _plain_names(found: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Names without the prefix that data parallelism and compiling put before all of them."""
    own = list(model.state_dict())
    for prefix in ("module.", "_orig_mod."):
        wrapped = bool(found) and all(k.startswith(prefix) for k in found)
        if wrapped and not any(k.startswith(prefix) for k in own):
            found = {k.removeprefix(prefix): v for k, v in found.items()}
    return found


def _differences(lacks: list[str], extra: list[str]) -> str:
    parts = []
    for names, text in ((lacks, "it lacks"), (extra, "the model lacks")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{text} {names[0]!r}{more}")
    return "; ".join(parts)
