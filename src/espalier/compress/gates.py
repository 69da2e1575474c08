"""A trained model with masks on its channels or weights, which can be learned by gradient.

A mask multiplies the weights that read a channel, wherever they are: behind a shortcut, behind a
concatenation, at the projection of an attention head. So a channel whose mask is 0 is removed, shortcut
included, and cutting it out afterwards changes nothing; its own layers and norms go on computing, so
that it can come back. A mask on single weights multiplies these.

A gated model runs "mixtures" as supernets do, with a number a unit in the place of one an option: so the
relaxations, rules, terms and checkpoints of `solvers.relax` work on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from espalier.compress.masks import Mask, Place, masked_weight, values
from espalier.errors import EspalierError, SpaceError, unknown
from espalier.space import Candidate, Option, Space

if TYPE_CHECKING:
    from espalier.compress.pretrained import Pretrained


class Gated(nn.Module):
    """A copy of a model with a mask for each of some decisions; all open at first.

    `space` holds the decisions; `counts`: by decision, how many units each of its options keeps, in
    ascending order, the last one all of them. `places`: by decision, the weights that its mask
    multiplies. `scales`: by decision, the weights of norms with the unit of each of their entries.
    `family`: what cuts the model, where masks are of what can be cut; see `unit_gates`, `weight_gates`.
    `fold`: turns the masked model into the one that the family cuts, where that is another (branches
    that are merged into one layer).
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        counts: Mapping[str, Sequence[int]],
        places: Mapping[str, Sequence[Place]],
        scales: Mapping[str, Sequence[Place]] | None = None,
        family: Pretrained | None = None,
        fold: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).train()
        self.space, self.family, self.fold = space, family, fold
        self.counts = {name: tuple(found) for name, found in counts.items()}
        self.units = {name: found[-1] for name, found in self.counts.items()}
        self.mixable = tuple(name for name in space.names if places.get(name))
        self.joins: dict[str, tuple[str, ...]] = {}  # no nodes where edges meet
        self.active: Candidate | None = None
        self._scales = dict(scales or {})
        self._by_weight: dict[str, list[tuple[str, Tensor | None]]] = {}
        for name in self.mixable:
            for place in places[name]:
                self._by_weight.setdefault(place.parameter, []).append((name, place.index))
        self._masks: dict[str, Mask] = {}
        self.scores = {name: score.clone() for name, score in self.importances().items()}

    def mix(self, masks: Mapping[str, Any]) -> None:
        """Runs with these masks from now on; decisions that are not named are open."""
        for name, mask in masks.items():
            if name not in self.mixable:
                raise SpaceError(unknown("gate", name, self.mixable))
            shape = tuple(values(mask).shape)
            if shape != (self.units[name],):
                raise SpaceError(f"the mask of {name!r} must be ({self.units[name]},), got {shape}")
        self._masks, self.active = dict(masks), None

    def activate(self, choices: Mapping[str, Option]) -> None:
        """Keeps as many units of each decision as its option says, those with the highest scores."""
        self.mix(self.hard({name: self.kept(name, choices.get(name)) for name in self.mixable}))
        self.active = self.space.candidate(choices)

    def kept(self, name: str, option: Option | None) -> int:
        """How many units an option of a decision keeps; all of them for None."""
        if option is None:
            return self.units[name]
        return self.counts[name][int(self.space[name].code(option))]

    def hard(self, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Masks of 0 and 1 that keep so many units, those with the highest scores."""
        out = {}
        for name, count in kept.items():
            order = torch.argsort(self.scores[name], descending=True, stable=True)
            out[name] = torch.zeros_like(self.scores[name])
            out[name][order[:count]] = 1.0
        return out

    def trained(self) -> Pretrained:
        """The family that cuts the model as it is now, in the order of the present scores.

        Where the model is folded, that is for the present masks only. Errors: `EspalierError` for masks
        on single weights, which no family cuts out.
        """
        if self.family is None:
            raise EspalierError("these masks are on single weights: there is nothing to cut out")
        twin = copy.copy(self.family)
        model = copy.deepcopy(self.model) if self.fold is None else self.fold(self.baked())
        twin.model = model.cpu().eval()
        named = {n.partition(":")[2]: score.detach().cpu() for n, score in self.scores.items()}
        return twin.with_scores(named)

    def network(self) -> nn.Module:
        """The active candidate as a plain network: units cut out, or weights set to 0."""
        if self.active is None:
            raise EspalierError("no candidate is active: call activate with one")
        return self.baked() if self.family is None else self.trained().build(self.active)

    def baked(self) -> nn.Module:
        """A copy of the model whose weights hold the present masks, nothing cut out."""
        network = copy.deepcopy(self.model)
        own = dict(network.named_parameters())
        with torch.no_grad():
            for parameter, masks in self._by_weight.items():
                for name, index in masks:
                    if name in self._masks:
                        masked = masked_weight(own[parameter], self._masks[name], index)
                        own[parameter].copy_(masked)
        return network.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """The model under its masks."""
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        masked: dict[str, Tensor] = {}
        for parameter, masks in self._by_weight.items():
            weight = own[parameter]
            for name, index in masks:
                if name in self._masks:
                    weight = masked_weight(weight, self._masks[name], index)
            if weight is not own[parameter]:
                masked[parameter] = weight
        if not masked:
            return self.model(*inputs)
        return functional_call(self.model, masked, inputs)

    @torch.no_grad()
    def importances(self, even: bool = True) -> dict[str, Tensor]:
        """How much each unit matters by the present weights alone: `(units,)` a decision, above 0.

        The norm's scale where each unit has one (Liu et al., 2017), else the L2 norm of the weights
        that read it; the absolute value of a single weight. With `even` the mean over each
        decision's is 1, else they are as they are found, to be compared across decisions.
        """
        out, own = {}, dict(self.model.named_parameters())
        for name in self.mixable:
            total = self._by_scale(name, own)
            if total is None:
                total = self._by_norm(name, own)
            out[name] = (total / total.mean().clamp(min=1e-12) if even else total) + 1e-6
        return out

    def _by_scale(self, name: str, own: Mapping[str, Tensor]) -> Tensor | None:
        scales = self._scales.get(name, ())
        if not scales:
            return None
        total = torch.zeros(self.units[name], device=own[scales[0].parameter].device)
        seen = torch.zeros_like(total)
        for place in scales:
            assert place.index is not None
            inside = place.index >= 0
            where = place.index[inside].to(total.device)
            scale = own[place.parameter][inside.to(total.device)].abs().float()
            total.index_add_(0, where, scale)
            seen.index_add_(0, where, torch.ones_like(scale))
        return total / seen if bool((seen > 0).all()) else None

    def _by_norm(self, name: str, own: Mapping[str, Tensor]) -> Tensor:
        total: Tensor | None = None
        for parameter, masks in self._by_weight.items():
            for index in [found for owner, found in masks if owner == name]:
                square = own[parameter].float() ** 2
                if index is None:
                    found = square.flatten()
                else:
                    where = index.to(square.device).expand_as(square)
                    found = square.new_zeros(self.units[name] + 1)  # the last for entries of none
                    found.index_add_(0, where.flatten() % (self.units[name] + 1), square.flatten())
                    found = found[:-1]
                total = found if total is None else total + found
        assert total is not None
        return total.sqrt()
