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
from espalier.nets.elastic.dims import decisions, options
from espalier.nets.elastic.mixing import Weights, resolve
from espalier.nets.multipath import Frame, Place, classifier
from espalier.nets.share import Share
from espalier.nets.supernet import Supernet
from espalier.space import Candidate, Decision, Option, choice


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
