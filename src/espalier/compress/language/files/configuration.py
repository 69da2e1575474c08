"""What a model's configuration can say about its shapes, and the configuration that says it.

A folder that plain `transformers` loads holds weights and a configuration, and the modules are made
from the configuration alone. So the test of a configuration is to make the modules from it, without
weights, and to compare them with those that are there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from espalier.compress.language.anatomy import Anatomy, Experts, Feed, Layer, anatomy
from espalier.errors import ExportError

_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# what a module computes by beside its tensors; each is made from the configuration
_NUMBERS = (
    *("scaling", "head_dim", "num_key_value_groups", "attention_head_size", "embed_scale"),
    *("scalar_embed_scale", "top_k", "norm_topk_prob", "sliding_window", "attn_logit_softcapping"),
    *("eps", "variance_epsilon", "is_causal", "do_layer_norm_before"),
)


def expressible(model: nn.Module) -> str | None:
    """None where a configuration of the model's architecture describes it as it is now; else why
    it does not: "layers differ in feed-forward width: 3 shapes (48, 40, 32)"."""
    try:
        expressed(model)
    except ExportError as error:
        return str(error)
    return None


def expressed(model: Any) -> Any:
    """The configuration (a copy) from which `transformers` makes the model's modules as they are.

    Layers that add nothing are left out of it: see `idle`. Errors: `ExportError`, the reason.
    """
    own, gone = anatomy(model), idle(model)
    layers = [layer for i, layer in enumerate(own.layers) if i not in gone]
    config = copy.deepcopy(model.config)
    if (attends := getattr(config, "_attn_implementation", None)) not in (None, *_ATTENTION):
        raise ExportError(f"attention runs by {attends!r}, which is not part of transformers")
    for name, value in _fields(model, own, layers, gone).items():
        setattr(config, name, value)
    try:
        config.validate()
    except Exception as error:  # whatever transformers' own rules on sizes say
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"transformers refuses its configuration: {first}") from error
    config.architectures = [type(model).__name__]
    _compare(model, _skeleton(model, config), own, gone)
    return config


def idle(model: Any) -> tuple[int, ...]:
    """The layers that pass their input on unchanged, as both sub-layers were dropped. In models
    that normalise behind the sums (BERT, OPT-350m) only those that have no weights at all."""
    own = anatomy(model)
    behind = own.kind == "bert" or not getattr(model.config, "do_layer_norm_before", True)
    found = []
    for i, layer in enumerate(own.layers):
        if layer.attention is None and layer.feed is None:
            weights = next(model.get_submodule(layer.path).parameters(), None)
            if weights is None or not behind:
                found.append(i)
    return tuple(found if len(found) < len(own.layers) else found[:-1])


def _fields(model: Any, own: Anatomy, layers: list[Layer], gone: tuple[int, ...]) -> dict[str, Any]:
    """The configuration's fields that follow from the shapes. Errors: `ExportError`, the reason."""
    for layer in layers:
        for part, name in ((layer.attention, "attention"), (layer.feed, "feed-forward")):
            if part is None:
                raise ExportError(f"{layer.path} has no {name}, the others have")
    attends = [layer.attention for layer in layers if layer.attention is not None]
    fields: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "hidden_size": own.width,
        "num_attention_heads": _one("heads", (a.heads for a in attends)),
    }
    if own.head is not None:
        fields["tie_word_embeddings"] = own.tied
    groups = _one("key-value heads", (a.groups for a in attends))
    head = _one("channels of a head", (a.head for a in attends))
    if own.vocabulary:
        fields["vocab_size"] = own.vocabulary
    if own.kind == "opt":
        fields["word_embed_proj_dim"] = model.get_input_embeddings().weight.shape[1]
    if hasattr(model.config, "num_key_value_heads"):
        fields["num_key_value_heads"] = groups
    if own.kind not in ("gpt2", "opt", "bert"):
        if (
            getattr(model.config, "head_dim", None)
            or head * fields["num_attention_heads"] != own.width
        ):
            fields["head_dim"] = head
    elif head * fields["num_attention_heads"] != own.width:
        raise ExportError(
            f"{own.kind} splits its width of {own.width} among its heads, and the model has "
            f"{fields['num_attention_heads']} heads of {head} channels"
        )
    types = getattr(model.config, "layer_types", None)
    if types:
        fields["layer_types"] = [t for i, t in enumerate(types) if i not in gone]
    return fields | _widths(own, layers)


def _widths(own: Anatomy, layers: list[Layer]) -> dict[str, Any]:
    dense = [(i, layer.feed) for i, layer in enumerate(layers) if isinstance(layer.feed, Feed)]
    mixed = [layer.feed for layer in layers if isinstance(layer.feed, Experts)]
    fields: dict[str, Any] = {}
    if dense:
        name = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(own.kind, "intermediate_size")
        fields[name] = _one("feed-forward width", (feed.width for _, feed in dense))
    if not mixed:
        return fields
    mixtral = own.kind == "mixtral"
    fields["num_local_experts" if mixtral else "num_experts"] = _one(
        "experts", (feed.count for feed in mixed)
    )
    fields["num_experts_per_tok"] = _one("experts a token", (feed.active for feed in mixed))
    width = "moe_intermediate_size" if own.kind.startswith("qwen") else "intermediate_size"
    fields[width] = _one("width of experts", (feed.width for feed in mixed))
    if own.kind.startswith("qwen"):  # they may leave layers dense
        fields |= {"mlp_only_layers": [i for i, _ in dense], "decoder_sparse_step": 1}
    if own.kind == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = _one(
            "width of the shared expert",
            (feed.shared.width if feed.shared else 0 for feed in mixed),
        )
    return fields


def _one(what: str, values: Iterable[int]) -> int:
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        shown = ", ".join(map(str, found[:6])) + (", ..." if len(found) > 6 else "")
        raise ExportError(f"layers differ in {what}: {len(found)} shapes ({shown})")
    return found[0]


def _skeleton(model: Any, config: Any) -> nn.Module:
    """The modules that the configuration makes, without memory for weights."""
    try:
        with torch.device("meta"):
            made: nn.Module = type(model)(copy.deepcopy(config))
    except Exception as error:  # whatever transformers says about sizes that do not go together
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"transformers makes no {type(model).__name__} of these sizes: {first}"
        ) from error
    return made


def _compare(model: Any, made: nn.Module, own: Anatomy, gone: tuple[int, ...]) -> None:
    names = renumbered(own, gone)
    there = {names(name): tuple(t.shape) for name, t in model.state_dict().items() if names(name)}
    wanted = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    for name in (*wanted, *there):
        if there.get(name) != wanted.get(name):
            raise ExportError(
                f"the configuration makes {name} {wanted.get(name, 'absent')}, the model has it "
                f"{there.get(name, 'absent')}"
            )
    modules = {names(path): module for path, module in model.named_modules() if names(path)}
    for path, module in made.named_modules():
        for number in _NUMBERS if path else ():
            value = getattr(module, number, None)
            here = getattr(modules.get(path), number, value)
            if isinstance(value, int | float) and value != here:
                raise ExportError(f"the configuration makes {path}.{number} {value}, not {here}")


def renumbered(own: Anatomy, gone: tuple[int, ...]) -> Any:
    """name of a part -> its name where the layers `gone` are left out; '' for a part of these."""
    stack = own.layers[0].path.rpartition(".")[0] + "."

    def name(path: str) -> str:
        if not path.startswith(stack) or not path[len(stack) :]:
            return path
        index, dot, rest = path[len(stack) :].partition(".")
        number = int(index)
        if number in gone:
            return ""
        return f"{stack}{number - sum(g < number for g in gone)}{dot}{rest}"

    return name
