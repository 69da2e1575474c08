"""How many channels the hidden states of a transformer have, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from espalier.compress.cut import Cut
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.shape.channels import Narrowing, hidden_scores, narrows
from espalier.compress.language.shape.cut import BoundShape, Choices, stepped
from espalier.compress.language.shape.hidden import norm_scales
from espalier.compress.language.shape.surgery import keep_hidden
from espalier.space import ordinal


@dataclass(frozen=True)
class Hidden(Cut):
    """How many channels the hidden states have, in the whole model: "hidden:model".

    - `steps`, `multiple`, `widths`: as in `Units`, from half of the width on.
    - `calibration`: inputs, by default the example it is bound with. Channels stay by
      `channels.hidden_scores`; norms are scaled by `hidden.norm_scales`.
    - `compensate`: maps that read the hidden states take over what went, see `channels.Narrowing`.
    """

    kind: ClassVar[str] = "hidden"
    steps: int = 4
    multiple: int = 8
    widths: Sequence[int] | None = None
    compensate: bool = True
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def bind(self, model: nn.Module, example: Tensor) -> BoundHidden:
        """The hidden states of a model. Errors: `EspalierError`."""
        inputs = example if self.calibration is None else self.calibration
        return BoundHidden(self, model, inputs)


class BoundHidden(BoundShape):
    """The hidden width of one model."""

    def __init__(self, cut: Hidden, model: nn.Module, inputs: Tensor) -> None:
        width = anatomy(model).width
        given = cut.widths
        if given is None:
            given = [width // 2 + round(i * width / 2 / cut.steps) for i in range(cut.steps)]
        widths = stepped(width, cut.steps, cut.multiple, given)
        made = [ordinal("hidden:model", *widths)] if len(widths) > 1 else []
        leaves = [p for p, m in model.named_modules() if p and m._parameters]
        super().__init__(model, made, dict.fromkeys(leaves, ("hidden:model",)) if made else {})
        self.inputs = inputs
        self.order = torch.argsort(hidden_scores(model, inputs), stable=True)
        self.narrowing = None
        self.note = ""
        if cut.compensate and made:
            if narrows(model):
                self.narrowing = Narrowing(model, inputs)
            else:
                self.note = "too wide to compensate: channels go as they are"
        self._scales: dict[int, dict[str, float]] = {}

    def apply(self, model: nn.Module, choices: Choices) -> None:
        """Narrow the model. Norms' scales are measured on the bound model, once a width."""
        width = int(cast(int, choices.get("hidden:model", len(self.order))))
        if width == len(self.order):
            return
        kept = self.order[-width:].sort().values
        if width not in self._scales:
            self._scales[width] = norm_scales(self.model, kept, self.inputs)
        if self.narrowing is not None:
            self.narrowing.apply(model, kept)
        keep_hidden(model, kept, self._scales[width])
