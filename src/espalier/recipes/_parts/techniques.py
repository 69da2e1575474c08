"""Techniques that make byte models cheaper to train, to tune or to run, each made when asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.adapters.decisions import Adapters
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.cache.bits import pack, unpack
from espalier.compress.language.cache.plan import Plan
from espalier.compress.language.cache.policy import Policy
from espalier.compress.language.weights.places import places
from espalier.compress.language.weights.rounding import nearest
from espalier.recipes._parts import language


@dataclass(frozen=True)
class Scale:
    """Sizes of the byte model, steps of training where a technique is trained, and measurements."""

    sizes: Mapping[str, int]
    base_steps: int
    steps: int  # of each architecture
    tuning: int  # of each way to tune
    context: int
    rows: int
    repeats: int


class Packed(nn.Module):
    """A linear map whose weights lie in 4 or 8 bits, and are unpacked when it runs."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        made = nearest(layer.weight.detach(), None, bits)
        self.bits, self.inputs, self.block = bits, layer.in_features, made.block
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", pack((made.codes.int() + 2 ** (bits - 1)).byte(), bits))
        self.register_buffer("scales", made.scales)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes = unpack(self.codes, self.bits, self.inputs).float() - 2 ** (self.bits - 1)
        scales = self.scales.repeat_interleave(self.block, -1)[:, : self.inputs]
        return nn.functional.linear(x, codes * scales, self.bias)


@dataclass
class Case:
    """One technique: a model, the caches it generates with, and whether it is tuned or runs."""

    model: Any
    group: str
    cache: Callable[[], Any] | None = None
    tunes: bool = False


def packed(model: Any, bits: int) -> Any:
    """A copy with the linear maps of the blocks packed."""
    made = copy.deepcopy(model)
    for place in places(anatomy(made)).values():
        for path in place.modules:
            layer = made.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            made.set_submodule(path, Packed(layer, bits))
    return made


def cases(setting: Scale, out: Path | None, seed: int) -> dict[str, Callable[[], Case]]:
    """Every technique by name; a model is made when its technique's turn comes."""
    base = language.byte_model("dense", 0, setting.base_steps, out, **setting.sizes)

    def architecture(kind: language.Kind, **more: int) -> Case:
        model = language.byte_model(kind, seed, setting.steps, out, **{**setting.sizes, **more})
        return Case(model, "architecture")

    def tuned(choices: Mapping[str, Any], kinds: Sequence[str] = ("lora",)) -> Case:
        model = copy.deepcopy(base)
        if choices:
            cut = Adapters(("attention", "feed", "prefix"), kinds, widest=8, prefix=16)
            model = cut.bind(model, torch.zeros(1)).adapted(model, choices)
        else:
            model.requires_grad_(True)
        return Case(model, "tuning", tunes=True)

    def runs(change: Callable[[Any], Any], plan: Plan | None = None) -> Case:
        model = change(base)
        cache = None if plan is None else Policy.uniform(model, plan)
        return Case(model, "inference", cache)

    lora = {"adapter:attention": 0, "adapter:feed": 0}
    return {
        "attention: a key and value head each": partial(architecture, "dense", num_key_value_heads=4),
        "attention: grouped by 2": partial(architecture, "dense"),
        "attention: one key and value head": partial(architecture, "dense", num_key_value_heads=1),
        "experts: 8, 2 a token": partial(architecture, "experts", num_key_value_heads=2),
        "tuning: all weights": partial(tuned, {}),
        "tuning: LoRA": partial(tuned, lora),
        "tuning: DoRA": partial(tuned, lora, ("dora",)),
        "tuning: LoHa": partial(tuned, lora, ("loha",)),
        "tuning: prefix": partial(tuned, {"adapter:prefix": 0}),
        "running: float32": partial(runs, lambda m: m),
        "running: bfloat16": partial(runs, lambda m: copy.deepcopy(m).to(torch.bfloat16)),
        "running: weights in 8 bits": partial(runs, partial(packed, bits=8)),
        "running: weights in 4 bits": partial(runs, partial(packed, bits=4)),
        "running: cache in 4 bits": partial(runs, lambda m: m, Plan(bits=4, sinks=0, window=0, block=8)),
    }  # fmt: skip
