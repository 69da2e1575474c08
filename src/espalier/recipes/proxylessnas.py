"""ProxylessNAS: one path in memory, two compared, with the latency of this machine in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier import tasks
from espalier.costs import OnnxRuntime
from espalier.recipes import Recipe
from espalier.recipes._parts.mobile import SMALL, Alone, Counted, Device, Processor, even, multipath
from espalier.recipes._parts.nb201_steps import saved_bytes
from espalier.solvers.relax import BinaryGates, ExpectedCost, Moment, Settings, Softmax, relax
from espalier.solvers.relax.expected import Expected
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train.running import channels_last
from espalier.train.seeds import generator

KERNELS = ((3,), (3, 5), (3, 5, 7))  # with two expansions: 2, 4 and 6 operators a block
MOST_MEMORY = 1.3  # of one path's
MOST_LOST = 0.01  # accuracy


@dataclass(frozen=True)
class Setting:
    """The task, the device, how long to search, the weight of the latency, how to train alone."""

    task: str = "digits:train=1100,validation=297,test=400"
    net: Mapping[str, Any] = field(default_factory=dict)  # options of the family
    measured: bool = True  # else counted, which takes no time and hangs on no machine
    latency: float = 0.4  # of expected latency over that of even chances
    search: Settings = field(
        default_factory=lambda: Settings(
            epochs=40,
            lr=0.1,
            arch_lr=0.03,
            arch_betas=(0.0, 0.999),
            arch_decay=0.0,
            warmup_epochs=10,
        )
    )
    alone: Alone = field(default_factory=lambda: Alone(Training(epochs=15, lr=0.1), 2))
    rounds: int = 9  # of timing


SCALES = {
    "smoke": Setting(
        "digits:train=128,validation=64,test=64",
        net=SMALL,
        measured=False,
        latency=0.5,
        search=Settings(epochs=2, batch=32, arch_lr=0.1, arch_decay=0.0),
        alone=Alone(Training(epochs=1, batch=32)),
    ),
    "cpu": Setting(),
    "gpu": Setting(
        "cifar10",
        search=Settings(
            epochs=120, arch_lr=6e-3, arch_betas=(0.0, 0.999), arch_decay=0.0, warmup_epochs=40
        ),
        alone=Alone(Training(epochs=100), 3),
    ),
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """A search with the latency in its loss and one without; memory of a step by operators."""
    setting = SCALES[scale]
    task = tasks.make(setting.task)
    device: Device = Processor(OnnxRuntime(), seed) if setting.measured else Counted()
    expected = device.expected(multipath(task, seed, **setting.net))
    searches = {
        name: searched(task, expected, weight, setting, seed)
        for name, weight in (("without", 0.0), ("with", setting.latency))
    }
    family = multipath(task, seed, **setting.net)
    found = [family.space.candidate(one["candidate"]) for one in searches.values()]
    timed = device.measured(family, found, setting.rounds)
    for one, ms in zip(searches.values(), timed["ms"], strict=True):
        one["latency_ms"] = ms
    memory = {f"{2 * len(k)}": bytes_of(task, k, seed, setting.net) for k in KERNELS}
    about = device.about() if isinstance(device, Processor) else {}
    return {
        "device": {"name": device.name, **about},
        "timing": timed,
        "searches": searches,
        "memory": memory,
        "check": checked(searches, memory),
    }


def searched(
    task: Task, expected: Expected, weight: float, setting: Setting, seed: int
) -> dict[str, Any]:
    """One search, and its network trained alone."""
    supernet = multipath(task, seed, **setting.net)
    cost = ExpectedCost(expected, even(expected), coefficient=weight, name="latency")
    found = relax(
        supernet,
        task,
        relaxation=BinaryGates(),
        terms=(cost,) if weight else (),
        settings=setting.search,
        seed=seed,
    )
    candidate: Candidate = found.candidate
    alone = setting.alone(supernet, candidate, task, seed)
    return {
        "candidate": candidate.to_json(),
        "table_ms": expected.at(candidate),
        "accuracy": alone["accuracy"],
        "accuracies": alone["each"],
        "monitor": found.monitor,
        "probabilities": found.probabilities,
        "seconds": found.seconds,
    }


def bytes_of(
    task: Task, kernels: tuple[int, ...], seed: int, net: Mapping[str, Any]
) -> dict[str, int]:
    """Bytes kept for backward in one architecture step, without weights: one path as it is trained
    alone, the same path with an idle rival in each block, and all operators at once."""
    supernet = multipath(task, seed, **{**net, "kernels": kernels, "zero": False}).train()
    inputs, targets = next(iter(task.batches("train", 32, generator(seed))))
    x = channels_last(inputs)
    moment = Moment("architecture", 0, 0.0, generator(seed, 1))
    gates, soft = BinaryGates(), Softmax()
    logits = gates.start(supernet, supernet.mixable, generator(seed))
    compared = gates.weights(logits, moment)
    running = {
        name: supernet.space[name].options[int(_values(w).argmax())] for name, w in compared.items()
    }

    def kept() -> int:
        return saved_bytes(supernet, lambda: task.loss(supernet(x), targets))

    supernet.activate(running)
    path = kept()
    supernet.mix(compared)
    two = kept()
    supernet.mix(soft.weights(logits, moment))
    return {"path": path, "gates": two, "all": kept()}


def _values(weights: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(weights, "weights", weights)
    return found.detach()


def checked(
    searches: Mapping[str, Mapping[str, Any]], memory: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """The three claims: memory of one path, growth of all paths, a faster network as good."""
    ratio = max(one["gates"] / one["path"] for one in memory.values())
    two, four, six = (one["all"] for one in memory.values())
    bent = abs((six - four) / (four - two) - 1)  # 0 on a straight line
    lost = searches["without"]["accuracy"] - searches["with"]["accuracy"]
    faster = searches["without"]["latency_ms"] / searches["with"]["latency_ms"]
    return {
        "memory_of_one_path": ratio,
        "memory_of_all_paths": {name: one["all"] / one["path"] for name, one in memory.items()},
        "bent": bent,
        "faster": faster,
        "accuracy_lost": lost,
        "memory_holds": ratio <= MOST_MEMORY,
        "linear": bent <= 0.1,
        "latency_holds": faster > 1 and lost <= MOST_LOST,
        "holds": bool(ratio <= MOST_MEMORY and bent <= 0.1 and faster > 1 and lost <= MOST_LOST),
    }


RECIPE = Recipe(
    name="proxylessnas",
    title="ProxylessNAS: search on the target device with one path in memory",
    source="Cai, Zhu & Han, ProxylessNAS: Direct Neural Architecture Search on Target Task and "
    "Hardware (ICLR 2019), https://arxiv.org/abs/1812.00332",
    parts=(
        "space: MultiPath, in each block one of four inverted residuals (kernel 3 or 5, expansion 3 "
        "or 6) or, where the shapes allow it, nothing",
        "relaxation: binary gates; weights learn along one sampled path, the architecture compares "
        "two sampled options a block, of which one runs",
        "terms: expected latency over that of even chances, linear",
        "cost: a table of pieces measured in ONNX Runtime on one thread of this machine; the result "
        "is measured end to end",
        "selection: the likeliest option of each block; trained alone from fresh weights",
        "baseline: the same search without the latency",
    ),
    works_when="What an architecture step keeps for its backward pass is at most 1.3 times that of "
    "one path for 2, 4 and 6 operators a block, while all operators at once grow linearly (the two "
    "differences are within 10%); and the network found with the latency in the loss is measured "
    "faster than the one found without it, at a loss of at most 1 point of test accuracy, both "
    "trained alone.",
    run=run,
    text="""
Binary gates: each block runs one operator at a time, so a search needs the memory of a training. An
architecture step draws two operators of each block by their probabilities and runs one of the two;
the gradient for the other is found in the backward pass, by running it without keeping anything. The
logits of the two then move such that the probabilities of the others stay as they were.

The latency in the loss is the mean over the probabilities, by a table of pieces measured on this
machine: each operator at its place, timed behind another layer. It is exact as far as latencies add
up, and its gradient is exact.

Memory is counted, not read off the process: the bytes of every storage that autograd saves for
backward, weights left out. So it is the same on every machine. What one idle operator takes while it
runs in backward is not in it, and is let go before the next.

What differs from the paper: digits of 8x8 pixels instead of ImageNet, six blocks instead of 21, four
operators and a skip instead of six and a skip, ReLU instead of ReLU6, 30 epochs of search after 10 of
weights alone. The latency term is added (the paper's form for gradients), its scale is the mean of
even chances and its weight 0.4. The REINFORCE variant is not here.
""",
)
