"""Binary gates: one path in memory, two compared (ProxylessNAS, Cai et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic import Gates
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.train.loop import Diverged

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture


class BinaryGates(Relaxation):
    """Weights learn along one sampled path; the architecture compares two sampled options a decision.

    In an architecture step two options are drawn without replacement by their probabilities, and one
    of the two, by its share of theirs, runs. The gradient of the loss for both gates gives that of
    both logits, through the softmax over the two alone. After the step only these two logits have
    changed, and such that together they are as probable as before: so the probabilities of the other
    options stay as they were. Terms (expected cost) reach the sampled logits the same way.
    Depths and sizes, of which none can stand idle, run both options with the shares as weights.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[int, int]] = {}
        self._sizes: set[str] = set()

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """Logits as of every relaxation."""
        self._pairs, self._sizes = {}, _sizes(supernet, names)
        return super().start(supernet, names, generator)

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """One path, one path with an idle rival, or the probabilities, by the phase."""
        if moment.generator is None or moment.phase == "evaluate":
            return dict(self.probabilities(logits))
        chances = _chances(logits)
        if moment.phase == "weights":
            return {
                name: _one_hot(found, int(torch.multinomial(p, 1, generator=moment.generator)))
                for (name, found), p in zip(logits.items(), chances, strict=True)
            }
        return self._two(logits, chances, moment.generator)

    def _two(
        self, logits: Logits, chances: tuple[Tensor, ...], generator: torch.Generator
    ) -> Mixture:
        out: dict[str, Tensor | Gates] = {}
        self._pairs = {}
        for (name, found), p in zip(logits.items(), chances, strict=True):
            if len(found) == 1:
                out[name] = _one_hot(found, 0)
                continue
            pair = torch.multinomial(p, 2, generator=generator)
            first = int(torch.multinomial(p[pair], 1, generator=generator))
            runs, rests = int(pair[first]), int(pair[1 - first])
            both = torch.softmax(torch.stack([found[runs], found[rests]]), 0)
            at = torch.tensor([runs, rests], device=found.device)
            self._pairs[name] = (runs, rests)
            if name in self._sizes:
                out[name] = torch.zeros_like(found).scatter_add(0, at, both)
                continue
            moved = both - both.detach()  # 0 in value, with the gradient of the two shares
            out[name] = Gates(_one_hot(found, runs).scatter_add(0, at, moved), (rests,))
        return out

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """Keeps the probabilities of the options that were not sampled."""
        with torch.no_grad():
            for name, pair in self._pairs.items():
                was, now = before[name], logits[name]
                at = torch.tensor(pair, device=now.device)
                moved = now[at]
                kept = torch.logsumexp(was[at], 0) - torch.logsumexp(moved, 0)
                now.copy_(was.index_copy(0, at, moved + kept))


def _chances(logits: Logits) -> tuple[Tensor, ...]:
    """The probabilities on the processor, brought there at once."""
    sizes = [len(found) for found in logits.values()]
    everything = torch.cat([found.detach() for found in logits.values()]).float().cpu()
    if not everything.isfinite().all():
        raise Diverged("the architecture's logits are not finite: lower its rate, arch_lr")
    parts = torch.split(everything, sizes)
    return tuple(torch.softmax(part, 0).clamp_(min=1e-12) for part in parts)  # two can be drawn


def _sizes(supernet: Any, names: Sequence[str]) -> set[str]:
    """Decisions for which the supernet takes no gates: of sizes and depths. It is left mixed."""
    found = set()
    for name in names:
        weights = torch.zeros(supernet.space[name].count)
        weights[-1] = 1.0
        try:
            supernet.mix({name: Gates(weights, tuple(range(len(weights) - 1))[:1])})
        except SpaceError:
            found.add(name)
    return found


def _one_hot(like: Tensor, index: int) -> Tensor:
    out = torch.zeros_like(like.detach())
    out[index] = 1.0
    return out
