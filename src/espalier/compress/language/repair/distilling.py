"""A cut language model learns from the original: distillation, also through rounded weights.

The loss is the Kullback-Leibler divergence of the next token's distribution from the original's
(Hinton, Vinyals & Dean, 2015). Where weights are to be rounded, each pass runs on the rounded ones
and the gradient goes to those behind them (the straight-through estimator; Bengio, Leonard &
Courville, 2013), on levels that were set before.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.weights.places import places
from espalier.compress.language.weights.rounding import (
    BLOCK,
    HALF,
    Packed,
    largest,
    nearest,
    repack,
)
from espalier.errors import EspalierError
from espalier.train.running import device_of

Judge = Callable[[nn.Module], float]
_TOKENS = 2048  # in one step
_RATE = 0.06  # over the width of the hidden states: the largest learning rate
_CHECKS = 8  # times that the model is judged
_MOST = 3000  # steps, without a limit on time


@dataclass(frozen=True)
class Learned:
    """What a distillation did: the judged loss `before`, that of the best weights, which were put
    into the model, and a row for each time it was judged."""

    before: float
    best: float
    history: tuple[dict[str, float], ...]


def distil(
    model: Any,
    original: Any,
    windows: Tensor,
    judge: Judge,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    bits: Mapping[str, int] | None = None,
    block: int = BLOCK,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Learned:
    """Trains a model in place on windows `(n, t)` of token ids; the best judged weights stay.

    - `judge` gives a loss (to be small) of the model as it is, rounded where it will be.
    - `seconds` or `steps` end it, whichever is first; without both 3000 steps do.
    - `bits`: place (see `places`) -> bits that its weights will have, as in `WeightBits`: at the
      end they lie on the levels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _TOKENS // windows.shape[1])
    rounded = Rounded(model, bits or {}, block)
    # a step of 0 would leave a rounded model where it was: judged as it will be
    rounded.enter()
    before = judge(model)
    best, kept = before, _state(model)
    rounded.leave()
    limit = steps or (_MOST if seconds is None else 10**9)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=_RATE / anatomy(model).width,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    peak, history = optimiser.param_groups[0]["lr"], []
    started, done, checked = time.monotonic(), 0, 0
    order = torch.randperm(len(windows), generator=generator)
    while done < limit:
        share = _share(done, limit, started, seconds)
        if share >= 1:
            break
        optimiser.param_groups[0]["lr"] = peak * _slope(share)
        if len(order) < rows:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        batch, order = windows[order[:rows]].to(device_of(model)), order[rows:]
        loss = _step(model, original, batch, optimiser, rounded)
        done += 1
        if not math.isfinite(loss):
            break
        if progress is not None:
            progress(int(100 * share), 100, f"distillation: {loss:.4g}")
        if _share(done, limit, started, seconds) * _CHECKS >= checked + 1:
            checked = int(_share(done, limit, started, seconds) * _CHECKS)
            rounded.enter()
            found = judge(model)
            if found < best:
                best, kept = found, _state(model)
            rounded.leave()
            history.append({"step": float(done), "train": loss, "judged": found})
    model.load_state_dict(kept)
    return Learned(before, best, tuple(history))


def _share(done: int, limit: int, started: float, seconds: float | None) -> float:
    """How much of the training is over."""
    spent = 0.0 if seconds is None else (time.monotonic() - started) / max(seconds, 1e-9)
    return max(done / limit, spent)


def _slope(share: float) -> float:
    """A short warm-up, then a half cosine down to 0."""
    return min(share / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


def _step(
    model: Any, original: Any, batch: Tensor, optimiser: torch.optim.Optimizer, rounded: Rounded
) -> float:
    with torch.no_grad():
        wanted = log_softmax(original(input_ids=batch, use_cache=False).logits.float(), dim=-1)
    rounded.enter()
    made = log_softmax(model(input_ids=batch, use_cache=False).logits.float(), dim=-1)
    loss = kl_div(made.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    rounded.leave()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


class Rounded:
    """Weights of some places that are put on their levels and taken back; the levels are
    those that the weights are on now, or are fitted to them."""

    def __init__(self, model: nn.Module, bits: Mapping[str, int], block: int = BLOCK) -> None:
        found = places(anatomy(model), tables=True)
        self._views: list[tuple[Tensor, Tensor, int]] = []
        self._behind: list[Tensor] = []
        for name, own in bits.items():
            if own >= HALF or name not in found:
                continue
            place = found[name]
            if place.experts:
                views = list(place.read(model).values())
            else:
                views = [w.read(model) for w in place.weights]
            for view in views:
                packed = _levels(view.detach(), own, block)
                scales = packed.scales.repeat_interleave(block, -1)[..., : view.shape[-1]]
                self._views.append((view.detach(), scales.to(view.dtype), largest(own)))

    @torch.no_grad()
    def enter(self) -> None:
        """Put the weights on their levels; those behind them are remembered."""
        self._behind = [view.clone() for view, _, _ in self._views]
        for view, scales, most in self._views:
            view.copy_((view / scales).round().clamp(-most - 1, most) * scales)

    @torch.no_grad()
    def leave(self) -> None:
        """Take the weights behind them back."""
        for (view, _, _), behind in zip(self._views, self._behind, strict=True):
            view.copy_(behind)
        self._behind = []


def _levels(weight: Tensor, bits: int, block: int) -> Packed:
    """The levels that weights are on already, or those nearest to them."""
    try:
        return repack(weight, bits, block)
    except EspalierError:
        return nearest(weight, None, bits, block)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy to be trained, with gradients for all parameters."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin
