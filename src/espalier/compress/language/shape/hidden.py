"""A narrower stream of hidden states: some of its channels stay, everywhere in the model at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, Experts, Feed, anatomy
from espalier.compress.language.importance import hooked, passes
from espalier.compress.language.shape.following import follow
from espalier.compress.language.shape.slicing import (
    Indices,
    aligned,
    indices,
    keep,
    keep_inputs,
    keep_outputs,
)
from espalier.errors import EspalierError

# maps outside of the layers that give hidden states, or what a map behind them reads as such
_WRITES = ("project_in", "transform.dense")


def keep_hidden(
    model: nn.Module, channels: Indices, scales: Mapping[str, float] | None = None
) -> None:
    """Keep some channels of the hidden states, in every layer, table and map that has them.

    A norm of fewer channels divides by another number. Its scale is multiplied by `scales[path]`,
    and where that is not given by the root of n/n' (n' of n channels kept): so a root mean square
    norm gives what it would give if the channels that went had been zero. `norm_scales` measures
    better ones on data. Tied tables stay tied. Gemma multiplies its embedding by the root of the
    width: the table takes up the difference, and where it is also the head, the last norm gives it
    back. Channels of heads stay as they are, so the width is no longer heads times channels.
    Errors: `EspalierError` for a channel that there is not, and for a map that is not known.
    """
    parts = anatomy(model)
    kept = indices(channels, parts.width, "channels")
    if len(kept) == parts.width:
        return
    if any(isinstance(layer.feed, Experts) for layer in parts.layers):
        aligned(model, len(kept), "hidden states of a mixture have")
    known: dict[int, list[tuple[Any, str]]] = {id(p): [] for p in model.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known[id(parameter)].append((module, name))
    default = math.sqrt(parts.width / len(kept))
    for path, norm in norms(model, parts):
        _keep_norm(norm, kept, (scales or {}).get(path, default))
    done = set(_within(model, parts, kept))
    _outside(model, parts, kept, done)
    for owners in known.values():
        first, name = owners[0]
        for other, its in owners[1:]:  # tied before, tied after
            setattr(other, its, getattr(first, name))
    _embed_scale(model, parts, len(kept))
    follow(model)


def norms(model: nn.Module, parts: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every norm over the hidden states; not those of queries and keys."""
    for path, module in model.named_modules():
        if "Norm" in type(module).__name__ and not path.endswith(("q_norm", "k_norm")):
            weight = module._parameters.get("weight")
            shape = getattr(module, "normalized_shape", None) if weight is None else weight.shape
            if shape is not None and tuple(shape) == (parts.width,):
                yield path, module


def norm_scales(model: nn.Module, channels: Indices, inputs: Tensor) -> dict[str, float]:
    """For `keep_hidden`: path of a norm -> what its scale is multiplied by, so that the channels
    kept come out as near as can be (least squares over tokens) to what they were.

    `inputs` (n, ...): what the model takes.
    """
    parts = anatomy(model)
    kept = indices(channels, parts.width, "channels")
    sums = {path: [0.0, 0.0] for path, _ in norms(model, parts)}

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).detach().double()
            less, full = _normalised(module, x[..., kept]), _normalised(module, x)[..., kept]
            sums[path][0] += float((less * full).sum())
            sums[path][1] += float(less.square().sum())

        return hook

    with hooked(model, {path: look(path) for path in sums}):
        passes(model, inputs)
    default = math.sqrt(parts.width / len(kept))
    return {path: a / b if b > 0 and a > 0 else default for path, (a, b) in sums.items()}


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + _eps(norm)).rsqrt()


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _keep_norm(norm: Any, kept: Tensor, scale: float) -> None:
    keep(norm, "weight", kept, 0)
    keep(norm, "bias", kept, 0)
    if norm.weight is not None:  # a norm without scale keeps a mean square of 1
        _scale(norm, scale)
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (len(kept),)


@torch.no_grad()
def _scale(norm: Any, scale: float) -> None:
    one = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma's scale is 1 + weight
    norm.weight.add_(one).mul_(scale).sub_(one)


def _within(model: nn.Module, parts: Anatomy, kept: Tensor) -> Iterator[str]:
    """Narrows what is in the layers; gives the paths of what it saw."""
    for layer in parts.layers:
        reads: list[str] = []
        writes: list[str] = []
        if layer.attention is not None:
            a = layer.attention
            reads += dict.fromkeys(w.path for w in (a.query, a.key, a.value))
            writes.append(a.out.path)
        feeds = [layer.feed]
        if isinstance(layer.feed, Experts):
            stacked: Any = model.get_submodule(f"{layer.feed.path}.experts")
            keep(stacked, "gate_up_proj", kept, 2)
            keep(stacked, "down_proj", kept, 1)
            stacked.hidden_dim = len(kept)
            router: Any = model.get_submodule(layer.feed.router)
            keep_inputs(router, kept)
            router.hidden_dim = len(kept)
            feeds = [layer.feed.shared]
            if layer.feed.shared is not None:
                reads.append(f"{layer.feed.path}.shared_expert_gate")
        for feed in feeds:
            if isinstance(feed, Feed):
                reads += [w.path for w in (feed.up, feed.gate) if w is not None]
                writes.append(feed.down.path)
                owner: Any = model.get_submodule(feed.path)
                if hasattr(owner, "hidden_size"):
                    owner.hidden_size = len(kept)
        for path in reads:
            keep_inputs(model.get_submodule(path), kept)
        for path in writes:
            keep_outputs(model.get_submodule(path), kept)
        block: Any = model.get_submodule(layer.path)
        if hasattr(block, "hidden_size"):
            block.hidden_size = len(kept)
        yield layer.path + "."


def _outside(model: nn.Module, parts: Anatomy, kept: Tensor, layers: set[str]) -> None:
    """Narrows tables, heads and what else is not in a layer."""
    for path, module in model.named_modules():
        if any(path.startswith(p) for p in layers):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 3:  # ViT's class token and positions
                keep(module, name, kept, 2)
        if isinstance(module, nn.Embedding):
            if module.embedding_dim == parts.width:
                keep_inputs(module, kept)
        elif isinstance(module, nn.Conv2d):
            keep_outputs(module, kept)
        elif isinstance(module, nn.Linear):
            own = "pooler.dense" if parts.kind == "bert" else "transform.dense"
            if path.endswith((*_WRITES, own)):
                keep_outputs(module, kept)
            if module.in_features == parts.width and not path.endswith("project_in"):
                keep_inputs(module, kept)
        elif any(parts.width in p.shape for p in module._parameters.values() if _matrix(p)):
            raise EspalierError(
                f"{path} ({type(module).__name__}) holds hidden states in a way that is not known: "
                "leave Hidden out of the decisions"
            )


def _matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() == 2


@torch.no_grad()
def _embed_scale(model: nn.Module, parts: Anatomy, kept: int) -> None:
    """Gemma's multiplier is the root of the width that a configuration says."""
    table: Any = model.get_submodule(parts.embedding)
    if not hasattr(table, "embed_scale"):
        return
    before, after = float(table.embed_scale), math.sqrt(kept)
    table.weight.mul_(before / after)
    table.embed_scale.fill_(after)
    if hasattr(table, "scalar_embed_scale"):
        table.scalar_embed_scale = after
    if parts.tied:
        base = cast(Any, model).base_model
        _scale(base.norm, after / before)
