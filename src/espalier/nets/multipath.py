"""A family of MobileNets where each block is one of several complete operators, each with its own weights.

The search space of ProxylessNAS (Cai, Zhu & Han, 2019) and FBNet (Wu et al., 2019): inverted
residuals that differ in kernel and expansion, and where the shapes allow it nothing at all. Widths
and strides are fixed. Differs from both in its sizes, which are made for small images, and in that
the activation is ReLU throughout, as in `MobileNet`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from espalier.errors import SpaceError
from espalier.nets.blocks import Options, conv_norm, strides, whole
from espalier.nets.elastic import Linear, OneOf, Repeat
from espalier.nets.mobilenet import HEAD, STEM, WIDTHS, InvertedResidual
from espalier.nets.supernet import Supernet
from espalier.space import Option, choice

SKIP = "skip"


class MultiPath(Supernet):
    """MobileNets for images `(channels, height, width)` made of one operator a block.

    Decisions: `stageN.I.op`, among "k3e3", "k3e6", "k5e3", ... and, where input and output are
    alike, "skip", which passes the input on.

    - `kernels`: odd. `expansions`: inner width over outer, from 1.
    - `depth`: blocks a stage, one number for all or one a stage.
    - `zero`: whether blocks can be skipped.
    - `stem`, `head`, `widths` (one a stage): channels. By default they suit the size of the image.

    Errors: `SpaceError`, `DataError`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        kernels: Sequence[int] = (3, 5),
        expansions: Sequence[int] = (3, 6),
        depth: int | Sequence[int] = 2,
        zero: bool = True,
        *,
        stem: int | None = None,
        widths: Sequence[int] | None = None,
        head: int | None = None,
    ) -> None:
        super().__init__(shape, classes)
        operators = {f"k{kernel}e{e}": (kernel, e) for kernel, e in _pairs(kernels, expansions)}
        frame = Frame(self.shape, depth, stem, widths, head)
        self.stem = conv_norm(self.shape[0], frame.stem, 3, frame.stem_stride)
        for name, places in frame.stages():
            blocks = [_block(place, operators, zero) for place in places]
            self.add_module(name, Repeat(len(blocks), blocks.__getitem__))
        self.head = classifier(frame.widths[-1], frame.head, self.classes)


@dataclass(frozen=True)
class Place:
    """Where a block stands: its name, its channels and its stride."""

    name: str
    inputs: int
    outputs: int
    stride: int

    @property
    def residual(self) -> bool:
        """Whether input and output are alike: then the input is added, and may be all there is."""
        return self.stride == 1 and self.inputs == self.outputs


class Frame:
    """What is fixed of such a network: widths, depths and strides. Errors: `SpaceError`."""

    def __init__(
        self,
        shape: Sequence[int],
        depth: int | Sequence[int],
        stem: int | None,
        widths: Sequence[int] | None,
        head: int | None,
    ) -> None:
        self.stem_stride, self.strides = strides(shape)
        count = len(self.strides)
        self.stem = _number("stem", _middle(STEM[count]) if stem is None else stem)
        given = [_middle(o) for o in WIDTHS[count]] if widths is None else list(widths)
        depths = [depth] * count if isinstance(depth, int) else list(depth)
        for name, found in (("widths", given), ("depth", depths)):
            if len(found) != count:
                raise SpaceError(f"{name} needs one number a stage, {count} of them; got {found}")
        self.widths = [_number("widths", width) for width in given]
        self.depths = [_number("depth", number) for number in depths]
        self.head = _number("head", _middle(HEAD[count]) if head is None else head)

    def stages(self) -> Iterator[tuple[str, list[Place]]]:
        """Each stage's name and its blocks; the first block of a stage changes width and size."""
        ends = pairwise([self.stem, *self.widths])
        for index, (ways, stride, depth) in enumerate(
            zip(ends, self.strides, self.depths, strict=True), 1
        ):
            name, (inputs, outputs) = f"stage{index}", ways
            first = Place(f"{name}.0", inputs, outputs, stride)
            rest = [Place(f"{name}.{i}", outputs, outputs, 1) for i in range(1, depth)]
            yield name, [first, *rest]


def _pairs(kernels: Sequence[int], expansions: Sequence[int]) -> list[tuple[int, int]]:
    """Every kernel with every expansion, the largest last."""
    found = {"kernels": sorted(set(kernels)), "expansions": sorted(set(expansions))}
    for name, numbers in found.items():
        if not numbers:
            raise SpaceError(f"{name} needs at least one option, got none")
        for number in numbers:
            _number(name, number)
            if name == "kernels" and number % 2 == 0:
                raise SpaceError(f"kernels must be odd, got {number}: an even one moves the image")
    return [(k, e) for e in found["expansions"] for k in found["kernels"]]


def _middle(options: Options) -> int:
    return int(options[len(options) // 2])


def _number(name: str, value: int) -> int:
    found = whole(name, value)
    assert isinstance(found, int)
    return found


def _block(place: Place, operators: dict[str, tuple[int, int]], zero: bool) -> nn.Module:
    options: dict[Option, nn.Module] = {}
    if zero and place.residual:
        options[SKIP] = nn.Identity()
    for name, (kernel, expansion) in operators.items():
        options[name] = InvertedResidual(
            place.inputs, place.outputs, kernel, expansion, place.stride, place.residual
        )
    if len(options) == 1:
        return next(iter(options.values()))
    return OneOf(choice(f"{place.name}.op", *options), options)


def classifier(inputs: int, width: int, classes: int) -> nn.Sequential:
    """The end of the network: mixed channels, averaged over the image, to logits."""
    layers: list[tuple[str, nn.Module]] = [
        *conv_norm(inputs, width).named_children(),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", Linear(width, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))
