"""What one step of a search on NAS-Bench-201 keeps in memory, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from espalier.solvers.relax import Moment, Softmax
from espalier.train.running import channels_last
from espalier.train.seeds import generator

if TYPE_CHECKING:
    from espalier.recipes._parts.nb201 import Method, Setting

_BATCH = 1  # purpose of a random stream


def step(method: Method, setting: Setting, seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A fresh supernet, and the forward pass of one of its weight steps, which gives the loss."""
    task = setting.task
    supernet = setting.supernet(task, seed, method.partial).train()
    relaxation = method.slots(setting).get("relaxation", Softmax())
    logits = relaxation.start(supernet, tuple(supernet.mixable), generator(seed))
    moment = Moment("weights", epoch=0, progress=0.0, generator=generator(seed, _BATCH))
    with torch.no_grad():
        supernet.mix(relaxation.weights(logits, moment))
    inputs, targets = next(iter(task.batches("train", setting.search.batch, generator(seed))))
    inputs, targets = channels_last(inputs.to(setting.device)), targets.to(setting.device)
    return supernet, lambda: task.loss(supernet(inputs), targets)


def bytes_kept(method: Method, setting: Setting, seed: int) -> int:
    """Bytes that one weight step keeps between forward and backward, parameters not counted.

    What autograd saves is counted tensor by tensor, each storage once: the same on every machine,
    where a process's peak would also hold what torch was loaded with.
    """
    return saved_bytes(*step(method, setting, seed))


def step_seconds(
    methods: Sequence[Method], setting: Setting, seed: int, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of a weight step, forward and backward, the methods by turns."""
    forwards = {method.name: step(method, setting, seed)[1] for method in methods}
    spent: dict[str, list[float]] = {name: [] for name in forwards}
    for index in range(rounds + 1):
        for name, forward in forwards.items():
            start = setting.clock()
            forward().backward()  # type: ignore[no-untyped-call]
            if index:  # the first is not counted: memory is still being asked for
                spent[name].append(setting.clock() - start)
    return {name: float(np.median(every)) for name, every in spent.items()}


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd saves in `forward`, less the module's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storages.values())  # the graph still holds them: no address was used twice
    del loss
    return total
