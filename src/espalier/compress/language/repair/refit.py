"""Layer-wise reconstruction: what a cut took from the hidden states is put back by the next outputs.

Every map that writes to the hidden states (out of attention, down of feed-forward) is fitted anew by
least squares so that the hidden states behind it are the original's, in the order they run: each sees
what the refitted ones before it give. Where sub-layers behind a map are left out, it is fitted to the
states behind these. The rule of layer-wise reconstruction is that of ThiNet (Luo et al., 2017), on
the hidden states that are passed on instead of on a layer's own output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, Experts, Layer, Weights, anatomy
from espalier.train.running import device_of, evaluating

_AFTER = ("bert", "gemma2")  # norms stand between the map and the hidden states
DAMP = 0.03
_NOTHING = 1e-9  # of the squared size of the states: an error that is not worth a fit


class Reconstruction:
    """The hidden states of an original on windows (n, t) of token ids, to which cut models are
    fitted; held in memory.

    Models whose norms follow the sub-layers (BERT, Gemma 2), and those of fewer hidden channels,
    are left as they are.
    """

    def __init__(self, original: nn.Module, windows: Tensor) -> None:
        self.windows, self.parts = windows, anatomy(original)
        self._states = [] if self.parts.kind in _AFTER else _states(original, self.parts, windows)

    def refit(
        self, model: nn.Module, damp: float = DAMP, frozen: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Fits the maps of a cut model in place; its layers stand where the original's do.

        `damp`: how strongly weights stay as they are, of the mean square of their inputs; `frozen`:
        paths of maps that are not changed. Gives a row for each map that was fitted: `path`, and the
        share of the squared size of the states that was off `before` and `after`.
        """
        ours = anatomy(model)
        if not self._states or ours.width != self.parts.width:
            return []
        if not (found := list(_maps(ours))):
            return []
        ends = [*(place for place, _ in found[1:]), 2 * len(ours.layers)]
        # the state in front of the next map: behind all that is left out between
        wanted = {
            weights.path: self._states[end - 1]
            for (_, weights), end in zip(found, ends, strict=True)
            if weights is not None and weights.path not in frozen
        }
        return _fit_in_turn(model, self.windows, wanted, damp)


def refit(
    model: nn.Module,
    original: nn.Module,
    windows: Tensor,
    *,
    damp: float = DAMP,
    frozen: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Refits the outputs of a cut model's sub-layers in place to an original's hidden states on
    windows (n, t) of token ids: see `Reconstruction`."""
    return Reconstruction(original, windows).refit(model, damp, frozen)


def _maps(parts: Anatomy) -> Iterator[tuple[int, Weights | None]]:
    """The sub-layers that are there: place in the order they run, and the map that writes to the
    hidden states; None where that is no single one (experts)."""
    for i, layer in enumerate(parts.layers):
        if layer.attention is not None:
            yield 2 * i, layer.attention.out
        if layer.feed is not None:
            yield 2 * i + 1, _down(layer)


def _down(layer: Layer) -> Weights | None:
    return None if layer.feed is None or isinstance(layer.feed, Experts) else layer.feed.down


def _states(original: nn.Module, parts: Anatomy, windows: Tensor) -> list[Tensor]:
    """The hidden states (n, t, hidden) behind every sub-layer, in the order they run."""
    found: dict[str, list[Tensor]] = {layer.path: [] for layer in parts.layers}

    with torch.no_grad(), evaluating(original), ExitStack() as stack:
        for layer in parts.layers:
            module, own = original.get_submodule(layer.path), found[layer.path]

            def enter(module: nn.Module, args: Any, kwargs: Any, own: Any = own) -> None:
                own.append(_hidden(args, kwargs).detach().float())

            def leave(module: nn.Module, args: Any, out: Any, own: Any = own) -> None:
                own.append((out[0] if isinstance(out, tuple) else out).detach().float())

            def attend(module: nn.Module, args: Any, out: Any, own: Any = own) -> None:
                own[0] = own[0] + out.detach().float()

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            if layer.attention is not None:
                out = original.get_submodule(layer.attention.out.path)
                stack.callback(out.register_forward_hook(attend).remove)
        _forward(original, windows)
    return [state for own in found.values() for state in own]


def _fit_in_turn(
    model: nn.Module, windows: Tensor, wanted: dict[str, Tensor], damp: float
) -> list[dict[str, Any]]:
    """Fits each map just before it runs."""
    rows: list[dict[str, Any]] = []
    state: list[Tensor] = []  # the cut model's hidden states where the next map adds to them

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        state[:] = [_hidden(args, kwargs).detach().float()]

    def add(module: nn.Module, args: Any, out: Any) -> None:
        state[0] = state[0] + out.detach().float().reshape(state[0].shape)

    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for layer in anatomy(model).layers:
            module = model.get_submodule(layer.path)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for weights in (layer.attention.out if layer.attention else None, _down(layer)):
                if weights is None:
                    continue
                own = model.get_submodule(weights.path)
                if weights.path in wanted:

                    def before(module: nn.Module, args: Any, weights: Weights = weights) -> None:
                        goal = wanted[weights.path] - state[0]
                        rows.extend(_fit(model, weights, args[0], goal, damp))

                    stack.callback(own.register_forward_pre_hook(before).remove)
                stack.callback(own.register_forward_hook(add).remove)
        _forward(model, windows)
    return rows


def _fit(
    model: nn.Module, weights: Weights, inputs: Tensor, goal: Tensor, damp: float
) -> Iterator[dict[str, Any]]:
    """Moves a map towards what its output should be; nothing where it is that already."""
    weight, bias = weights.read(model), weights.bias(model)
    x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    aim = goal.reshape(-1, goal.shape[-1])
    off = aim - x @ weight.float().T - (0.0 if bias is None else bias.float())
    size, error = float(aim.square().sum()), float(off.square().sum())
    if error <= _NOTHING * size:
        return
    gram = (x.T @ x).double()
    gram.diagonal().add_(damp * gram.diagonal().mean().clamp_min(1e-12))
    step = torch.linalg.solve(gram, (x.T @ off).double()).T
    weight.add_(step.to(weight.dtype))
    after = float((off - x @ step.float().T).square().sum())
    yield {"path": weights.path, "before": error / size, "after": after / size}


def _hidden(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _forward(model: Any, windows: Tensor) -> None:
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    model(windows.to(device_of(model)), **extra)
