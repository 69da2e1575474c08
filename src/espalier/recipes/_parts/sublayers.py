"""Running a decoder without some of its sub-layers, nothing of it changed.

Of decoders whose sub-layers add to the hidden states behind a norm of their own (Llama, Mixtral).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from espalier.compress.language.anatomy import Layer, anatomy

Unit = tuple[int, Literal["attention", "feed"]]  # the layer, and which part of it
_ROWS = 16  # windows run at once


def units(model: Any) -> dict[Unit, int]:
    """Every sub-layer in the order in which they run, with its number of weights."""
    out: dict[Unit, int] = {}
    for i, layer in enumerate(anatomy(model).layers):
        for part, found in (("attention", layer.attention), ("feed", layer.feed)):
            if found is not None:
                module = model.get_submodule(found.path)
                out[i, part] = sum(p.numel() for p in module.parameters())  # type: ignore[index]
    return out


@contextmanager
def without(model: Any, gone: Sequence[Unit]) -> Iterator[None]:
    """Within it these sub-layers add nothing."""
    layers = anatomy(model).layers
    with ExitStack() as stack:
        for layer, part in gone:
            module = _module(model, layers[layer], part)
            module.forward = _nothing_two if part == "attention" else _nothing
            stack.callback(module.__dict__.pop, "forward")
        yield


def _module(model: Any, layer: Layer, part: str) -> Any:
    found = layer.attention if part == "attention" else layer.feed
    assert found is not None
    return model.get_submodule(found.path)


def _nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _nothing_two(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


class Resumed:
    """Logits of the same windows again and again, from the first layer that differs on."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self._blocks = [model.get_submodule(layer.path) for layer in anatomy(model).layers]
        self._inputs: dict[int, Tensor] = {}

    @torch.no_grad()
    def keep(self, gone: Sequence[Unit] = ()) -> Tensor:
        """Runs without some sub-layers, and keeps what every layer reads. The logits."""
        with ExitStack() as stack:
            for i, block in enumerate(self._blocks):
                taken = block.register_forward_pre_hook(self._taker(i), with_kwargs=True)
                stack.callback(taken.remove)
            with without(self.model, gone):
                return self._run()

    def _taker(self, i: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[i] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def logits(self, gone: Sequence[Unit]) -> Tensor:
        """Without these; those below the last one's layer must be what `keep` ran without."""
        first = gone[-1][0]
        kept = self._inputs[first]

        def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return kept

        with ExitStack() as stack, without(self.model, [u for u in gone if u[0] >= first]):
            for block in self._blocks[:first]:
                block.forward = same
                stack.callback(block.__dict__.pop, "forward")
            return self._run()

    def _run(self) -> Tensor:
        found: Tensor = self.model(self.ids, use_cache=False).logits
        return found


def divergence(logits: Tensor, other: Tensor) -> float:
    """Jensen and Shannon's, of next-token distributions, in nats; the mean over all places."""
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    middle = ((p + q) / 2).clamp_min(1e-30).log()
    both = [(t * (t.clamp_min(1e-30).log() - middle)).sum(-1).mean() for t in (p, q)]
    return float(both[0] + both[1]) / 2


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Cross entropy of the next token in nats, over windows `(n, t)`."""
    total = 0.0
    for part in torch.split(ids, _ROWS):
        logits = model(part, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(ids)


def bits(model: Any, ids: Tensor) -> float:
    """Bits per token; of byte models, per byte."""
    return loss(model, ids) / math.log(2)


@torch.no_grad()
def influence(model: Any, ids: Tensor) -> tuple[dict[Unit, float], list[float]]:
    """How far a sub-layer turns the hidden states, 1 - cosine of before and after: of each
    sub-layer, and of whole blocks (block influence: Men et al., ShortGPT, 2024)."""
    layers = anatomy(model).layers
    before: dict[int, Tensor] = {}
    blocks: list[float] = []
    parts: dict[Unit, float] = {}
    middle: dict[int, Tensor] = {}

    def started(i: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...]) -> None:
            before[i] = args[0]

        return hook

    def attended(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            middle[i] = before[i] + output[0]
            parts[i, "attention"] = _turned(before[i], middle[i])

        return hook

    def ended(i: int) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            blocks.append(_turned(before[i], after))
            parts[i, "feed"] = _turned(middle.get(i, before[i]), after)

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            block = model.get_submodule(layer.path)
            stack.callback(block.register_forward_pre_hook(started(i)).remove)
            if layer.attention is not None:
                module = model.get_submodule(layer.attention.path)
                stack.callback(module.register_forward_hook(attended(i)).remove)
            stack.callback(block.register_forward_hook(ended(i)).remove)
        model(ids, use_cache=False)
    return parts, blocks


def _turned(before: Tensor, after: Tensor) -> float:
    return 1.0 - float(cosine_similarity(before, after, dim=-1).mean())
