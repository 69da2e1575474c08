"""The experts that stay make up for those that go: their last maps fitted together, closed-form.

A mixture's output is linear in the last maps of its experts: with the gated inner units of all experts
side by side, it is one linear layer, whose least squares towards the output before has one answer.
Forward passes alone; the rule is that of layer-wise reconstruction (ThiNet; Luo et al., 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Experts
from espalier.compress.language.experts.merging import mixture
from espalier.compress.language.weights.places import expert_inputs
from espalier.train.running import device_of, evaluating

_DAMP = 0.05  # times units over tokens: few tokens say little about many units
_MOST = 16_384  # units that are fitted together: 2 GB of second moments
_ROWS = 4096  # tokens taken in at once


@torch.no_grad()
def refit_in_turn(
    model: nn.Module,
    windows: Tensor,
    changes: Mapping[int, Callable[[], None]],
    damp: float | None = None,
) -> dict[int, tuple[float, float]]:
    """Changes mixtures, each just before it runs on `windows (n, t)`, and fits its experts' last maps
    to the outputs that it had before; gives the relative squared error before and after the fit.

    `changes`: by layer, what prunes or merges the layer's experts in place. `damp`: how strongly
    maps stay as they are, of the mean square of a unit; by default the less the more tokens there are.
    """
    errors: dict[int, tuple[float, float]] = {}
    left = set(changes)

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(block: Any, args: Any) -> None:
            if layer not in left:
                return
            left.discard(layer)
            x = args[0].reshape(-1, args[0].shape[-1])
            wanted = _outputs(block, x)
            changes[layer]()
            errors[layer] = _fit(model, mixture(model, layer), x, wanted, damp)

        return hook

    with evaluating(model), ExitStack() as stack:
        for layer in changes:
            block = model.get_submodule(mixture(model, layer).path)
            stack.callback(block.register_forward_pre_hook(hook_of(layer)).remove)
        model(windows.to(device_of(model)), use_cache=False)
    return errors


def _outputs(block: Any, x: Tensor) -> Tensor:
    parts = [block.forward(rows[None]).reshape(rows.shape) for rows in torch.split(x, _ROWS)]
    return torch.cat(parts)


def _fit(
    model: nn.Module, at: Experts, x: Tensor, wanted: Tensor, damp: float | None
) -> tuple[float, float]:
    block: Any = model.get_submodule(at.path)
    experts: Any = model.get_submodule(f"{at.path}.experts")
    router: Any = model.get_submodule(at.router)
    whole = max(float(wanted.double().square().sum()), 1e-300)
    missing = (wanted - _outputs(block, x)).double()
    before = float(missing.square().sum()) / whole
    step = max(1, _MOST // at.width)
    for low in range(0, at.count, step):  # what one group leaves over is the next one's
        own = range(low, min(low + step, at.count))
        size = len(own) * at.width
        gram = x.new_zeros(size, size, dtype=torch.float64)
        cross = x.new_zeros(missing.shape[1], size, dtype=torch.float64)
        for rows, rest in zip(torch.split(x, _ROWS), torch.split(missing, _ROWS), strict=True):
            units = _units(experts, router, rows, own, at.width)
            gram += units.T @ units
            cross += rest.T @ units
        scale = float(gram.diagonal().mean())
        if scale <= 0:
            continue  # none of their units is ever used
        share = _DAMP * size / len(x) if damp is None else damp
        gram.diagonal().add_(share * scale)
        moved = torch.linalg.solve(gram, cross, left=False)
        experts.down_proj[list(own)] += torch.stack(moved.split(at.width, 1)).to(experts.down_proj)
        missing = (wanted - _outputs(block, x)).double()
    return before, float(missing.square().sum()) / whole


def _units(experts: Any, router: Any, x: Tensor, own: range, width: int) -> Tensor:
    """The gated inner units of some experts side by side `(tokens, experts * width)`, float64."""
    _, gates, index = router(x)
    found = x.new_zeros(len(x), len(own) * width, dtype=torch.float64)
    for place, expert in enumerate(own):
        rows, _ = torch.where(index == expert)
        units = expert_inputs(experts, expert, x, index, gates, "down_proj")
        found[rows, place * width : (place + 1) * width] = units
    return found
