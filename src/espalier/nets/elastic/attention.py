"""Self-attention and bare parameters whose sizes are decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker
from espalier.nets.elastic.dims import Choices, Dim, decisions, ends, product, size, text
from espalier.nets.elastic.layers import Linear
from espalier.nets.elastic.masks import Spread, spread
from espalier.nets.elastic.mixing import Weights, no_gates, resolve
from espalier.space import Decision


class Attention(nn.Module):
    """Multi-head self-attention `(b, n, features) -> (b, n, features)` (Vaswani et al., 2017).

    `features` and `heads` are sizes; the width of one head is fixed, so fewer heads are the first
    ones of the most, and neither needs to divide the other.
    """

    def __init__(
        self,
        features: Dim,
        heads: Dim,
        head_width: int = 16,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_width, self.causal = head_width, causal
        inner = product(heads, head_width)
        self.query = Linear(features, inner, bias)
        self.key = Linear(features, inner, bias)
        self.value = Linear(features, inner, bias)
        self.project = Linear(inner, features, bias)
        # in a mixture of heads, what counts is how much of each head's values comes through
        self.query.masks = self.key.masks = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = torch.unflatten(x, -1, (-1, self.head_width))
        return heads.transpose(1, 2)


class Parameter(Elastic):
    """A tensor of weights with elastic sizes, as positions and class tokens are: `self.token()`.

    It starts from a normal distribution of standard deviation `std`, or from `start(tensor)`,
    which fills the tensor in place.
    """

    def __init__(
        self, *dims: Dim, std: float = 0.02, start: Callable[[Tensor], object] | None = None
    ) -> None:
        super().__init__()
        if not dims:
            raise SpaceError("elastic.Parameter needs at least one size, got none")
        self.dims, self.std, self.start = dims, std, start
        self.value = nn.Parameter(torch.empty([ends(dim)[1] for dim in dims]))
        self._cut = tuple(slice(n) for n in self.value.shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights."""
        self._fill(self.value)

    @torch.no_grad()
    def _fill(self, tensor: Tensor) -> None:
        if self.start is not None:
            self.start(tensor)
        else:
            nn.init.normal_(tensor, std=self.std)

    def decisions(self) -> tuple[Decision, ...]:
        return tuple(dict.fromkeys(d for dim in self.dims for d in decisions(dim)))

    def _window(self, choices: Choices) -> tuple[slice, ...]:
        return tuple(slice(size(dim, choices)) for dim in self.dims)

    def settle(self, choices: Choices) -> None:
        self.__dict__["_settled"] = choices
        if self._mixed is not None:
            self._mixed = None
        self._cut = self._window(choices)

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        self._mixed = tuple(spread(dim, found, self._choices()) for dim in self.dims)

    def _mixture(self, sizes: tuple[Spread, ...]) -> Tensor:
        """The masked tensor; with weights a sample, one for each, along a first dimension of 1."""
        out: Tensor = self.value[tuple(slice(each.size) for each in sizes)]
        batch = {len(part.weights) for each in sizes for part in each.parts if part.per_sample}
        if batch:
            out = out if self.dims[0] == 1 and out.dim() > 1 else out[None]
            out = out.expand(batch.pop(), *out.shape[1:])
        for dim, each in enumerate(sizes, -len(sizes)):
            out = each.masked(out, dim)
        return out

    def forward(self) -> Tensor:
        if self._mixed is not None:
            return self._mixture(self._mixed)
        return self.value[self._cut]

    def plain(self, make: Maker) -> nn.Module:
        copy = self.value[self._window(make.choices)].detach().clone()
        if make.fresh:
            self._fill(copy)
        return _Held(nn.Parameter(copy, requires_grad=self.value.requires_grad))

    def extra_repr(self) -> str:
        return ", ".join(text(dim) for dim in self.dims)


class _Held(nn.Module):
    """A parameter with a forward; tracing goes through it, so only the parameter is left."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value
