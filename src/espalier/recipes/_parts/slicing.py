"""What follows when heads and inner units of a decoder are sliced off: the maps behind them, mended."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Attention, Feed, anatomy
from espalier.compress.language.shape.surgery import channels, keep_heads, keep_units

_ROWS = 16  # windows run at once
Kept = Mapping[str, Tensor]  # a map's path in the original -> which of its inputs stay


@dataclass(frozen=True)
class Seen:
    """What the maps behind heads and units read in the original: by path, per place of the text.

    `gram (d, d)` is the mean of x x', `mean (d,)` of x.
    """

    gram: dict[str, Tensor]
    mean: dict[str, Tensor]


def seen(model: Any, ids: Tensor) -> Seen:
    """Runs windows `(n, t)` and sums up."""
    gram: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    count = ids.numel()

    def taker(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            gram[path] = gram.get(path, torch.zeros(())) + x.T @ x / count
            mean[path] = mean.get(path, torch.zeros(())) + x.sum(0) / count

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for path in ends(model):
            hook = model.get_submodule(path).register_forward_pre_hook(taker(path))
            stack.callback(hook.remove)
        for part in torch.split(ids, _ROWS):
            model(part, use_cache=False)
    return Seen(gram, mean)


def ends(model: Any) -> dict[str, Attention | Feed]:
    """The maps behind heads and inner units, and the sub-layer each belongs to."""
    out: dict[str, Attention | Feed] = {}
    for layer in anatomy(model).layers:
        if layer.attention is not None:
            out[layer.attention.out.path] = layer.attention
        if isinstance(layer.feed, Feed):
            out[layer.feed.down.path] = layer.feed
    return out


def sliced(model: Any, groups: Mapping[int, Tensor], units: Mapping[int, Tensor]) -> Any:
    """A copy with some groups of heads and some units of each layer."""
    made = copy.deepcopy(model)
    for layer, chosen in groups.items():
        keep_heads(made, layer, chosen)
    for layer, chosen in units.items():
        keep_units(made, layer, chosen)
    return made


def inputs_kept(model: Any, groups: Mapping[int, Tensor], units: Mapping[int, Tensor]) -> Kept:
    """Which inputs of each map are left, from which groups and units stay."""
    out: dict[str, Tensor] = {}
    for i, layer in enumerate(anatomy(model).layers):
        if layer.attention is not None and i in groups:
            each = layer.attention.heads // layer.attention.groups * layer.attention.head
            out[layer.attention.out.path] = channels(groups[i].sort().values, each)
        if isinstance(layer.feed, Feed) and i in units:
            out[layer.feed.down.path] = units[i].sort().values
    return out


@contextmanager
def masked(model: Any, kept: Kept, data: Seen | None = None) -> Iterator[None]:
    """Within it the maps read only these inputs, and the model computes what the sliced one does;
    with `data` what the sliced and compensated one does."""

    def adder(bias: Tensor) -> Any:
        return lambda module, args, output: output + bias

    with torch.no_grad(), ExitStack() as stack:
        for path, chosen in kept.items():
            module = model.get_submodule(path)
            weight = module.weight
            if data is not None and len(chosen) < weight.shape[1]:
                hook = module.register_forward_hook(adder(missing(weight, chosen, data.mean[path])))
                stack.callback(hook.remove)
            stack.callback(weight.copy_, weight.clone())
            stays = torch.zeros(weight.shape[1], dtype=weight.dtype)
            stays[chosen] = 1.0
            weight.mul_(stays)
        yield


@dataclass(frozen=True)
class Reformation:
    """Alternating directions: penalty, rounds, damping as a share of the Gram matrix's diagonal."""

    rho: float = 10.0
    rounds: int = 20
    damp: float = 0.1

    def weight(self, whole: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
        """The columns `kept` of a new weight `(o, k)` that stand in for all of `whole (o, d)`.

        Columns are scaled by the root of the Gram matrix's diagonal; W takes a step to the least
        squares of the layer's outputs, Z to the columns that stay, U is what they still differ by.
        """
        size = gram.diagonal().clamp_min(1e-12).sqrt()
        g = gram / size[:, None] / size
        g = g + self.damp * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
        first = whole.double() * size
        wanted = first @ g
        inverse = torch.linalg.inv(g + self.rho * torch.eye(len(g), dtype=g.dtype))
        mask = torch.zeros(len(g), dtype=g.dtype)
        mask[kept] = 1.0
        w, z, u = first, first * mask, torch.zeros_like(first)
        for _ in range(self.rounds):
            z = (w + u) * mask
            u = u + w - z
            w = (wanted + self.rho * (z - u)) @ inverse
        return ((w + u) * mask / size)[:, kept].to(whole.dtype)


def optimum(whole: Tensor, gram: Tensor, kept: Tensor, damp: float = 0.01) -> Tensor:
    """The same in closed form: the columns of least squared error, with a ridge around the old."""
    g = gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    cross = whole.double() @ g[:, kept]
    found: Tensor = torch.linalg.solve(g[kept][:, kept], cross.T).T
    return found.to(whole.dtype)


def reform(model: Any, original: Any, kept: Kept, data: Seen, way: Any) -> Any:
    """A copy of a sliced model whose maps behind heads and units are reformed by `way`."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for path, chosen in kept.items():
            whole = original.get_submodule(path).weight
            if len(chosen) < whole.shape[1]:
                new = way(whole, data.gram[path], chosen)
                made.get_submodule(path).weight.copy_(new)
    return made


def compensate(model: Any, original: Any, kept: Kept, data: Seen) -> Any:
    """Gives maps a bias: what the inputs that went gave on average (FLAP's; An et al., 2023)."""
    for path, chosen in kept.items():
        whole = original.get_submodule(path).weight.detach()
        if len(chosen) < whole.shape[1]:
            bias = missing(whole, chosen, data.mean[path])
            model.get_submodule(path).bias = nn.Parameter(bias)
    return model


def missing(whole: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """What the inputs of a weight `(o, d)` that are not kept give on average, `(o,)`."""
    gone = torch.ones(whole.shape[1], dtype=torch.bool)
    gone[kept] = False
    return (whole[:, gone].double() @ mean[gone]).to(whole.dtype)


def flap(
    model: Any,
    groups: Mapping[int, Tensor],
    units: Mapping[int, Tensor],
    most: float,
    heads: float = 1.0,
    standard: bool = True,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Which groups and units stay where all of a model's are compared with each other.

    `groups` and `units` are scores by layer; they are compared after standardisation within a layer
    and kind, groups `heads` times as high; those above a common threshold stay, one at least, so
    that at most `most` weights are left.
    """
    parts = anatomy(model).layers
    total = float(sum(p.numel() for p in model.parameters()))
    width = float(anatomy(model).width)
    high: list[tuple[Tensor, float, int, bool]] = []
    for i, layer in enumerate(parts):
        a, f = layer.attention, layer.feed
        if a is not None:
            cost = width * a.head * (2 * a.heads / a.groups + 2)
            high.append((_standard(groups[i], standard) * heads, cost, i, True))
        if isinstance(f, Feed):
            high.append(
                (_standard(units[i], standard), width * (2 + (f.gate is not None)), i, False)
            )
    steps = torch.unique(torch.cat([score for score, *_ in high]))
    low, top = 0, len(steps) - 1  # the least threshold that is tight enough
    while low < top:
        middle = (low + top) // 2
        left = total
        for score, cost, *_ in high:
            left -= cost * min(int((score < steps[middle]).sum()), len(score) - 1)
        if left <= most:
            top = middle
        else:
            low = middle + 1
    found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    for score, _, i, of_heads in high:
        stay = torch.nonzero(score >= steps[low]).flatten()
        found[0 if of_heads else 1][i] = stay if len(stay) else score.argmax().reshape(1)
    return found


def _standard(score: Tensor, standard: bool) -> Tensor:
    if not standard:
        return score.double()
    spread = score.double().std(correction=0).clamp_min(1e-30)
    return (score.double() - score.double().mean()) / spread
