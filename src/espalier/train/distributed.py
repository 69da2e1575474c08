"""Training on several processes: each takes its share of every batch, gradients are averaged.

Synchronous data parallelism with torch.distributed's collectives: what starts the processes and how
they talk is torch's. Every process, a rank, holds the whole network and the same random streams,
draws the same batches and the same paths, and works on its own rows. The network may run other
layers in each step, so gradients are summed once after all passes of a step, not while they run.
Started without torchrun there is one rank, and everything here does nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from espalier.errors import EspalierError
from espalier.train import checkpoint as checkpoints


@contextmanager
def group(backend: str | None = None) -> Iterator[int]:
    """The processes that torchrun started, as one group; gives this one's rank.

    `backend` is torch's: by default gloo for what is on processors, and NCCL for what is on GPUs,
    of which each process on a machine takes its own. Without torchrun it gives 0 and does nothing.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield rank()
        return
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "nccl" in backend:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own, size = next(iter(distributed.rendezvous("env://")))
    # torchrun keeps its store when it starts processes anew: addresses of the dead are in it
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    apart = distributed.PrefixStore(f"espalier-{attempt}", store)
    distributed.init_process_group(backend, store=apart, rank=own, world_size=size)
    try:
        yield own
        distributed.barrier()  # who is done first waits, or the others see a closed connection
    finally:
        distributed.destroy_process_group()


def ranks() -> int:
    """How many processes train together; 1 without a group."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def rank() -> int:
    """Which of them this is; 0 without a group."""
    return distributed.get_rank() if ranks() > 1 else 0


def check_batch(batch: int) -> None:
    """Refuses a batch that leaves a rank fewer than two rows, which batch norm can't use."""
    if batch < 2 * ranks():
        raise EspalierError(
            f"a batch must give each of {ranks()} processes 2 examples or more, got {batch}: "
            f"make it {2 * ranks()} at least"
        )


def share(x: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    return x.tensor_split(ranks())[rank()] if ranks() > 1 else x


def start_alike(module: nn.Module) -> None:
    """Gives every rank the weights and buffers of the first."""
    if ranks() > 1:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


def combine(parameters: Sequence[nn.Parameter], loss: float, part: float) -> float:
    """Makes gradients and loss those of the whole batch; `part` is the rank's share of its rows.

    A parameter that no rank ran keeps no gradient.
    """
    if ranks() == 1:
        return loss
    device = parameters[0].device
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ran = torch.tensor([p.grad is not None for p in parameters], device=device)
    last = torch.tensor([loss], device=device)
    flat = torch.cat([*(g.reshape(-1).float() for g in grads), ran.float(), last]) * part
    distributed.all_reduce(flat)
    *sums, ran, last = torch.split(flat, [*(g.numel() for g in grads), len(parameters), 1])
    for parameter, grad, total, used in zip(parameters, grads, sums, ran.tolist(), strict=True):
        if used > 0:
            parameter.grad = grad.copy_(total.view_as(grad))
    return float(last)


def mean(values: Tensor) -> Tensor:
    """The mean over ranks, the same on all of them."""
    if ranks() > 1:
        values = values / ranks()
        distributed.all_reduce(values)
    return values


def average_buffers(module: nn.Module) -> None:
    """Makes batch-norm statistics, which each rank has of its own rows, their mean."""
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if ranks() == 1:
        return
    for device in dict.fromkeys(b.device for b in buffers):  # those of a sampler may be elsewhere
        own = [b for b in buffers if b.device == device]
        flat = torch.cat([b.reshape(-1).float() for b in own]) / ranks()
        distributed.all_reduce(flat)
        with torch.no_grad():
            for buffer, found in zip(own, torch.split(flat, [b.numel() for b in own]), strict=True):
                buffer.copy_(found.view_as(buffer))


def read(path: Path, device: torch.device) -> checkpoints.Saved | None:
    """The checkpoint that the first rank finds, for all: the others may not see its disk."""
    saved = checkpoints.read(path) if rank() == 0 else None
    if ranks() == 1:
        return saved
    about: dict[str, Any] | None = None
    if saved is not None:
        shapes = {n: [list(t.shape), str(t.dtype)] for n, t in saved.tensors.items()}
        about = {"counters": saved.counters, "tensors": shapes}
    known = _told(about, device)
    if known is None:
        return None
    tensors = {}
    for name, (shape, dtype) in known["tensors"].items():
        kind = getattr(torch, dtype.removeprefix("torch."))
        found = torch.empty(shape, dtype=kind) if saved is None else saved.tensors[name]
        tensors[name] = found.to(device).contiguous()
        distributed.broadcast(tensors[name], 0)
    return checkpoints.Saved(tensors, known["counters"])


def _told(data: Any, device: torch.device) -> Any:
    """Plain JSON of the first rank, for all."""
    text = json.dumps(data).encode()
    length = torch.tensor([len(text)], device=device)
    distributed.broadcast(length, 0)
    if rank() == 0:
        letters = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    else:
        letters = torch.empty(int(length), dtype=torch.uint8, device=device)
    distributed.broadcast(letters, 0)
    return json.loads(bytes(letters.cpu().tolist()))
