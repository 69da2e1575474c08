"""The supernet of NAS-Bench-201's cells: shared weights for all 15,625 networks of `NB201`.

Every operator of every edge has weights of its own; all cells take one candidate, or one mixture. An
edge that feeds nothing under it is not run. `partial` mixes only some of the channels, as PC-DARTS
does (Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search",
2020, https://arxiv.org/abs/1907.05737).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.errors import SpaceError, unknown
from espalier.nets.fan import Fan
from espalier.nets.nb201 import EDGES, NB201, SPACE, _conv_norm, _head, _operator
from espalier.nets.nb201 import _relu_conv_norm as _block
from espalier.nets.nb201_cells import Cell, PartialCell, Wiring
from espalier.nets.plain import plain
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit
from espalier.space import Option


class Reduction(nn.Module):
    """The residual block between stages: twice the channels, half the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(OrderedDict(_block(width, 2 * width, 3, 2)))
        self.second = nn.Sequential(OrderedDict(_block(2 * width, 2 * width, 3)))
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)
        conv = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.shortcut = nn.Sequential(OrderedDict(pool=pool, conv=conv))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.second(self.first(x))
        return out


class NB201Supernet(Supernet):
    """The supernet of `NB201`, with its decisions and sizes; `extract` and `build` give its networks.

    `partial=K` mixes one K-th of the channels of an edge. With `affine=False` the norms of the cells
    have no parameters, as DARTS searches; what is extracted has ones and zeros there.
    """

    joins = MappingProxyType(
        {
            str(node): tuple(f"op_{to}_{origin}" for to, origin in EDGES if to == node)
            for node in (1, 2, 3)
        }
    )

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 5,
        partial: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(shape, classes)
        if min(channels, cells, partial) < 1 or channels % partial:
            raise SpaceError(
                "nb201-supernet takes channels and cells from 1, and partial a divisor of channels, "
                f"got {channels}, {cells} and {partial}"
            )
        self.channels, self.cells, self.partial = channels, cells, partial
        self.wiring = Wiring(passing=partial > 1)
        kind = Cell if partial == 1 else PartialCell
        self.stem = nn.Sequential(OrderedDict(_conv_norm(self.shape[0], channels, 3)))
        for stage in range(3):
            width = channels * 2**stage
            if stage:
                self.add_module(f"reduce{stage}", Reduction(width // 2))
            made = [kind(width, partial, affine, self.wiring) for _ in range(cells)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*made))
        self.head = nn.Sequential(OrderedDict(_head(4 * channels, self.classes)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for name, child in self.named_children():
            if name != "wiring":
                x = child(x)
        return x

    def _plain(self, candidate: Mapping[str, Option], fresh: bool) -> fx.GraphModule:
        chosen = self._checked(candidate)
        self._refuse_partial()
        family = NB201(self.shape, self.classes, self.channels, self.cells)
        if fresh:
            network = family.build(chosen).to(next(self.parameters()).device)
        else:
            with torch.device("meta"):  # copying must not draw from the random generator
                network = family.build(chosen)
            _fill(network, lambda name: self._tensor(name, chosen))
        assert isinstance(network, fx.GraphModule)
        return network.train(self.training)

    def _refuse_partial(self) -> None:
        if self.partial > 1:
            raise SpaceError(
                f"the operators of this supernet have 1/{self.partial} of a network's channels: "
                'build candidates with the family "nb201" and train them'
            )

    def _tensor(self, name: str, chosen: Mapping[str, Option]) -> Tensor:
        """What a parameter or buffer of `NB201`'s network is here."""
        places = name.split(".")
        if not places[0].startswith("stage"):
            own: Any = self.get_submodule(name.rpartition(".")[0])
            found: Tensor = getattr(own, places[-1])
            return found
        stage, index, edge, *rest = places
        to, origin = (int(n) for n in edge.split("_")[1:])
        cell = self.get_submodule(f"{stage}.{index}")
        assert isinstance(cell, Cell)
        fan = cell.fans[origin]
        assert isinstance(fan, Fan)
        return fan.tensor(to - origin - 1, str(chosen[edge]), *rest)

    def units(self) -> list[Unit]:
        """The stem, every edge of every cell, the blocks between stages, and the head."""
        out = [Unit("stem", ())]
        for stage in range(1, 4):
            if stage > 1:
                out.append(Unit(f"reduce{stage - 1}", ()))
            for index in range(self.cells):
                out += [Unit(f"stage{stage}.{index}.{name}", (name,)) for name in SPACE.names]
        return [*out, Unit("head", ())]

    def unit(
        self, name: str, candidate: Mapping[str, Option]
    ) -> tuple[nn.Module, tuple[int, ...]] | None:
        """One piece as a plain module and the shape of its input; None for "none" and the like."""
        chosen, names = self._checked(candidate), [unit.name for unit in self.units()]
        self._refuse_partial()
        if name not in names:
            raise SpaceError(unknown("unit", name, names))
        place, _, edge = name.partition(".")
        if place == "stem":
            return copy.deepcopy(self.stem), self.shape
        if place == "head":
            return copy.deepcopy(self.head), self._size(2)
        if place.startswith("reduce"):
            return plain(self.get_submodule(name), chosen), self._size(int(place[-1]) - 1)
        stage, edge = int(place[-1]) - 1, edge.partition(".")[2]
        if chosen[edge] in ("none", "skip_connect"):
            return None
        with torch.device("meta"):
            layers = OrderedDict(_operator(str(chosen[edge]), self.channels * 2**stage))
        module = nn.Sequential(layers)
        _fill(module, lambda rest: self._tensor(f"{name}.{rest}", chosen))
        return module.train(self.training), self._size(stage)

    def _size(self, stage: int) -> tuple[int, ...]:
        """The shape of the images in a stage; an odd side rounds up when it is halved."""
        sides = (-(-side // 2**stage) for side in self.shape[1:])
        return (self.channels * 2**stage, *sides)


def _fill(network: nn.Module, source: Any) -> None:
    """Gives a network of the meta device copies of the tensors that `source(name)` names."""
    found = {name: source(name) for name in network.state_dict()}
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in found.items()
    }
    network.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(found[name].requires_grad)
