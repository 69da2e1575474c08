"""Layer-wise repair: each layer's weights are refitted to what the original's layer gave.

A layer whose inputs lost channels, or come from layers that were changed, gives something else than
it did. Least squares on a few examples, no labels and no gradients, brings its outputs back as near
as its remaining inputs allow (He, Zhang & Sun, Channel Pruning for Accelerating Very Deep Neural
Networks, 2017, https://arxiv.org/abs/1707.06168, there with the original's inputs; here with those
of the network as repaired so far, which mends the errors of the layers before as well).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.compress.calls import first_given
from espalier.compress.repair.kept import kept_rows
from espalier.compress.repair.patches import KINDS, Places, inputs, outputs, refit_layer
from espalier.errors import EspalierError
from espalier.export.quantisers import Quantised, Quantiser
from espalier.train.loop import Progress
from espalier.train.running import device_of, evaluating, laid_out
from espalier.train.seeds import generator

_ROWS = 8  # examples a coefficient: more change little
_LEAST_ROWS = 4096


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    examples: Tensor,
    *,
    ridge: float = 0.3,
    kept: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Refits convolutions and linear layers of a cut model in place; gives what it did as JSON.

    `examples (b, ...)` are inputs from training data, 100 to 1,000 of them, which go through both
    models at once: memory is that of one such pass, without gradients. Layers are matched by
    name; which of the original's channels one has kept is found by its weights, or given in `kept`
    (indices by layer name). Weights that were set to 0 stay 0. `ridge` holds the weights back, in
    units of the inputs' mean square: with less of it the network is better at once, and mostly worse
    after a long fine-tuning (`benchmarks/shrink_repair.py`). Quantised layers' weights are refitted before they are rounded,
    and what comes after makes up for the rounding; activations are not rounded meanwhile, and
    their ranges have to be taken again (`ranges.calibrate`). Batch norms get the original's statistics, because refitted
    layers give nearly what the original's gave: statistics from the examples were measured to be
    worse (ResNet-20 with half of its inner channels and a ridge of 0.01: 67% after this, 63% with the
    statistics set anew, 42% with nothing but them, 14% as cut).

    On the examples the outputs are never further from the original's than they were, in squared
    error: what does not help is undone, layer by layer and in the end as a whole. The result has
    `layers` (relative squared error before and after), `skipped` (with reasons), `output` (before,
    after) and `undone`.
    Errors: `EspalierError` where the two models' outputs do not have one shape.
    """
    if len(examples) < 2:
        raise EspalierError(f"a reconstruction needs 2 or more examples, got {len(examples)}")
    device = device_of(model)
    x = laid_out(model, examples.to(device))
    plan = _Plan(model, original, dict(kept or {}), seed)
    stored = copy.deepcopy(model.state_dict())
    with torch.no_grad(), evaluating(model), evaluating(original), _unrounded(model):
        wanted = plan.watch(laid_out(original, x))
        before = _apart(model(x), wanted)
        plan.restore_statistics()
        plan.mend(x, ridge, progress)
        after = _apart(model(x), wanted)
        undone = not after <= before
        if undone:
            model.load_state_dict(stored)
    return {
        "layers": plan.done,
        "skipped": plan.skipped,
        "output": {"before": before, "after": before if undone else after},
        "undone": undone,
    }


class _Plan:
    """The layers to refit, with what the original's gave at the places looked at."""

    def __init__(
        self, model: nn.Module, original: nn.Module, kept: dict[str, Tensor], seed: int
    ) -> None:
        self.model, self.original = model, original
        self.done: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.kept: dict[str, Tensor] = {}
        self.layers: dict[str, Any] = {}
        self._generator = generator(seed, 0x4EC0)
        self._calls: dict[str, int] = {}
        self._seen: dict[str, tuple[Places, Tensor]] = {}
        twins = dict(original.named_modules())
        for name, layer in model.named_modules():
            if not isinstance(layer, KINDS):
                continue
            twin: Any = twins.get(name)
            kind = next(k for k in KINDS if isinstance(layer, k))
            if not (type(layer) is kind or isinstance(layer, Quantised)):
                kinds = ", ".join(k.__name__ for k in KINDS)
                self._skip(name, f"a {type(layer).__name__}: only {kinds} are refitted")
                continue
            if type(twin) is not kind:
                self._skip(name, f"the original has no {kind.__name__} of this name")
                continue
            rows = kept.get(name)
            rows = kept_rows(layer.weight, twin.weight) if rows is None else rows
            if rows is None or len(rows) != len(layer.weight):
                self._skip(name, "its weights are not copies of rows of the original's")
                continue
            self.layers[name], self.kept[name] = layer, rows.to(layer.weight.device)

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append({"layer": name, "reason": reason})

    def restore_statistics(self) -> None:
        """Gives batch norms the original's statistics, of the channels that they have kept."""
        twins = dict(self.original.named_modules())
        for name, norm in self.model.named_modules():
            twin = twins.get(name)
            if not (isinstance(norm, _BatchNorm) and isinstance(twin, _BatchNorm)):
                continue
            rows = None if norm.weight is None else kept_rows(_affine(norm), _affine(twin))
            if rows is None or norm.running_mean is None or twin.running_mean is None:
                continue  # what it has stays: the copies of the cut, if nothing changed them
            rows = rows.to(norm.running_mean.device)
            for buffer in ("running_mean", "running_var"):
                getattr(norm, buffer).copy_(getattr(twin, buffer)[rows])
            if norm.num_batches_tracked is not None and twin.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(twin.num_batches_tracked)

    def watch(self, x: Tensor) -> Tensor:
        """Runs the original and keeps what its layers give; returns its outputs."""
        twins = dict(self.original.named_modules())

        def keep(name: str) -> Callable[..., None]:
            def hook(twin: nn.Module, args: Any, out: Tensor) -> None:
                self._calls[name] = self._calls.get(name, 0) + 1
                layer = self.layers[name]
                size = layer.weight[0].numel() + (layer.bias is not None)
                rows = max(_LEAST_ROWS, _ROWS * size)
                places = Places.of(twin, out, rows, self._generator)
                found = outputs(twin, out, places)[:, self.kept[name]]
                self._seen[name] = (places, found)

            return hook

        with ExitStack() as stack:
            for name in self.layers:
                handle = twins[name].register_forward_hook(keep(name))
                stack.callback(handle.remove)
            out: Tensor = self.original(x)
        return out

    def mend(self, x: Tensor, ridge: float, progress: Progress | None) -> None:
        """Runs the model once; each layer is refitted just before it runs."""
        names = [name for name in self.layers if self._calls.get(name) == 1]
        for name in self.layers:
            if name not in names:
                often = self._calls.get(name, 0)
                self._skip(name, f"it runs {often} times in the original" if often else "never run")

        def fit(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
                if name in self._seen:
                    self._mend_one(name, first_given(args, kwargs), ridge)
                    if progress is not None:
                        progress(len(self.done), len(names), name)

            return hook

        with ExitStack() as stack:
            for name in names:
                layer = self.layers[name]
                handle = layer.register_forward_pre_hook(fit(name), with_kwargs=True)
                stack.callback(handle.remove)
            self.model(x)

    def _mend_one(self, name: str, x: Tensor, ridge: float) -> None:
        layer = self.layers[name]
        places, wanted = self._seen.pop(name)
        try:
            read = inputs(layer, x, places)
        except (IndexError, RuntimeError):
            self._skip(name, f"its input has another size than the original's, {tuple(x.shape)}")
            return
        if len(read) != len(wanted):
            self._skip(name, f"its input has another size than the original's, {tuple(x.shape)}")
            return
        before, after = refit_layer(layer, read, wanted, ridge)
        self.done.append({"layer": name, "before": before, "after": after})


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Quantisers of activations let everything through: their ranges are of other weights."""
    found = [m for m in model.modules() if isinstance(m, Quantiser)]
    for quantiser in found:
        quantiser.look = _pass
    try:
        yield
    finally:
        for quantiser in found:
            quantiser.look = None


def _pass(x: Tensor) -> None:
    pass


def _affine(norm: _BatchNorm) -> Tensor:
    return torch.stack([norm.weight.detach(), norm.bias.detach()], dim=1)


def _apart(out: Any, wanted: Any) -> float:
    """Relative squared error between outputs."""
    found, aim = _tensor(out), _tensor(wanted)
    if found.shape != aim.shape:
        raise EspalierError(
            f"a reconstruction needs outputs of one shape, the model gives {tuple(found.shape)} and "
            f"the original {tuple(aim.shape)}: give the original that the model was cut from"
        )
    left = (found.double() - aim.double()).square().sum()
    return float(left / aim.double().square().sum().clamp_min(1e-300))


def _tensor(out: Any) -> Tensor:
    """The first tensor of an output, which may be a tuple or a transformers output."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out
