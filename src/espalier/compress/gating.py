"""Which masks a model can carry: on the units of its groups, or on each of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.compress.gates import Gated
from espalier.compress.masks import Place
from espalier.errors import EspalierError, unknown
from espalier.space import Option, Space, ordinal

if TYPE_CHECKING:
    from espalier.compress.pretrained import Pretrained


def unit_gates(family: Pretrained) -> Gated:
    """A trained model with a mask on the units of each group that its widths can cut.

    Groups whose channels are averaged over, or whose masks do not compute what a cut does on the
    family's example, are left whole. Errors: `EspalierError` where no group is left.
    """
    groups = {
        f"width:{name}": group
        for cut in family.cuts
        for name, group in getattr(cut, "groups", {}).items()
        if not group.averaged
    }
    named = {id(p): name for name, p in family.model.named_parameters()}
    places, scales, counts = {}, {}, {}
    for name, group in groups.items():
        read = [_place(family.model, named, m, group.units) for m in group.members if m.consumed]
        norms = [m for m in group.members if m.tensor == "weight" and _is_norm(family.model, m)]
        places[name] = [p for p in read if p is not None]
        scales[name] = [
            p for m in norms if (p := _place(family.model, named, m, group.units)) is not None
        ]
        counts[name] = tuple(int(o) for o in family.space[name].options)
    gated = Gated(family.model, family.space, counts, places, scales, family)
    wrong = _not_alike(gated)
    if wrong:
        left = {name: found for name, found in places.items() if name not in wrong}
        gated = Gated(family.model, family.space, counts, left, scales, family)
    if not gated.mixable:
        raise EspalierError(
            "no group of channels of this model can carry a mask: use another solver"
        )
    return gated


def _place(model: nn.Module, named: Mapping[int, str], member: Any, units: int) -> Place | None:
    """Where a member's units are in its parameter; None where it is a buffer."""
    tensor = getattr(model.get_submodule(member.path), member.tensor)
    if id(tensor) not in named:
        return None
    index = torch.full((tensor.shape[member.dim],), -1)
    index[member.rows.flatten()] = torch.arange(units).repeat_interleave(member.rows.shape[1])
    shape = [-1 if d == member.dim else 1 for d in range(tensor.dim())]
    return Place(named[id(tensor)], index.reshape(shape))


def _is_norm(model: nn.Module, member: Any) -> bool:
    return isinstance(model.get_submodule(member.path), nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def _not_alike(gated: Gated) -> list[str]:
    """Decisions whose masks do not compute what their cut does, on the example."""
    assert gated.family is not None
    family, wrong = gated.family, []
    x = family._example[:2]
    smallest = {name: family.space[name].options[0] for name in gated.mixable}
    if _alike(gated, x, smallest):
        return []
    for name, option in smallest.items():
        if not _alike(gated, x, {name: option}):
            wrong.append(name)
    return wrong


def _alike(gated: Gated, x: Tensor, choices: Mapping[str, Option]) -> bool:
    assert gated.family is not None
    candidate = gated.space.candidate({**gated.family.original, **choices})
    gated.activate(candidate)
    gated.eval()
    wanted, found = gated.network()(x), gated(x)
    gated.train()
    gated.mix({})
    return bool(
        torch.allclose(wanted, found, rtol=1e-3, atol=1e-4 * (1 + float(wanted.abs().max())))
    )


def weight_gates(model: nn.Module, layers: Sequence[str] | None = None, steps: int = 256) -> Gated:
    """A model with a mask on every single weight of its convolutions and linear layers.

    `layers`: their paths, all but none by default. A decision a layer, "sparsity:PATH": the share of
    its weights that is kept, in so many steps. A weight that several read (a classifier tied to the
    embedding) has one mask, by the first of these layers; weights that are computed (weight norm) are left alone.
    Errors: `EspalierError` for a layer without weights of its own.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    every = {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
    named = {id(p): name for name, p in model.named_parameters()}  # shared ones by their first name
    owners: dict[int, str] = {}
    for path, layer in every.items():
        if id(layer.weight) in named:
            owners.setdefault(id(layer.weight), path)
    found = {path: every[path] for path in owners.values()}
    for path in layers or ():
        if path in every and path not in found:
            rule = "are computed, or are another layer's: no mask of its own fits"
            raise EspalierError(f"the weights of {path!r} {rule}")
        if path not in found:
            raise EspalierError(unknown("layer with weights to mask", path, found))
    chosen = {path: m for path, m in found.items() if layers is None or path in layers}
    if not chosen:
        raise EspalierError("the model has no convolution or linear layer whose weights to mask")
    counts, decisions, places = {}, [], {}
    for path, layer in chosen.items():
        name, size = f"sparsity:{path}", layer.weight.numel()
        grid = sorted({math.ceil(size * (i + 1) / steps) for i in range(steps)})
        counts[name] = grid
        decisions.append(ordinal(name, *(count / size for count in grid)))
        places[name] = [Place(named[id(layer.weight)])]
    return Gated(model, Space(decisions), counts, places)
