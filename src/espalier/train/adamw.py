"""Training of transformers: AdamW (Loshchilov & Hutter, 2019) with a warm-up and a half cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from espalier.tasks import Task
from espalier.train.loop import Diverged
from espalier.train.running import device_of
from espalier.train.seeds import generator, global_seed, mixed


def fit_adamw(
    network: nn.Module,
    task: Task,
    steps: int,
    seed: int,
    *,
    lr: float = 3e-3,
    batch: int = 32,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    after: int = 0,
    of: int | None = None,
) -> float:
    """Trains a network in place for `steps` batches; gives the mean loss of the last tenth.

    `lr` is the peak. With `of`, the steps are a part of a longer training of that many and come
    `after` its first ones: with its rates, and a shuffling of their own. The result is a function
    of the network, the task, the numbers given and torch's threads; it computes on the device that
    the network is on. Errors: `Diverged` when the loss is NaN.
    """
    chosen = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    last: list[float] = []
    device = device_of(network)
    network.train()
    total = steps if of is None else of
    own = mixed(seed, after) if after else seed
    with global_seed(own):
        for step, (x, y) in zip(range(steps), _passes(task, batch, own), strict=False):
            now = after + step
            rise = min(1.0, (now + 1) / max(warmup * total, 1))
            for group in optimiser.param_groups:
                group["lr"] = lr * rise * 0.5 * (1 + math.cos(math.pi * now / total))
            loss = task.loss(network(x.to(device)), y.to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimiser.step()
            if not math.isfinite(float(loss.detach())):
                raise Diverged(f"the loss is NaN in step {step + 1}: lower the rate, {lr:.3g}")
            if step >= 0.9 * steps - 1:
                last.append(float(loss.detach()))
    network.eval()
    return sum(last) / len(last)


def _passes(task: Task, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of train for ever, each pass in an order of its own."""
    epoch = 0
    while True:
        yield from task.batches("train", batch, generator(seed, epoch))
        epoch += 1
