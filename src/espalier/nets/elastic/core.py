"""What every elastic module is: a module on which decisions act.

A module with several sizes holds the weights of the largest. `settle` says which part of them
`forward` runs; `plain` gives that part as a torch module of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Weights
from espalier.space import Decision, Option, Real

When = dict[str, tuple[Option, ...]]


class Maker(Protocol):
    """Makes plain copies under given choices: with the same weights, or with fresh ones."""

    choices: Choices
    fresh: bool

    def __call__(self, module: nn.Module) -> nn.Module: ...


class Elastic(nn.Module):
    """Base of the elastic modules. Its children, if any, are alternatives or repetitions.

    Own ones write `decisions`, `settle` and `plain`; those with children `branches`; those that
    can run a mixture of options `mix`. A mixture is neither copied nor pickled with the module.
    """

    _mixed: Any = None  # what `mix` made for `forward`; None: it runs what is settled
    _settled: Choices | None = None

    def __getstate__(self) -> dict[str, Any]:
        # weights that hang on an autograd graph can't be copied
        return {name: value for name, value in self.__dict__.items() if name != "_mixed"}

    def decisions(self) -> tuple[Decision, ...]:
        """The decisions that act here, not counting those inside children."""
        raise NotImplementedError

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        """The children, each with the options of this module's decision that make it run."""
        return iter(())

    def settle(self, choices: Choices) -> None:
        """Makes `forward` run what `choices` says. `choices` holds all of `decisions()`."""
        raise NotImplementedError

    def mixable(self) -> tuple[str, ...]:
        """The names of those of `decisions()` that `mix` takes."""
        if type(self).mix is Elastic.mix:
            return ()
        return tuple(d.name for d in self.decisions() if not isinstance(d, Real))

    def mix(self, weights: Mapping[str, Weights]) -> None:
        """Makes `forward` run a mixture, until `settle`: weights by name of decision.

        `weights` holds some of `decisions()`; the others stay as settled. Own modules get at what
        runs by `mixing.resolve(weights, self.decisions())`.
        Errors: `SpaceError` where a decision can't be mixed.
        """
        raise SpaceError(
            f"{', '.join(map(repr, weights))} can't be mixed: {type(self).__name__} runs one option"
            " at a time; leave it out of the mixture, or write its mix()"
        )

    def _choices(self) -> Choices:
        """What is settled, or the last option of each decision where nothing is."""
        if self._settled is not None:
            return self._settled
        return {d.name: options(d)[-1] for d in self.decisions()}

    def plain(self, make: Maker) -> nn.Module:
        """A copy without elasticity of what `make.choices` says; `make` copies children."""
        raise NotImplementedError


def initialise(layer: nn.Module) -> None:
    """Fresh weights for one torch layer: Kaiming for convolutions (He et al., 2015).

    Other layers keep torch's own way. The fan is that of the inputs, which is also right for
    depthwise convolutions.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        return
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if reset is not None:
        reset()


def filled(
    layer: nn.Module, make: Maker, tensors: dict[str, Tensor], source: nn.Module
) -> nn.Module:
    """A torch layer made on the meta device, given copies of `tensors`, or fresh weights.

    Layers are made on the meta device because copying must not draw from the random generator.
    `source` is the elastic layer whose parameters say what is trainable.
    """
    device = next(iter(tensors.values())).device
    if make.fresh:
        layer.to_empty(device=device)
        initialise(layer)
    else:
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(source.get_parameter(name).requires_grad)
    return layer.train(source.training)
