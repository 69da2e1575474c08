"""The ways to shrink a model that shrink_vs_peers.py compares: `espalier.shrink`, peers, uniform widths.

Peers and uniform widths know no latency: they are asked for less and less, and what they give is
measured, until it keeps the latency. That loop is the same for all of them.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import espalier as esp
import models
from espalier.compress import Bits, Depth, Pretrained, Widths
from espalier.compress import Cut as Decisions
from espalier.errors import BudgetError, EspalierError
from espalier.recipes._parts.measured import Processor
from espalier.tasks import Task
from espalier.train import recalibrate
from peers.environments import process

LEAST = 0.01  # amount below which nothing is asked for
SLACK = 1.01  # over the limit that still keeps it: the noise of a ratio


@dataclass
class Job:
    """One model and its data, as every method gets them."""

    name: str  # of the function in models.py
    original: nn.Module
    task: Task  # its test split is never the real one
    seed: int
    folder: Path
    plan_seconds: float  # for `espalier.shrink` to measure and decide in

    def __post_init__(self) -> None:
        self.clock = Processor(rounds=9, seed=self.seed)
        self.example = torch.zeros(1, *self.task.shape)
        self.files: dict[str, str] = {}

    def ratio(self, network: nn.Module) -> float:
        """Measured latency over that of the original, timed beside it."""
        return self.clock.ratio(network, self.original, self.example)


@dataclass
class Cut:
    """A network that keeps a share of the latency, before it is fine-tuned."""

    network: nn.Module
    ratio: float
    seconds: float  # of all that led to it
    amount: float | None = None  # of what its method was asked for
    mended: float = 0.0  # processor seconds of repair already, which fine-tuning has less


class Unreachable(Exception):
    """A method has no network so small."""


class Method(ABC):
    """A way to shrink: networks of falling amounts."""

    step = 0.96  # of the amount, from one network to the next

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def at(self, amount: float) -> nn.Module:
        """The network of an amount in 0..1, smaller than the one asked for before.

        Errors: `Unreachable` where there is none.
        """

    def cuts(self, shares: Sequence[float]) -> dict[float, Cut | None]:
        """For each share the first network that keeps it; None where none does."""
        found: dict[float, Cut | None] = dict.fromkeys(sorted(shares, reverse=True))
        start, amount, ratio, shapes = time.perf_counter(), self.step, 1.0, ""
        while amount > LEAST and any(cut is None for cut in found.values()):
            try:
                network = self.at(amount)
            except Unreachable:
                break
            before, shapes = shapes, str([tuple(t.shape) for t in network.state_dict().values()])
            if shapes != before:
                ratio = self.job.ratio(network)
            for share, cut in found.items():
                if cut is None and ratio <= share * SLACK:
                    # looked at again before it counts: the least of many noisy ratios is too low
                    ratio = median([ratio, self.job.ratio(network), self.job.ratio(network)])
                    if ratio <= share * SLACK:
                        spent = time.perf_counter() - start
                        found[share] = Cut(copy.deepcopy(network), ratio, spent, amount)
            amount *= self.step
        return found


class Uniform(Method):
    """Every width the same share of the original's, in steps of channels; the largest weights stay."""

    def __init__(self, job: Job, multiple: int) -> None:
        super().__init__(job)
        cut = Widths(multiple=multiple, least=0.05, steps=64, importance="magnitude")
        self.family = Pretrained(job.original, job.example.repeat(2, 1, 1, 1), (cut,))

    def cut(self, amount: float) -> nn.Module:
        """The nearest option of every width, as cut."""
        chosen = {
            d.name: min(d.options, key=lambda o: abs(int(o) / int(d.options[-1]) - amount))
            for d in self.family.space.decisions
        }
        return self.family.build(self.family.space.candidate(chosen))

    def at(self, amount: float) -> nn.Module:
        """The same with new statistics of batch norms."""
        network = self.cut(amount)
        recalibrate(network, self.job.task, seed=self.job.seed)
        return network


class Peer(Method):
    """A peer in an environment of its own; amounts are shares of multiply-accumulates."""

    def __init__(self, job: Job, environment: str, script: str, method: str, multiple: int) -> None:
        super().__init__(job)
        self._process = process(environment, script)
        self._ask({"begin": {**begin(job), "method": method, "multiple": multiple}})

    def at(self, amount: float) -> nn.Module:
        """What the peer answers, its layers made again from the shapes of the weights."""
        file = self._ask({"amount": amount})
        if file is None:
            raise Unreachable
        with np.load(file) as state:
            tensors = {name: torch.from_numpy(state[name]) for name in state.files}
        network = shaped(models.MODELS[self.job.name](), tensors)
        recalibrate(network, self.job.task, seed=self.job.seed)
        return network

    def _ask(self, message: Mapping[str, Any]) -> str | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EspalierError("the peer's script ended: see what it wrote above")
        found: str | None = json.loads(line)["state"]
        return found


class Bisected(Peer):
    """A peer whose every answer is a search of its own: amounts by halving, not step by step."""

    def cuts(self, shares: Sequence[float]) -> dict[float, Cut | None]:
        """For each share the largest network found that keeps it; None where none does."""
        start = time.perf_counter()
        known: dict[float, tuple[nn.Module, float]] = {}  # amount to network and ratio
        least, found = LEAST, dict[float, Cut | None]()
        for share in sorted(shares, reverse=True):
            while True:
                kept = [a for a, (_, ratio) in known.items() if ratio <= share * SLACK]
                below = max(kept, default=least)
                over = min((a for a in known if a > below), default=1.0)
                if below > over * self.step:
                    break
                amount = (below + over) / 2
                try:
                    network = self.at(amount)
                except Unreachable:
                    least = amount
                    continue
                known[amount] = network, median(self.job.ratio(network) for _ in range(3))
            found[share] = None
            if kept:
                network, ratio = known[max(kept)]
                spent = time.perf_counter() - start
                found[share] = Cut(copy.deepcopy(network), ratio, spent, max(kept))
        return found


def begin(job: Job) -> dict[str, Any]:
    """The first message to a peer: the original and some data as files."""
    weights, data = job.folder / f"{job.name}.npz", job.folder / f"data-{job.name}-{job.seed}.npz"
    np.savez(weights, **{k: v.numpy() for k, v in job.original.state_dict().items()})
    arrays: dict[str, Any] = {}
    for split, count in (("train", 2048), ("validation", 1024)):
        order = torch.Generator().manual_seed(job.seed)
        x, y = next(iter(job.task.batches(split, count, order)))  # type: ignore[arg-type]
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x.contiguous().numpy(), y.numpy()
    np.savez(data, **arrays)
    return {
        "file": str(Path(models.__file__).resolve()),
        "model": job.name,
        "weights": str(weights.resolve()),
        "data": str(data.resolve()),
        "seed": job.seed,
        "folder": str(job.folder.resolve()),
    }


def shaped(network: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A network whose convolutions, norms and linear layers have the shapes of a state, loaded."""
    for path, layer in list(network.named_modules()):
        weight = state.get(f"{path}.weight")
        if weight is None:
            continue
        bias = f"{path}.bias" in state
        new: nn.Module
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups == layer.in_channels and layer.groups > 1
            groups = len(weight) if depthwise else layer.groups
            new = nn.Conv2d(
                weight.shape[1] * groups,
                len(weight),
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                groups=groups,
                bias=bias,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(len(weight), layer.eps, layer.momentum)
        elif isinstance(layer, nn.Linear):
            new = nn.Linear(weight.shape[1], len(weight), bias)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, new)
    network.load_state_dict(dict(state))
    return network.eval()


class Espalier:
    """`espalier.shrink` up to fine-tuning: its repair ends after the closed forms.

    The later shares reuse the table of latencies and the profile of the first.
    """

    def __init__(self, job: Job, decisions: Sequence[Decisions]) -> None:
        self.job, self.decisions = job, decisions

    def cuts(self, shares: Sequence[float]) -> dict[float, Cut | None]:
        """A cut for each share."""
        job, first = self.job, None
        found: dict[float, Cut | None] = {}
        for share in sorted(shares, reverse=True):
            start = time.perf_counter()
            # a folder of its own each time: what was stopped halfway is done again whole
            kinds = "-".join(cut.kind for cut in self.decisions)
            name = f"shrink-{job.name}-{kinds}-{job.seed}-{share:g}-{time.time_ns()}"
            out = job.folder / name
            try:
                shrunk = self._shrunk(share, out, first)
            except BudgetError as error:
                print(f"{job.name} at {share:.0%}: {error}", flush=True)
                found[share] = None
                continue
            first = first or out
            spent, network = time.perf_counter() - start, shrunk.network()
            (repair,) = shrunk.to_json()["shrink"]["repair"]
            mended = repair["stages"][-1]["seconds"]  # with the validation passes between
            found[share] = Cut(network, job.ratio(network), spent, None, mended)
        return found

    def _shrunk(self, share: float, out: Path, reuse: Path | None) -> esp.Shrunk:
        return esp.shrink(
            self.job.original,
            self.job.task,
            within={"latency_ms": f"{100 * share:g}%"},
            budget=self.job.plan_seconds,
            decisions=self.decisions,
            tune=False,
            baselines=False,
            seed=self.job.seed,
            out=out,
            reuse=reuse,
        )


def method(name: str, job: Job) -> Method | Espalier:
    """A way to shrink by its name in the results."""
    if name in OWN:
        return Espalier(job, OWN[name])
    if name in UNIFORM:
        return Uniform(job, UNIFORM[name])
    environment, script, how, multiple = PEERS[name]
    kind = Bisected if how == "fastnas" else Peer
    return kind(job, environment, script, how, multiple)


# Multiples of 8 channels are faster in the runtime, but the smallest networks are out of their reach:
# whoever uses these tools would try both.
UNIFORM = {"uniform width": 4, "uniform width by 8": 8}
PEERS = {
    "torch-pruning global": ("torch-pruning", "torch_pruning_peer.py", "global", 4),
    "torch-pruning global by 8": ("torch-pruning", "torch_pruning_peer.py", "global", 8),
    "torch-pruning local": ("torch-pruning", "torch_pruning_peer.py", "local", 4),
    "torch-pruning local by 8": ("torch-pruning", "torch_pruning_peer.py", "local", 8),
    "modelopt fastnas": ("modelopt", "modelopt_peer.py", "fastnas", 4),
    "modelopt fastnas by 8": ("modelopt", "modelopt_peer.py", "fastnas", 8),
}
# a quarter of the latency of so small a network needs less than an eighth of some widths
_SMALLER = (Widths(least=0.05, steps=10), Depth())
OWN: Mapping[str, Sequence[Decisions]] = {
    "espalier": _SMALLER,
    "espalier bits": (Bits(),),
    "espalier mix": (*_SMALLER, Bits()),
}
METHODS = (*OWN, *PEERS, *UNIFORM)
