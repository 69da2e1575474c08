"""Mixtures by softmax: of DARTS, and of sharpDARTS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from espalier.errors import EspalierError, SpaceError
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.train.schedules import Schedule, scheduled

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture


class Softmax(Relaxation):
    """Every option runs, weighted by softmax(logits / temperature) (DARTS, Liu et al., 2019)."""

    def __init__(self, temperature: Schedule | float = 1.0) -> None:
        self.temperature = scheduled(temperature)

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """Softmax of each decision's logits, at the temperature of the moment."""
        heat = heat_of(self.temperature, moment)
        if heat == 1:
            return {name: torch.softmax(found, 0) for name, found in logits.items()}
        return {name: torch.softmax(found / heat, 0) for name, found in logits.items()}


def heat_of(temperature: Schedule, moment: Moment) -> float:
    """The temperature of a moment. Errors: `EspalierError` where it is not above 0."""
    heat = temperature(moment.progress)
    if not heat > 0:
        raise EspalierError(
            f"a temperature must stay above 0, at {moment.progress:.0%} of the search it is {heat:g}"
        )
    return heat


class MaxWeight(Relaxation):
    """The likeliest option has weight 1, the others less: 1 - max(p) + p (sharpDARTS, Hundt et al., 2019).

    So the mixture's scale does not hang on how many options there are, and the likeliest learns as
    if it were alone. `inner` gives p.
    """

    def __init__(self, inner: Relaxation | None = None) -> None:
        self.inner = inner if inner is not None else Softmax()

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """The inner relaxation's weights, raised so that the largest is 1."""
        out = {}
        for name, found in self.inner.weights(logits, moment).items():
            if not isinstance(found, torch.Tensor):
                raise SpaceError(
                    f"MaxWeight needs a tensor of weights of {name!r} from the relaxation within it, "
                    "got gates: use one that runs every option"
                )
            out[name] = 1 - found.amax(-1, keepdim=True) + found
        return out
