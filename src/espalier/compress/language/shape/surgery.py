"""Taking parts out of a transformer of `transformers`, in place: the model still runs, and caches.

Modules stay those of torch and transformers, with other shapes; the configuration follows where it
can say what the layers are. A layer is a number from 0, as the model is at the moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import (
    Anatomy,
    Attention,
    Experts,
    Feed,
    Layer,
    anatomy,
)
from espalier.compress.language.cache.plan import narrowed
from espalier.compress.language.cache.spans import PLAN
from espalier.compress.language.shape.following import follow
from espalier.compress.language.shape.hidden import keep_hidden as keep_hidden
from espalier.compress.language.shape.silent import hollow, silence
from espalier.compress.language.shape.slicing import (
    Indices,
    aligned,
    indices,
    keep,
    keep_inputs,
    keep_outputs,
)
from espalier.errors import EspalierError, unknown

Part = Literal["attention", "feed"]


def drop(model: nn.Module, layer: int, part: Part) -> None:
    """Leave out a sub-layer: it adds nothing to the hidden states. One that is gone stays gone.

    A norm that only fed it goes too; where norms follow the sums (BERT), they stay. The attentions
    that are left take the first places in the cache.
    Errors: `EspalierError` for a layer or a part that there is not.
    """
    parts = anatomy(model)
    if part not in ("attention", "feed"):
        raise EspalierError(unknown("part", part, ("attention", "feed")))
    at = _layer(parts, layer)
    if getattr(at, part) is not None:
        silence(model, parts, at, part)
        follow(model)


def empty_blocks(model: nn.Module, layers: Sequence[int]) -> None:
    """Make blocks hand on their input and hold nothing, each still in its place: paths of modules
    stay as they are until `drop_blocks` takes the empty ones out."""
    parts = anatomy(model)
    for layer in layers:
        hollow(model, parts, _layer(parts, layer))
    if layers:
        follow(model)


def drop_blocks(model: nn.Module, layers: Sequence[int]) -> None:
    """Take whole blocks out; those behind move up. Errors: `EspalierError` where none would stay."""
    parts = anatomy(model)
    gone = {parts.layers.index(_layer(parts, layer)) for layer in layers}
    if not gone:
        return
    if len(gone) == len(parts.layers):
        raise EspalierError(f"one of {len(gone)} blocks must stay, got all of them to drop")
    stay = [i for i in range(len(parts.layers)) if i not in gone]
    path = parts.layers[0].path.rpartition(".")[0]
    blocks = cast(nn.ModuleList, model.get_submodule(path))
    model.set_submodule(path, nn.ModuleList(blocks[i] for i in stay))
    config: Any = model.config
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in stay]
    follow(model)


def empty(model: nn.Module) -> list[int]:
    """The blocks that hold no weights: what `drop_blocks` can take out at no loss."""
    return [
        i
        for i, layer in enumerate(anatomy(model).layers)
        if next(model.get_submodule(layer.path).parameters(), None) is None
    ]


def keep_heads(model: nn.Module, layer: int, groups: Indices) -> None:
    """Keep some groups of an attention, whole: a key and value head with all its query heads.

    A norm over all heads (OLMoE's of queries and keys) sees fewer channels afterwards: its scale is
    multiplied by the root of (mean square of what is kept / of all), taken from the squared
    norms of the map's rows, so that heads come out about as large as before.
    Errors: `EspalierError` for a group that there is not, or a layer without attention.
    """
    at = _layer(anatomy(model), layer)
    attention = at.attention
    if attention is None:
        raise EspalierError(f"layer {layer} has no attention to keep heads of: it was dropped")
    chosen = indices(groups, attention.groups, "groups of heads")
    if len(chosen) == attention.groups:
        return
    each = attention.heads // attention.groups * attention.head
    query, key = channels(chosen, each), channels(chosen, attention.head)
    _norms(model, attention, query, key)
    fused = attention.query.path == attention.key.path
    if fused:
        parts = (attention.query, attention.key, attention.value)
        rows = torch.cat([w.start + query for w in parts])
        keep_outputs(model.get_submodule(attention.query.path), rows)
    else:
        keep_outputs(model.get_submodule(attention.query.path), query)
        for weights in (attention.key, attention.value):
            keep_outputs(model.get_submodule(weights.path), key)
    keep_inputs(model.get_submodule(attention.out.path), query)
    owner: Any = model.get_submodule(attention.query.path.rpartition(".")[0])
    heads = len(query) // attention.head
    for name, value in (
        ("num_heads", heads),
        ("num_attention_heads", heads),
        ("num_key_value_heads", len(chosen)),
        ("all_head_size", len(query)),
        ("split_size", len(query)),
    ):
        if hasattr(owner, name):
            setattr(owner, name, value)
    if (plan := getattr(owner, PLAN, None)) is not None:  # its cache keeps the same groups
        setattr(owner, PLAN, narrowed(plan, tuple(chosen.tolist())))
    follow(model)


def keep_units(model: nn.Module, layer: int, units: Indices) -> None:
    """Keep some inner units of a feed-forward: `units` (k,), or (experts, k) where each expert of
    a mixture keeps its own. A shared expert stays whole.

    Errors: `EspalierError` for a unit that there is not, or a layer without feed-forward.
    """
    feed = _layer(anatomy(model), layer).feed
    if isinstance(feed, Experts):
        _keep_expert_units(model, feed, units)
    elif feed is None:
        raise EspalierError(f"layer {layer} has no feed-forward to keep units of: it was dropped")
    else:
        _keep_feed_units(model, feed, indices(units, feed.width, "units"))
    follow(model)


def keep_experts(model: nn.Module, layer: int, experts: Indices) -> None:
    """Keep some experts of a mixture; the router no longer knows the others.

    A token gets no more experts than there are. Errors: `EspalierError` for an expert that there is
    not, or a layer without a mixture.
    """
    mixture = _mixture(model, layer)
    chosen = indices(experts, mixture.count, "experts")
    stacked, router = _experts(model, mixture)
    for name in ("gate_up_proj", "down_proj"):
        keep(stacked, name, chosen, 0)
    keep(router, "weight", chosen, 0)
    for module in (stacked, router):
        module.num_experts = len(chosen)
    if mixture.active > len(chosen):
        set_active(model, layer, len(chosen))
    follow(model)


def set_active(model: nn.Module, layer: int, k: int) -> None:
    """How many experts a token gets. Errors: `EspalierError` where there are not so many."""
    mixture = _mixture(model, layer)
    count = len(cast(Tensor, model.get_submodule(mixture.router).weight))
    if not 1 <= k <= count:
        raise EspalierError(f"a token gets 1 to {count} experts of layer {layer}, got {k}")
    for path in (mixture.router, mixture.path):
        module: Any = model.get_submodule(path)
        if hasattr(module, "top_k"):
            module.top_k = int(k)
    follow(model)


def channels(groups: Tensor, each: int) -> Tensor:
    """The channels (groups * each,) of groups that have `each` in a row."""
    return (groups[:, None] * each + torch.arange(each)).flatten()


def _layer(parts: Anatomy, layer: int) -> Layer:
    if not 0 <= layer < len(parts.layers):
        raise EspalierError(f"layers are 0 to {len(parts.layers) - 1}, got {layer}")
    return parts.layers[layer]


def _norms(model: nn.Module, attention: Attention, query: Tensor, key: Tensor) -> None:
    for name, weights, kept in (
        ("q_norm", attention.query, query),
        ("k_norm", attention.key, key),
    ):
        norm = getattr(model.get_submodule(attention.path), name, None)
        rows = weights.read(model).detach()
        if norm is None or len(norm.weight) != len(rows):
            continue  # a norm of each head by itself does not see the others
        squares = rows.double().square().sum(1)
        keep(norm, "weight", kept, 0)
        with torch.no_grad():
            norm.weight.mul_((squares[kept].mean() / squares.mean()).sqrt())


def _keep_feed_units(model: nn.Module, feed: Feed, chosen: Tensor) -> None:
    for weights in (feed.up, feed.gate):
        if weights is not None:
            keep_outputs(model.get_submodule(weights.path), chosen)
    keep_inputs(model.get_submodule(feed.down.path), chosen)
    owner: Any = model.get_submodule(feed.path)
    if hasattr(owner, "intermediate_size"):
        owner.intermediate_size = len(chosen)


def _keep_expert_units(model: nn.Module, mixture: Experts, units: Indices) -> None:
    given = torch.as_tensor(units, dtype=torch.long)
    rows = given if given.dim() == 2 else given.expand(mixture.count, -1)
    if len(rows) != mixture.count:
        raise EspalierError(
            f"units of {mixture.count} experts are a row each, got {len(rows)} rows"
        )
    own = [indices(row, mixture.width, "units") for row in rows]
    if len({len(row) for row in own}) != 1:
        raise EspalierError("experts of a layer keep equally many units each")
    aligned(model, len(own[0]), "experts keep")
    stacked, _ = _experts(model, mixture)
    with torch.no_grad():
        pairs = list(zip(own, stacked.gate_up_proj, strict=True))
        up = torch.stack([w[torch.cat([row, row + mixture.width])] for row, w in pairs])
        downs = zip(own, stacked.down_proj, strict=True)
        down = torch.stack([w[:, row] for row, w in downs])
    stacked.gate_up_proj = nn.Parameter(up, requires_grad=stacked.gate_up_proj.requires_grad)
    stacked.down_proj = nn.Parameter(down, requires_grad=stacked.down_proj.requires_grad)
    stacked.intermediate_dim = len(own[0])


def _mixture(model: nn.Module, layer: int) -> Experts:
    feed = _layer(anatomy(model), layer).feed
    if not isinstance(feed, Experts):
        raise EspalierError(f"layer {layer} has no mixture of experts")
    return feed


def _experts(model: nn.Module, mixture: Experts) -> tuple[Any, Any]:
    return model.get_submodule(f"{mixture.path}.experts"), model.get_submodule(mixture.router)
