"""A family of MobileNets where one kernel a layer holds every choice of kernel and expansion.

Single-Path NAS (Stamoulis et al., 2019): the small kernel is the centre of the large one, the small
expansion the first channels of the large one, and the norm of what lies outside, against a
threshold that is learnt, tells whether it is needed. So a search holds the weights of one network,
not those of every operator, and costs about one training.

Differs from the paper in that norms are relative: a batch norm follows each kernel, so only the
share of the outer part in it has a meaning. Sizes are made for small images, ReLU throughout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from espalier.nets.blocks import Options, conv_norm, knob, whole
from espalier.nets.elastic import (
    BatchNorm2d,
    Conv2d,
    DepthwiseConv2d,
    Dim,
    Elastic,
    Repeat,
    Skippable,
    product,
)
from espalier.nets.elastic.core import Maker
from espalier.nets.elastic.dims import Choices, decisions, options, size
from espalier.nets.elastic.masks import aligned
from espalier.nets.elastic.mixing import Weights, no_gates, resolve
from espalier.nets.multipath import Frame, Place, classifier
from espalier.nets.supernet import Supernet
from espalier.space import Candidate, Decision, Option, choice

START = 0.8  # thresholds at first, as a share of the norm of what is inside
SLOPE = 0.25  # width of the sigmoid that stands for the step in backward
# An indicator is this far from 0 and 1, so that both sides run and both get gradients.
AWAY = 1e-6


class Superkernel(Supernet):
    """MobileNets for images `(channels, height, width)`, one superkernel a layer.

    Decisions: `stageN.I.kernel`, `stageN.I.expansion` and, where input and output are alike,
    `stageN.I.keep`: False drops the layer (an expansion of 0, in the paper), and the other two with
    it. Besides choosing them from outside (`activate`, `mix`), the network can choose them by its
    own weights: see `indicators`.

    - `kernels`: odd. `expansions`: inner width over outer. `depth`: blocks a stage.
    - `zero`: whether layers can be dropped.
    - `stem`, `head`, `widths` (one a stage): channels. By default they suit the size of the image.

    Errors: `SpaceError`, `DataError`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        kernels: Options = (3, 5),
        expansions: Options = (3, 6),
        depth: int | Sequence[int] = 2,
        zero: bool = True,
        *,
        stem: int | None = None,
        widths: Sequence[int] | None = None,
        head: int | None = None,
    ) -> None:
        super().__init__(shape, classes)
        frame = Frame(self.shape, depth, stem, widths, head)
        self.stem = conv_norm(self.shape[0], frame.stem, 3, frame.stem_stride)
        for name, places in frame.stages():
            blocks = [_block(place, kernels, expansions, zero) for place in places]
            self.add_module(name, Repeat(len(blocks), blocks.__getitem__))
        self.head = classifier(frame.widths[-1], frame.head, self.classes)

    def indicators(self) -> dict[str, Tensor]:
        """Which part of each layer its weights' norms call for, as weights for `mix`.

        0 or 1 in value (but for a millionth, so that both sides run); in backward the sigmoid of
        norm less threshold, so that thresholds and weights learn from the loss and from the cost.
        """
        found: dict[str, Tensor] = {}
        for layer in self._superblocks():
            found |= layer.indicators()
        return found

    def architecture_parameters(self) -> dict[str, nn.Parameter]:
        """The thresholds by decision: share of the norm that an outer part needs to be used."""
        found: dict[str, nn.Parameter] = {}
        for layer in self._superblocks():
            found |= layer.thresholds()
        return found

    @torch.no_grad()
    def chosen(self) -> Candidate:
        """The candidate that the indicators name."""
        picked = {name: int(w.argmax()) for name, w in self.indicators().items()}
        full: dict[str, Option] = {**self.uniform(1.0)}
        for name, index in picked.items():
            full[name] = options(self.space[name])[index]
        for decision in self.space.decisions:  # conditions stand before what hangs on them
            if any(full.get(parent) not in ok for parent, ok in decision.when.items()):
                full.pop(decision.name, None)
        return self.space.candidate(full)

    def _superblocks(self) -> list[Superblock]:
        return [module for module in self.modules() if isinstance(module, Superblock)]


def _block(place: Place, kernels: Options, expansions: Options, zero: bool) -> nn.Module:
    keep = choice(f"{place.name}.keep", False, True) if zero and place.residual else None
    kernel = whole(f"{place.name}.kernel", kernels)
    block = Superblock(place, kernel, knob(f"{place.name}.expansion", expansions), keep)
    return block if keep is None else Skippable(keep, block)


class Superblock(nn.Module):
    """An inverted residual `(b, in, h, w) -> (b, out, h/stride, w/stride)` with one depthwise kernel.

    The expansion is decided at one point, before the projection: until there channels do not meet,
    so that a mask there is as good as running fewer, and the channels it closes still tell what
    they would have given.
    """

    def __init__(
        self, place: Place, kernel: Dim, expansion: Decision | float, keep: Decision | None
    ) -> None:
        super().__init__()
        inner = product(place.inputs, expansion)
        self.residual = place.residual
        self.expand = _layers(_Conv2d(place.inputs, inner, 1, bias=False), inner)
        self.filter = _layers(_Depthwise(inner, kernel, place.stride, bias=False), inner)
        self.share = Share(inner, kernel, expansion, keep)
        project: list[tuple[str, nn.Module]] = [
            ("conv", _Conv2d(inner, place.outputs, 1, bias=False)),
            ("norm", BatchNorm2d(place.outputs)),
        ]
        self.project = nn.Sequential(OrderedDict(project))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.share(self.filter(self.expand(x))))
        return x + y if self.residual else y

    def _kernel(self) -> Tensor:
        weight: Tensor = self.filter.get_submodule("conv").get_parameter("weight")
        return weight

    def indicators(self) -> dict[str, Tensor]:
        """Weights of this layer's decisions, by the norms of its depthwise kernel."""
        return self.share.indicators(self._kernel())

    def thresholds(self) -> dict[str, nn.Parameter]:
        """This layer's thresholds by decision."""
        return {d.name: self.share.get_parameter(part) for part, d in self.share.chosen.items()}


def _layers(conv: Elastic, width: Dim) -> nn.Sequential:
    norm = _Norm(width)
    found: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", norm), ("relu", nn.ReLU())]
    return nn.Sequential(OrderedDict(found))


class _Open(Elastic):
    """A layer that masks nothing under a mixture of expansions, because `Share` does.

    It runs all channels where their weight has a gradient, which is then right also for closed ones.
    """

    def _widths(self) -> tuple[Decision, ...]:
        raise NotImplementedError

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        most: dict[str, Option] = {}
        for decision in self._widths():
            mixed = found.pop(decision.name, None)
            if mixed is not None:
                last = -1 if mixed.weights.requires_grad else max(mixed.live)
                most[decision.name] = options(decision)[last]
        if most:
            self.settle({**self._choices(), **most})
        if found:
            super().mix(found)


class _Conv2d(_Open, Conv2d):
    def _widths(self) -> tuple[Decision, ...]:
        return self.decisions()


class _Depthwise(_Open, DepthwiseConv2d):
    def _widths(self) -> tuple[Decision, ...]:
        return decisions(self.in_channels)


class _Norm(_Open, BatchNorm2d):
    def _widths(self) -> tuple[Decision, ...]:
        return self.decisions()


class Share(Elastic):
    """Weighs the channels `(b, c, h, w)` of a mixture of expansions, and holds a layer's thresholds.

    Of a plain network nothing of it is left.
    """

    below: Tensor  # 1 where a channel is one of an option's, (options, channels)

    def __init__(
        self, inner: Dim, kernel: Dim, expansion: Decision | float, keep: Decision | None
    ) -> None:
        super().__init__()
        found = {"kernel": kernel, "expansion": expansion, "keep": keep}
        self.chosen = {part: d for part, d in found.items() if isinstance(d, Decision)}
        for part, decision in self.chosen.items():  # t5, t6 and t3 of the paper
            thresholds = torch.full((len(options(decision)) - 1,), START)
            self.register_parameter(part, nn.Parameter(thresholds))
        every: list[Choices] = [{d.name: o} for d in self.decisions() for o in options(d)]
        self.widths = tuple(size(inner, one) for one in every or [{}])
        below = torch.arange(max(self.widths)) < torch.tensor(self.widths)[:, None]
        self.register_buffer("below", below.float(), persistent=False)

    def decisions(self) -> tuple[Decision, ...]:
        return (self.chosen["expansion"],) if "expansion" in self.chosen else ()

    def settle(self, choices: Choices) -> None:
        if self._mixed is not None:
            self._mixed = None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        for mixed in found.values():
            self._mixed = mixed.weights

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is None:
            return x
        weights: Tensor = self._mixed
        mask = weights @ self.below.to(weights)
        return x * aligned(mask[..., : x.shape[1]], x, 1)

    def plain(self, make: Maker) -> nn.Module:
        return nn.Identity()

    def indicators(self, weight: Tensor) -> dict[str, Tensor]:
        """Weights of the layer's decisions, `(options,)` each, of a depthwise kernel `(c, 1, k, k)`."""
        energy = weight[:, 0].square()
        first = energy[: self.widths[0]]
        norms: dict[str, Tensor] = {}
        if "kernel" in self.chosen:
            norms["kernel"] = _relative(_rings(energy, _numbers(self.chosen["kernel"])))
        if "expansion" in self.chosen:
            ends = (0, *self.widths)
            groups = [energy[a:b].mean() for a, b in pairwise(ends)]
            norms["expansion"] = _relative(groups)
        if "keep" in self.chosen:  # relative to a fresh kernel: see `elastic.core.initialise`
            norms["keep"] = (first.mean() * (energy[0].numel() / 2)).reshape(1)
        return {
            self.chosen[part].name: _nested(_step(norm - self.get_parameter(part)))
            for part, norm in norms.items()
        }


def _numbers(decision: Decision) -> tuple[int, ...]:
    return tuple(int(option) for option in options(decision))


def _rings(energy: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """The mean of `energy` `(c, k, k)` over the smallest kernel, then over each ring around it."""
    away = (torch.arange(energy.shape[-1], device=energy.device) - energy.shape[-1] // 2).abs()
    distance = torch.maximum(away[:, None], away[None])
    halves = [-1, *(side // 2 for side in sides)]
    return [energy[:, (distance > a) & (distance <= b)].mean() for a, b in pairwise(halves)]


def _relative(norms: Sequence[Tensor]) -> Tensor:
    """The norms of the outer parts, as shares of that of the first."""
    return torch.stack(list(norms[1:])) / norms[0].clamp_min(1e-12)


def _step(x: Tensor) -> Tensor:
    """1 where `x` is above 0, else 0; a sigmoid in backward."""
    soft = torch.sigmoid(x / SLOPE)
    hard = (x > 0).to(x.dtype).clamp(AWAY, 1 - AWAY)
    return soft + (hard - soft).detach()


def _nested(steps: Tensor) -> Tensor:
    """Weights of n + 1 options from n indicators, each of which needs those before it."""
    reached = torch.cat([steps.new_ones(1), steps.cumprod(0)])
    return reached - torch.cat([reached[1:], steps.new_zeros(1)])
