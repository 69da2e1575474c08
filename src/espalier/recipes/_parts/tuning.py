"""Tuning a byte model to another text: what the recipes on adapters share."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.recipes._parts import language, stories
from espalier.study import Study
from espalier.study.schema import NAME
from espalier.tasks.text import TextTask, text
from espalier.train.adamw import fit_adamw
from espalier.train.evaluate import evaluate


class Bytes(nn.Module):
    """A language model as the task of text wants it: bytes as floats `(b, context)` to logits of
    the byte after each, `(b, context * 256)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=x.long(), use_cache=False).logits
        return logits.flatten(1)


# Texts to tune to: three under ESPALIER_DATA, two made of the source that nothing was trained on.
DOMAINS: dict[str, Callable[[], bytes]] = {
    "shakespeare": lambda: stories.read_text("text", "tinyshakespeare", "input.txt.xz").encode(),
    "war and peace": lambda: stories.read_text(
        "text", "warandpeace", "warandpeace.txt.xz"
    ).encode(),
    "wikipedia": lambda: stories.read_text("text", "wikitext2_valid_test", "valid.txt.xz").encode(),
    "rot13": lambda: codecs.encode(_fresh(), "rot13").encode(),
    "swapped case": lambda: _fresh().swapcase().encode(),
}


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned: which base, how many steps of how many windows, at which rate.

    `base` are sizes of the byte model (none: the whole one) and `base_steps` its training; `held`
    are windows of validation, and as many of test.
    """

    domains: tuple[str, ...]
    base: Mapping[str, int] = field(default_factory=dict)
    base_steps: int = language.STEPS
    steps: int = 10
    batch: int = 8
    context: int = 64
    rate: float = 1e-2
    held: int = 64
    windows: int = 2000

    def model(self, out: Path | None) -> Any:
        """The byte model that is tuned, the same for every seed."""
        return language.byte_model("dense", 0, self.base_steps, out, **self.base)

    def task(self, domain: str, seed: int) -> TextTask:
        """Windows of a text; the split is drawn by the seed."""
        return text(DOMAINS[domain](), self.context, self.windows, self.held, self.held, seed)

    def fit(self, model: nn.Module, task: TextTask, seed: int) -> None:
        """Trains what requires a gradient, if anything does."""
        if any(p.requires_grad for p in model.parameters()):
            fit_adamw(Bytes(model), task, self.steps, seed, lr=self.rate, batch=self.batch)


def bits(model: nn.Module, task: TextTask, split: Any = "validation") -> float:
    """Bits per byte on a split."""
    return evaluate(Bytes(model), task, split, 32)["bits_per_byte"]


def study(folder: Path, identity: Mapping[str, Any], seed: int) -> Study:
    """A study in a folder: gone on with where it was begun."""
    plain = json.loads(json.dumps(dict(identity)))
    if (folder / NAME).exists():
        return Study.resume(folder, plain)
    return Study.create(folder, plain, seed=seed)


def memory_saved(run: Callable[[], Tensor], held: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without `held`."""
    known = {t.untyped_storage().data_ptr() for t in held}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            seen[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()  # its graph holds what was saved, so that no storage is counted twice
    del loss
    return sum(seen.values())


def _fresh() -> str:
    return language.byte_text("fresh").decode("latin-1")
