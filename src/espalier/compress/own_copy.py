"""A user's model as a plain copy of what it computes in evaluation."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from espalier.errors import EspalierError


def own_copy(model: nn.Module) -> nn.Module:
    """A copy on the processor, in evaluation mode, with weights where some were made from others.

    A weight that a parametrisation, a norm or a mask makes at every pass is what it is now. A
    compiled model is the module that was compiled; values kept from a pass are kept without their
    history. Errors: `EspalierError` for what is no module or can't be copied.
    """
    found: Any = getattr(model, "_orig_mod", model)
    if isinstance(found, type) or not isinstance(found, nn.Module):
        raise EspalierError(f"a model is a torch module, got {type(model).__name__}")
    if "ScriptModule" in [kind.__name__ for kind in type(found).__mro__]:
        raise EspalierError("a scripted model can't be changed: give the module it was made from")
    try:
        made = copy.deepcopy(found, _without_history(found)).cpu().eval()
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EspalierError(f"{type(found).__name__} can't be copied: {first}") from error
    for module in list(made.modules()):
        module._compiled_call_impl = None
        _bake(module)
    return made


def _without_history(model: nn.Module) -> dict[int, Any]:
    """What a deep copy takes for tensors that it can't copy: those with a history."""
    kept = (v for m in model.modules() for v in tree_leaves(list(vars(m).values())))
    held = [v for v in kept if isinstance(v, Tensor) and not v.is_leaf]
    return {id(v): v.detach().clone() for v in held}


def _bake(module: nn.Module) -> None:
    """Make what is made at every pass a weight of its own, in place."""
    if parametrize.is_parametrized(module):
        # what is removed goes from the class as well, which the copy shares with its model
        kind = type(module)
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, str(name))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
