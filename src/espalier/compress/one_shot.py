"""Sparsity in one shot: every linear layer's weights are removed in closed form, on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.calls import first_given
from espalier.compress.removal import METHODS, Kept
from espalier.compress.repair.least_squares import Moments
from espalier.errors import EspalierError, unknown
from espalier.train.loop import Progress
from espalier.train.running import device_of, evaluating


def sparsify(
    model: nn.Module,
    examples: Tensor,
    kept: Kept = "2:4",
    *,
    method: str = "apt",
    layers: Sequence[str] = ("*",),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sets weights of linear layers to 0 in place; gives what it did as JSON.

    `examples (b, ...)` are inputs from training data. Each layer is treated just before it runs on
    them, so that it sees what the layers before it give now. `kept`: "N:M", N of every M weights in
    a row, or a share. `method`: "apt" (`removal.together`), "sparsegpt", "wanda" or "magnitude".
    `layers`: patterns of module paths, as in `fnmatch`.

    The result has `layers` (path, share of zeros, relative squared error of the layer's outputs)
    and `skipped` (with reasons). Errors: `EspalierError` for an unknown method or no such layer.
    """
    if method not in METHODS:
        raise EspalierError(unknown("way to remove weights", method, METHODS))
    chosen = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and any(fnmatch(name, p) for p in layers)
    }
    if not chosen:
        raise EspalierError(f"layers={list(layers)!r} matches no linear layer of the model")
    done: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    multiple = int(kept.partition(":")[2] or 1) if isinstance(kept, str) else 1

    def treat(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            if name in done or name in skipped:
                return  # it runs more than once: the first decides
            if layer.in_features % multiple:
                skipped[name] = f"{layer.in_features} inputs are not whole groups of {multiple}"
                return
            x = first_given(args, kwargs).reshape(-1, layer.in_features).double()
            before, gram = layer.weight.detach().clone(), x.T @ x
            cross = before.double() @ gram
            moments = Moments(gram, cross, (cross * before).sum(1), len(x))
            layer.weight.copy_(METHODS[method](before, gram, kept))
            zeros = float((layer.weight == 0).double().mean())
            done[name] = {"layer": name, "zeros": zeros, "error": moments.error(layer.weight)}
            if progress is not None:
                progress(len(done), len(chosen), name)

        return hook

    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for name, layer in chosen.items():
            handle = layer.register_forward_pre_hook(treat(name), with_kwargs=True)
            stack.callback(handle.remove)
        model(examples.to(device_of(model)))
    skipped |= {name: "it never runs" for name in chosen if name not in {*done, *skipped}}
    return {
        "layers": list(done.values()),
        "skipped": [{"layer": name, "reason": reason} for name, reason in skipped.items()],
    }
