"""The kinds of adapters on linear maps that `peft` has and we offer, and adding them into weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from espalier.errors import EspalierError, MissingExtra

_SCALE = 2  # what an adapter adds is multiplied by it, whatever the rank
Targets = Mapping[str, int]  # module path -> rank


def _lora(targets: Targets, **more: Any) -> Any:
    scaled = {name: _SCALE * rank for name, rank in _pattern(targets).items()}
    return library().LoraConfig(
        **_ranks(targets), lora_alpha=_SCALE * max(targets.values()), alpha_pattern=scaled, **more
    )


def _loha(targets: Targets) -> Any:
    scaled = {name: _SCALE * rank for name, rank in _pattern(targets).items()}
    return library().LoHaConfig(
        **_ranks(targets), alpha=_SCALE * max(targets.values()), alpha_pattern=scaled
    )


# kind -> its configuration, and its weights on a map of (outputs, inputs) at a rank
KINDS: dict[str, tuple[Callable[[Targets], Any], Callable[[int, int, int], int]]] = {
    "lora": (_lora, lambda out, inner, rank: rank * (out + inner)),
    "dora": (lambda t: _lora(t, use_dora=True), lambda o, i, rank: rank * (o + i) + o),
    "loha": (_loha, lambda out, inner, rank: 2 * rank * (out + inner)),
}


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters added into its own weights and their modules gone, in place.

    Errors: `EspalierError` for a prefix, which no weights can hold.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if type(model).__name__.startswith("PeftModel"):
        raise EspalierError(
            "a prefix can't be added into weights: save it with save_pretrained, and load it with "
            "peft.PeftModel.from_pretrained"
        )
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            tuned: Any = module
            tuned.merge()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, tuned.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _pattern(targets: Targets) -> dict[str, int]:
    return {re.escape(path): rank for path, rank in targets.items()}


def _ranks(targets: Targets) -> dict[str, Any]:
    return {
        "r": max(targets.values()),
        "target_modules": sorted(targets),
        "rank_pattern": _pattern(targets),
    }


def library() -> Any:
    """The library peft. Errors: `MissingExtra`."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "peft") from error
    return peft
