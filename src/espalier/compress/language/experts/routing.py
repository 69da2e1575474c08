"""Who of a mixture's experts is used, and for how much: counted in one pass over some text."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Experts, anatomy
from espalier.errors import EspalierError
from espalier.train.running import device_of, evaluating

ORDERS = ("reap", "frequency", "soft")


@dataclass(frozen=True)
class Routing:
    """Of the n experts of one layer, over all tokens seen:

    - `frequency (n,)`: share of tokens that an expert gets.
    - `soft (n,)`: its mean probability in the router's softmax over all experts.
    - `reap (n,)`: mean over the tokens it gets of gate times the norm of its output; 0 where it gets
      none (Lasby et al., REAP the Experts, 2025, https://arxiv.org/abs/2510.13999).
    - `alike (n, n)`: cosine between the outputs of two experts on the same tokens, of a sample.
    """

    frequency: Tensor
    soft: Tensor
    reap: Tensor
    alike: Tensor


@dataclass
class _Sums:
    tokens: int
    hits: Tensor
    soft: Tensor
    size: Tensor
    products: Tensor

    def routing(self) -> Routing:
        norm = self.products.diagonal().clamp_min(1e-30).sqrt()
        return Routing(
            self.hits / self.tokens,
            self.soft / self.tokens,
            self.size / self.hits.clamp_min(1),
            self.products / norm / norm[:, None],
        )


@torch.no_grad()
def routing(
    model: nn.Module, windows: Tensor, *, batch: int = 16, sample: int = 256
) -> dict[str, Routing]:
    """Layer (its path) -> how its experts are used on `windows (n, t)`.

    `sample`: tokens of each batch on which all experts are run, to see who are alike.
    Errors: `EspalierError` where the model has no mixture.
    """
    found = {
        layer.path: layer.feed for layer in anatomy(model).layers if isinstance(layer.feed, Experts)
    }
    if not found:
        raise EspalierError(f"{type(model).__name__} has no mixture of experts")
    sums: dict[str, _Sums] = {}
    with evaluating(model), ExitStack() as stack:
        for path, mixture in found.items():
            watch = _Watch(path, mixture.count, sums, sample)
            for name, hook in ((mixture.router, watch.router), (f"{mixture.path}.experts", None)):
                module = model.get_submodule(name)
                if hook is None:
                    handle = module.register_forward_pre_hook(watch.experts)
                else:
                    handle = module.register_forward_hook(hook)
                stack.callback(handle.remove)
        for rows in torch.split(windows, batch):
            model(rows.to(device_of(model)), use_cache=False)
    return {path: own.routing() for path, own in sums.items()}


class _Watch:
    """Adds up what one layer's router and experts are given."""

    def __init__(self, path: str, count: int, sums: dict[str, _Sums], sample: int) -> None:
        hits, soft, size = torch.zeros(3, count, dtype=torch.double)
        products = torch.zeros(count, count, dtype=torch.double)
        self.sums = sums[path] = _Sums(0, hits, soft, size, products)
        self.sample = sample

    def router(self, module: nn.Module, args: Any, output: Any) -> None:
        """Probabilities, from the logits."""
        self.sums.soft += output[0].double().softmax(-1).sum(0).cpu()

    def experts(self, module: Any, args: Any) -> None:
        """Counts, and sizes of the experts' outputs."""
        hidden, index, gates = args
        self.sums.tokens += len(hidden)
        for expert in range(len(self.sums.hits)):
            rows, at = torch.where(index == expert)
            size = expert_output(module, expert, hidden[rows]).double().norm(dim=-1)
            self.sums.hits[expert] += len(rows)
            self.sums.size[expert] += float((size * gates[rows, at].double()).sum())
        step = max(1, len(hidden) // self.sample)
        some = [expert_output(module, e, hidden[::step]) for e in range(len(self.sums.hits))]
        flat = torch.stack(some).double().flatten(1).cpu()
        self.sums.products += flat @ flat.T


def expert_output(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What one of the stacked experts gives for `x (tokens, hidden)`, without its gate."""
    first, second = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    made: Tensor = (experts.act_fn(first) * second) @ experts.down_proj[expert].T
    return made
