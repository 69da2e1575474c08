"""torch's encoders decide by themselves to run in one step: what a cut encoder can't do.

In evaluation they pass sentences of other lengths on as nested tensors, and read the weights of their
layers without calling them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.compress.coupling.labelling import evaluated, outputs
from espalier.compress.coupling.proof import close

ONE_STEP = "activation_relu_or_gelu"  # what an encoder layer decides by


def without_nesting(model: nn.Module, example: Tensor) -> None:
    """Padded inputs stay plain tensors in the encoders of a model, in place.

    Only where the model gives the same on the example: what an encoder makes of padded places, which
    nested tensors leave 0, is not the same.
    """
    nesting = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
    ]
    try:
        before = _given(model, example) if nesting else []
        for module in nesting:
            module.use_nested_tensor = False
        same = all(map(close, before, _given(model, example) if nesting else []))
    except Exception:  # what the model does not take is said where it is first run
        same = False
    for module in nesting:
        module.use_nested_tensor = not same


def _given(model: nn.Module, example: Tensor) -> list[Tensor]:
    with evaluated(model), torch.no_grad():
        return outputs(model(example))


def in_steps(holder: nn.Module) -> None:
    """An encoder layer of torch that calls its layers, whatever stands in their places; other
    modules stay as they are."""
    if isinstance(holder, nn.TransformerEncoderLayer):
        setattr(holder, ONE_STEP, 0)  # as for an activation that its one step does not know
