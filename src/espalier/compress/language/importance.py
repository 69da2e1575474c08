"""Which heads, inner units and hidden channels matter: scores on a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import (
    Anatomy,
    Attention,
    Experts,
    Feed,
    Layer,
    Weights,
    anatomy,
)
from espalier.errors import EspalierError, unknown
from espalier.train.running import device_of, evaluating

Importance = Literal["activation", "fluctuation", "norm", "taylor"]
IMPORTANCES = ("activation", "fluctuation", "norm", "taylor")
BATCH = 8


def head_scores(
    model: nn.Module, inputs: Tensor, kind: Importance = "activation"
) -> dict[str, Tensor]:
    """Layer's path -> (groups,) how much each group of heads matters; see `scores`."""
    return scores(model, inputs, kind)[0]


def unit_scores(
    model: nn.Module, inputs: Tensor, kind: Importance = "activation"
) -> dict[str, Tensor]:
    """Layer's path -> (units,) how much each inner unit of a feed-forward matters, (experts, units)
    in a mixture; see `scores`."""
    return scores(model, inputs, kind)[1]


def scores(
    model: nn.Module, inputs: Tensor, kind: Importance = "activation"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores of groups of heads and of inner units, by layer; higher stays longer.

    x_j is what channel j gives to the map behind it (attention's `out`, the feed-forward's `down`),
    W_j that map's column. `inputs` (n, ...) is what the model takes; passes are one for all layers.

    - "activation": mean of x_j^2 times |W_j|^2, what the sub-layer's output loses without it (Sun et
      al., A Simple and Effective Pruning Approach for LLMs, 2023, here by channel).
    - "fluctuation": variance of x_j times |W_j|^2 (An et al., Fluctuation-based Adaptive Structured
      Pruning for LLMs, 2023): what is lost where the mean is put into a bias.
    - "norm": |W_j|^2 times the squared norm of the weights that make x_j; reads no data.
    - "taylor": |sum over the column of weight times gradient| of the next token's loss, mean of
      batches (Molchanov et al., 2019; Ma, Fang & Wang, LLM-Pruner, 2023). Decoders only.

    Errors: `EspalierError` for an unknown kind.
    """
    if kind not in IMPORTANCES:
        raise EspalierError(unknown("importance", kind, IMPORTANCES))
    parts = anatomy(model)
    with torch.enable_grad() if kind == "taylor" else torch.no_grad():
        if kind == "norm":
            found = _by_norm(model, parts)
        elif kind == "taylor":
            found = _by_gradient(model, parts, inputs)
        else:
            found = _by_output(model, parts, inputs, kind)
    heads = {
        layer.path: _grouped(found[layer.path, "attention"], layer.attention).cpu()
        for layer in parts.layers
        if layer.attention is not None
    }
    units = {layer.path: found[layer.path, "feed"].cpu() for layer in parts.layers if layer.feed}
    return heads, units


def column_norms(weight: Tensor) -> Tensor:
    return weight.detach().double().square().sum(0)


def _grouped(channels: Tensor, attention: Attention | None) -> Tensor:
    assert attention is not None
    return channels.reshape(attention.groups, -1).sum(1)


Scores = dict[tuple[str, str], Tensor]


def _by_norm(model: nn.Module, parts: Anatomy) -> Scores:
    found: Scores = {}
    for layer, part, out in _ends(parts):
        made: list[Weights] = []
        if part == "attention":
            assert layer.attention is not None
            a = layer.attention
            rows = a.value.read(model).detach().double().square().sum(1)
            each = rows.reshape(a.groups, 1, a.head).expand(-1, a.heads // a.groups, -1)
            found[layer.path, part] = each.flatten() * column_norms(out.read(model))
            continue
        assert isinstance(layer.feed, Feed)
        made = [w for w in (layer.feed.up, layer.feed.gate) if w is not None]
        rows = torch.stack([w.read(model).detach().double().square().sum(1) for w in made]).sum(0)
        found[layer.path, part] = rows * column_norms(out.read(model))
    for layer, stacked in _mixtures(model, parts):
        gate, up = stacked.gate_up_proj.detach().double().square().sum(2).chunk(2, dim=1)
        down = stacked.down_proj.detach().double().square().sum(1)
        found[layer.path, "feed"] = (gate + up) * down
    return found


def _by_output(model: nn.Module, parts: Anatomy, inputs: Tensor, kind: str) -> Scores:
    sums: dict[tuple[str, str], list[Any]] = {}

    def add(key: tuple[str, str], x: Tensor, tokens: int) -> None:
        x = x.double()
        first, second = x.sum(-2).cpu(), x.square().sum(-2).cpu()
        before = sums.get(key, [0.0, 0.0, 0])
        sums[key] = [before[0] + first, before[1] + second, before[2] + tokens]

    def look(key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0].detach().flatten(0, -2)
            add(key, x, len(x))

        return hook

    def inside(key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            # an expert that a token is not sent to gives it 0
            x, chosen, share = args
            for e in range(len(module.down_proj)):
                rows, places = torch.where(chosen == e)
                gate, up = nn.functional.linear(x[rows], module.gate_up_proj[e]).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up * share[rows, places, None]
                each = torch.zeros(len(module.down_proj), 1, 1, dtype=torch.float64)
                each[e] = 1.0
                add(key, inner.double().cpu()[None] * each, len(x) if e == 0 else 0)

        return hook

    hooks = {out.path: look((layer.path, part)) for layer, part, out in _ends(parts)}
    for layer, _ in _mixtures(model, parts):
        assert isinstance(layer.feed, Experts)
        hooks[f"{layer.feed.path}.experts"] = inside((layer.path, "feed"))
    with hooked(model, hooks):
        passes(model, inputs)
    columns = {
        (layer.path, part): column_norms(out.read(model)).cpu() for layer, part, out in _ends(parts)
    }
    for layer, stacked in _mixtures(model, parts):
        columns[layer.path, "feed"] = stacked.down_proj.detach().double().square().sum(1).cpu()
    found = {}
    for key, (first, second, count) in sums.items():
        mean = first / count if kind == "fluctuation" else 0.0
        found[key] = (second / count - mean**2).clamp_min(0) * columns[key]
    return found


def _by_gradient(model: nn.Module, parts: Anatomy, inputs: Tensor) -> Scores:
    if not parts.decoder:
        raise EspalierError(
            f"importance 'taylor' needs the loss of a next token, and {parts.kind} has none: "
            "take 'activation'"
        )
    ends = {(layer.path, part): out for layer, part, out in _ends(parts)}
    tensors: dict[tuple[str, str], Tensor] = {
        key: cast(Tensor, model.get_submodule(out.path).weight) for key, out in ends.items()
    }
    for layer, stacked in _mixtures(model, parts):
        tensors[layer.path, "feed"] = stacked.down_proj
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    found: Scores = {}
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(any(parameter is t for t in tensors.values()))
        batches = torch.split(inputs, BATCH)
        for batch in batches:
            batch = batch.to(device_of(model))
            logits = cast(Any, model)(batch).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
            )
            grads = torch.autograd.grad(loss, list(tensors.values()))
            for (key, weight), grad in zip(tensors.items(), grads, strict=True):
                product = (weight.detach() * grad).double()
                if key in ends:  # (out, in), or the other way round
                    score = product.sum(1 if ends[key].flipped else 0).abs()
                else:
                    score = product.sum(1).abs()
                found[key] = found.get(key, torch.zeros(())) + score.cpu() / len(batches)
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)
    return found


def _ends(parts: Anatomy) -> Iterator[tuple[Layer, str, Weights]]:
    """Each sub-layer that is one of linear maps, with its last map."""
    for layer in parts.layers:
        if layer.attention is not None:
            yield layer, "attention", layer.attention.out
        if isinstance(layer.feed, Feed):
            yield layer, "feed", layer.feed.down


def _mixtures(model: nn.Module, parts: Anatomy) -> Iterator[tuple[Layer, Any]]:
    for layer in parts.layers:
        if isinstance(layer.feed, Experts):
            yield layer, model.get_submodule(f"{layer.feed.path}.experts")


def passes(model: Any, inputs: Tensor) -> None:
    """Run a model on inputs `(n, ...)`, a few at a time and without a cache, for hooks to look."""
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad(), evaluating(model):
        for batch in torch.split(inputs, BATCH):
            model(batch.to(device_of(model)), **cached)


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        for path, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
