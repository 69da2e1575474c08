"""Pieces timed as they stand in a network: behind another convolution, whose time is taken off.

A piece alone is timed too long: runtimes keep channels in blocks inside a network, and turn every
piece's input and output to and from that layout when it stands alone. So a piece is timed behind a
lead-in (with the block, less without: Puzzle; Bercovich et al., 2024):

    time(lead-in, piece) - time(lead-in) = piece + turn(its output) - turn(its input)

What a turn costs is found per shape from one and two lead-ins. It need not be exact: along a chain
each piece's output is the next one's input, and the turns cancel.

A piece of integers is timed behind a lead-in of integers and its output is kept whole, so that a
turn there is the conversion from float to integers and back. Where kinds meet the turns do not cancel:
families of both kinds have a piece for that (`costs.turn`), timed between two lead-ins.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
from torch import Tensor, nn

from espalier.costs.pace import TRIES, Pace
from espalier.costs.rows import unfolded
from espalier.costs.runtime import OnnxRuntime
from espalier.costs.turn import Turn
from espalier.export import deployed, to_onnx
from espalier.export.quantisers import Quantised, Quantiser, quantised

_UNSURE = 0.05  # a timing less certain than this is taken again
_BLOCK = 8  # with fewer channels nothing is blocked: images, grey or in colour
_KNOWN = 6  # turns that were timed before others are told by size
_LEAST = 1e-4  # ms; a small difference of two timings may come out at nothing


_Key = tuple[tuple[int, ...], bool]  # a shape, and whether it is of integers


class Stopwatch:
    """Times modules on a runtime, all at one pace (see `costs.pace`).

    `repeated` counts those that had to be timed again. Once it is made `brief`, nothing is timed again,
    and what a turn costs is told by the tensor's size, where turns of other sizes were timed.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        self._runtime = runtime
        self.pace = Pace(runtime)
        self._befores: dict[_Key, tuple[bytes, deque[float]]] = {}
        self._turns: dict[_Key, float] = {}
        self.repeated = 0
        self.brief = False

    def whole(self, network: nn.Module, x: Tensor) -> float:
        """Milliseconds of a whole network."""
        x = self._runtime.batched(x)
        return self._time(to_onnx(network, x, fast=True), x, least=0.02)

    def piece(self, module: nn.Module, x: Tensor) -> float:
        """Milliseconds that a piece adds to a network."""
        module, x = unfolded(module, self._runtime.batched(x))
        if isinstance(module, Turn):
            return max(self._between(x), _LEAST)
        with deployed(module):
            out = module(x)
        whole = _integers(module)
        if whole and _blocked(out):
            module = nn.Sequential(module, Quantiser())
        if not _blocked(x):
            both, before = self._time(to_onnx(module, x, fast=True), x), self.empty_ms
        else:
            lead_in = _lead_in(x, whole)
            model = nn.Sequential(lead_in, module)
            both = self._time(to_onnx(model, x, fast=True), x)
            before = self._before(_closed(lead_in, whole), x, whole)
        turned = self._turn(out, whole) - self._turn(x, whole)
        return max(both - before - turned, _LEAST)

    @property
    def empty_ms(self) -> float:
        """Milliseconds of a model that does nothing."""
        return self._before(nn.Identity(), torch.zeros(1, 1))

    def _before(self, module: nn.Module, x: Tensor, whole: bool = False) -> float:
        """Timed again beside every piece; the middle of the last three, so that one disturbance
        does no harm."""
        key = (tuple(x.shape), whole)
        if key not in self._befores:
            self._befores[key] = to_onnx(module, x, fast=True), deque(maxlen=3)
        model, last = self._befores[key]
        last.append(self._time(model, x))
        return statistics.median(last)

    def _turn(self, x: object, whole: bool = False) -> float:
        """Milliseconds to turn a tensor of this shape into blocks (or integers), or back: half of
        both."""
        if not isinstance(x, Tensor) or not _blocked(x):
            return 0.0
        key = (tuple(x.shape), whole)
        if key not in self._turns:
            known = [ms / math.prod(s) for (s, kind), ms in self._turns.items() if kind == whole]
            if self.brief and len(known) >= _KNOWN:
                return statistics.median(known) * x.numel()
            x = torch.zeros(x.shape)
            models = (
                _closed(nn.Sequential(*(_lead_in(x, whole) for _ in range(n))), whole)
                for n in (1, 2)
            )
            one, two = (self._time(to_onnx(m, x, fast=True), x, least=0.01) for m in models)
            # one: empty + turn + lead-in + turn back; two: a lead-in more
            self._turns[key] = max(0.0, (2 * one - two - self.empty_ms) / 2)
        return self._turns[key]

    def _between(self, x: Tensor) -> float:
        """Milliseconds between a layer of floats and one of integers on this shape, or back: the mean
        of both ways, over two layers of one kind."""
        if not _blocked(x):
            return 0.0
        plain, whole = _lead_in(x), _lead_in(x, whole=True)
        alike = nn.Sequential(plain, plain), _closed(nn.Sequential(whole, whole), True)
        apart = (
            _closed(nn.Sequential(plain, whole), True),
            nn.Sequential(_closed(whole, True), plain),
        )
        times = [self._time(to_onnx(m, x, fast=True), x, least=0.01) for m in (*apart, *alike)]
        return (times[0] + times[1] - times[2] - times[3]) / 2

    def _time(self, model: bytes, x: Tensor, least: float = 0.0) -> float:
        timing = self.pace.quick(model, x, least, tries=1 if self.brief else TRIES)
        if timing.spread > _UNSURE and not self.brief:
            self.repeated += 1
            again = self.pace.quick(model, x, max(least, 0.02))
            timing = min(timing, again, key=lambda t: t.spread)
        return timing.median_ms


def _blocked(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] >= _BLOCK and x.is_floating_point()


def _integers(module: nn.Module) -> bool:
    """Whether the piece computes on integers."""
    return any(isinstance(m, Quantised) and not m.block for m in module.modules())


def _lead_in(x: Tensor, whole: bool = False) -> nn.Module:
    """A cheap layer that leaves its output in the runtime's own layout, or in integers."""
    channels = x.shape[1]
    with torch.random.fork_rng(devices=[]):
        conv: nn.Module = nn.Conv2d(channels, channels, 1)
    return nn.Sequential(quantised(conv, 8) if whole else conv, nn.ReLU())


def _closed(module: nn.Module, whole: bool) -> nn.Module:
    return nn.Sequential(module, Quantiser()) if whole else module
