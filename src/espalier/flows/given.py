"""The model that a user gives: a module, a function that makes one, a file or folder; its weights."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from espalier.errors import DataError, EspalierError
from espalier.tasks import Task
from espalier.train.running import device_of, evaluating

ModelLike = nn.Module | str | Path | Callable[..., nn.Module]
_NESTED = ("state_dict", "model", "model_state_dict", "net", "ema")


def given_model(
    model: ModelLike, task: Task, weights: str | Path | None, example: Tensor | None
) -> tuple[nn.Module, Tensor]:
    """The module with its weights, in evaluation mode, and an example input of two rows.

    Errors: `EspalierError` in one line where it is no module, does not run, or its output is not
    the task's.
    """
    made, batch = _module(model, task)
    if weights is not None:
        load_weights(made, weights)
    x, y = next(iter(task.batches("train", 2)))
    own = example is None
    example = x if example is None else example
    example = example[:2].detach().cpu().contiguous()
    output = _run(made, example, task, batch)
    if isinstance(getattr(output, "logits", None), Tensor):
        made, output = _logits(made), output.logits
    output = output.cpu() if isinstance(output, Tensor) else output
    _check(output, task)
    if own:
        _check_loss(output, y[:2], task)
    if batch is not None:
        _check_rows(made, example, output, batch)
    return made, example


def _module(model: ModelLike, task: Task) -> tuple[nn.Module, int | None]:
    """The module, and the batch that its file was exported for where that is fixed."""
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        return _encoder(Path(model)), None
    if isinstance(model, (str, Path)):
        from espalier.flows.files import read_file

        return read_file(Path(model))
    if isinstance(model, nn.Module):
        return model, None
    if callable(model):
        needed = [
            p
            for p in inspect.signature(model).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        try:
            made = model(task.shape, task.classes) if len(needed) == 2 else model()
        except EspalierError:
            raise
        except Exception as error:
            raise EspalierError(_failed(model, len(needed), error)) from error
        if isinstance(made, nn.Module):
            return made, None
        raise EspalierError(
            f"{getattr(model, '__name__', 'the function')} must give a torch.nn.Module, "
            f"got {type(made).__name__}"
        )
    raise EspalierError(
        "a model is a torch.nn.Module, a function that makes one, a file or a folder, "
        f"got {type(model).__name__}"
    )


def _encoder(path: Path) -> nn.Module:
    """The model of a Hugging Face folder that classifies what it reads."""
    from espalier.compress.language.files.folder import is_encoder, read_folder

    folder = read_folder(path)
    if not is_encoder(path):
        raise EspalierError(
            f"{path} holds a model that writes text ({folder.kind}): give it and a text to "
            "shrink_language"
        )
    made: nn.Module = folder.model()
    return made


def _failed(function: Callable[..., Any], needed: int, error: Exception) -> str:
    """One line for a user's function that raises: its file, its name, what it said."""
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    where = name if code is None else f"{Path(code.co_filename).name}:{name}"
    given = "shape and classes" if needed == 2 else "no arguments"
    takes = "" if needed in (0, 2) else "; it must take none, or shape and classes"
    return f"{where}, called with {given}, raised {_said(error)}{takes}"


def _said(error: Exception) -> str:
    """The kind of an error and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _run(model: nn.Module, example: Tensor, task: Task, batch: int | None) -> Any:
    try:
        # a graph that fails also prints where: the one line says enough
        with evaluating(model), torch.no_grad(), redirect_stderr(StringIO()):
            return model(example.to(device_of(model)))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        text = (
            f"the model does not run on an input of the task {task.name}, shape "
            f"{tuple(example.shape)}: {first}{_rounded(model)}"
        )
        if batch not in (None, len(example)):
            text = f"{_fixed(batch)} ({first})"
        raise EspalierError(text) from error


def _rounded(model: nn.Module) -> str:
    """What to do where a model's weights are of another type than inputs."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    told = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return f" (its weights are {told}: give model.float())" if kinds else ""


def _fixed(batch: int | None) -> str:
    return (
        f"the file was exported for a batch of {batch} only: export the model with an example of 2 "
        "rows and a dynamic batch, dynamic_shapes=({0: torch.export.Dim('batch')},)"
    )


def _check_rows(model: nn.Module, example: Tensor, output: Tensor, batch: int) -> None:
    """Errors: `EspalierError` where a fixed batch is mixed up: rows alone must give the same."""
    try:
        with evaluating(model), torch.no_grad(), redirect_stderr(StringIO()):
            alone = torch.cat([model(example[i : i + 1]) for i in range(len(example))])
        same = torch.allclose(alone, output, rtol=1e-3, atol=1e-4)
    except Exception:  # whatever shapes that do not fit lead to
        same = False
    if not same:
        raise EspalierError(_fixed(batch))


def _logits(model: nn.Module) -> nn.Module:
    """The model with its logits alone as output, of torch's own classes: a record becomes a tensor."""
    graph = fx.Graph()
    graph.output(graph.call_function(getattr, (graph.placeholder("record"), "logits")))
    pick = fx.GraphModule(nn.Module(), graph)
    return nn.Sequential(OrderedDict(model=model, logits=pick)).train(model.training)


def _check(output: Any, task: Task) -> None:
    if not isinstance(output, Tensor):
        raise EspalierError(
            f"a model must return one tensor, got {type(output).__name__}: wrap it in a module "
            "that returns the part that is wanted"
        )
    width = output.shape[-1] if output.dim() else 1
    if width != task.classes:
        raise EspalierError(
            f"the model's output has width {width}, the task {task.name} needs "
            f"{task.classes}: give a model that was trained for this task"
        )
    if not bool(torch.isfinite(output).all()):
        raise EspalierError("the model's output is not finite (NaN or infinity): mend it first")


def _check_loss(output: Tensor, targets: Tensor, task: Task) -> None:
    try:
        loss = float(task.loss(output.float(), targets).detach())
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EspalierError(
            f"the loss of the task {task.name} fails on the model's output {tuple(output.shape)} and "
            f"targets {tuple(targets.shape)} of {targets.dtype}: {first}"
        ) from error
    if not math.isfinite(loss):
        raise EspalierError(f"the loss of the task {task.name} is {loss} on the given model")


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
    if not isinstance(read, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in read.items()
    ):
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
