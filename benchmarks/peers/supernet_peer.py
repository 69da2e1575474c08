"""One tool's search step on the NAS-Bench-201 space: seconds, and the memory it takes.

Run by supernet_speed.py in a process of its own for each case, one JSON request on standard input, the
answer on standard output. The tools are espalier, xautodl (AutoDL-Projects), naslib and awnas; the last
two import much that a step does not use, for which stand-ins are made where it is not installed.

A case is a mode ("darts", "gdas", "path", and of Espalier also "partial", "gates") and gives two kinds of
step: "weights", and "both", with an architecture step before it. Hard modes go through the same
six cells in every tool, by logits so large that the noise never wins.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

warnings.simplefilter("ignore")
OPERATORS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
SURE = 1e4  # a logit that no noise overcomes
Step = Callable[[Tensor, Tensor, list[int]], Any]


def cells(count: int) -> list[list[int]]:
    """The cells of the hard modes: an operator's index for each edge."""
    rng = random.Random(0)
    return [[rng.randrange(len(OPERATORS)) for _ in EDGES] for _ in range(count)]


def one_hot(cell: list[int]) -> Tensor:
    """Logits `(edges, operators)` that choose a cell."""
    return SURE * F.one_hot(torch.tensor(cell), len(OPERATORS)).float()


class Learner:
    """The part of a step that all tools share: the losses, the optimisers, the clipping."""

    def __init__(self, weights: list[nn.Parameter], logits: list[nn.Parameter]) -> None:
        self.weights = weights
        self.by_weights = torch.optim.SGD(
            weights, 0.025, momentum=0.9, weight_decay=3e-4, nesterov=True
        )
        self.by_logits = (
            torch.optim.Adam(logits, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
            if logits
            else None
        )

    def on_weights(self, outputs: Tensor, y: Tensor) -> None:
        self.by_weights.zero_grad()
        F.cross_entropy(outputs.float(), y).backward()
        nn.utils.clip_grad_norm_(self.weights, 5)
        self.by_weights.step()

    def on_logits(self, outputs: Tensor, y: Tensor) -> None:
        assert self.by_logits is not None
        self.by_logits.zero_grad()
        F.cross_entropy(outputs.float(), y).backward()
        self.by_logits.step()


# --- tools: each gives the two steps ---------------------------------------------------------------


def espalier(request: dict[str, Any]) -> tuple[Step, Step]:
    """`NB201Supernet` with weights by softmax, by hard Gumbel softmax, or with one path."""
    from espalier.nets.elastic.mixing import Gates
    from espalier.nets.nb201_supernet import NB201Supernet
    from espalier.space import Candidate
    from espalier.train.precision import autocast

    mode = request["mode"]
    partial = 4 if mode == "partial" else 1
    net = NB201Supernet(channels=request["channels"], cells=request["cells"], partial=partial, affine=False)  # fmt: skip
    names = [f"op_{to}_{origin}" for to, origin in EDGES]
    logits = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(OPERATORS)))
    learner = Learner(list(net.parameters()), [logits])

    def run(x: Tensor, cell: list[int], learns: bool) -> Tensor:
        with torch.set_grad_enabled(learns):
            if mode == "gdas":
                noise = -torch.empty_like(logits).exponential_().log()
                soft = ((one_hot(cell) + logits).log_softmax(1) + noise).div(10).softmax(1)
                weights = F.one_hot(soft.argmax(1), len(OPERATORS)) - soft.detach() + soft
            else:
                weights = logits.softmax(1)
        if mode == "path" or (mode == "gates" and not learns):
            chosen = {n: OPERATORS[i] for n, i in zip(names, cell, strict=True)}
            net.activate(Candidate(chosen))
        elif mode == "gates":  # two paths: one runs, the other only for its gradient
            other = [(i + 1) % len(OPERATORS) for i in cell]
            hard = F.one_hot(torch.tensor(cell), len(OPERATORS)) - weights.detach() + weights
            net.mix(
                {n: Gates(w, (o,)) for n, w, o in zip(names, hard.unbind(), other, strict=True)}
            )
        else:
            net.mix(dict(zip(names, weights.unbind(), strict=True)))
        with autocast(request["format"]):
            out: Tensor = net(x)
        return out

    def on_weights(x: Tensor, y: Tensor, cell: list[int]) -> None:
        learner.on_weights(run(x, cell, False), y)

    def both(x: Tensor, y: Tensor, cell: list[int]) -> None:
        if mode != "path":
            for weight in learner.weights:
                weight.requires_grad_(False)
            learner.on_logits(run(x, cell, True), y)
            for weight in learner.weights:
                weight.requires_grad_(True)
        on_weights(x, y, cell)

    return on_weights, both


def xautodl(request: dict[str, Any]) -> tuple[Step, Step]:
    """The super-networks of AutoDL-Projects, stepped as its search scripts step them."""
    sys.path.insert(0, request["checkout"])
    models = importlib.import_module("xautodl.models.cell_searchs")
    mode = request["mode"]
    kind = {
        "darts": models.TinyNetworkDarts,
        "gdas": models.TinyNetworkGDAS,
        "path": models.TinyNetworkRANDOM,
    }
    net = kind[mode](
        request["channels"], request["cells"], 4, 10, list(OPERATORS), False, True
    ).train()
    logits = [] if mode == "path" else net.get_alphas()
    held = {id(p) for p in logits}
    learner = Learner([p for p in net.parameters() if id(p) not in held], logits)

    def choose(cell: list[int]) -> None:
        if mode == "path":
            inward: list[list[Any]] = [[], [], []]
            for (to, origin), i in zip(EDGES, cell, strict=True):
                inward[to - 1].append((OPERATORS[i], origin))
            net.arch_cache = models.CellStructure([tuple(node) for node in inward])
        elif mode == "gdas":
            with torch.no_grad():
                logits[0].copy_(one_hot(cell))

    def on_weights(x: Tensor, y: Tensor, cell: list[int]) -> None:
        choose(cell)
        learner.on_weights(net(x)[1], y)

    def both(x: Tensor, y: Tensor, cell: list[int]) -> None:
        if logits:
            choose(cell)
            learner.on_logits(net(x)[1], y)
        on_weights(x, y, cell)

    return on_weights, both


def naslib(request: dict[str, Any]) -> tuple[Step, Step]:
    """NASLib's one-shot optimisers; `both` is their own `step`. The sizes are fixed there."""
    if (request["channels"], request["cells"]) != (16, 5):
        raise ValueError("NASLib's NAS-Bench-201 has 16 channels and 5 cells, nothing else")
    checkout = Path(request["checkout"])
    stand_in(checkout)
    for name in ("naslib.optimizers", "naslib.search_spaces"):
        package = types.ModuleType(name)  # entered without running it: it imports everything
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    space = importlib.import_module("naslib.search_spaces.nasbench201.graph")
    mode = request["mode"]
    module = importlib.import_module(f"naslib.optimizers.oneshot.{mode}.optimizer")
    optimizer = {"darts": "DARTSOptimizer", "gdas": "GDASOptimizer"}[mode]
    run = getattr(module, optimizer)()
    run.adapt_search_space(space.NasBench201SearchSpace(), "cifar10")
    run.before_training()
    # the order of its operators, and of its edges
    order = [1, 0, 3, 2, 4]

    def choose(cell: list[int]) -> None:
        if mode == "gdas":
            with torch.no_grad():
                for alpha, i in zip(run.architectural_weights, cell, strict=True):
                    alpha.copy_(one_hot([order.index(i)])[0])

    def on_weights(x: Tensor, y: Tensor, cell: list[int]) -> None:
        choose(cell)
        if mode == "gdas":
            run.graph.update_edges(
                update_func=lambda edge: run.sample_alphas(edge, run.tau_curr),
                scope=run.scope,
                private_edge_data=False,
            )
        run.op_optimizer.zero_grad()
        run.loss(run.graph(x), y).backward()
        nn.utils.clip_grad_norm_(run.graph.parameters(), run.grad_clip)
        run.op_optimizer.step()

    def both(x: Tensor, y: Tensor, cell: list[int]) -> None:
        choose(cell)
        run.step((x, y), (x, y))

    return on_weights, both


def awnas(request: dict[str, Any]) -> tuple[Step, Step]:
    """The shared networks of aw_nas for NAS-Bench-201, with its dropout off."""
    stand_in(Path(request["checkout"]))
    found = importlib.import_module("aw_nas.btcs.nasbench_201")
    layers = 3 * request["cells"] + 2
    space = found.NasBench201SearchSpace(num_layers=layers, load_nasbench=False)
    mode = request["mode"]
    kind = {"darts": found.NB201DiffSharedNet, "path": found.NB201SharedNet}[mode]
    options = {"init_channels": request["channels"], "dropout_rate": 0.0}
    net = kind(space, torch.device("cpu"), **options).train()
    logits = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(OPERATORS)))
    learner = Learner(list(net.parameters()), [logits])

    def run(x: Tensor, cell: list[int], learns: bool) -> Tensor:
        out: Tensor
        if mode == "path":
            matrix = torch.zeros(4, 4).numpy()
            for (to, origin), i in zip(EDGES, cell, strict=True):
                matrix[to, origin] = i
            out = net.forward(x, matrix)
            return out
        weights = (logits if learns else logits.detach()).softmax(1)
        out = net.forward(x, [found.DiffArch(op_weights=w, edge_norms=None) for w in weights])
        return out

    def on_weights(x: Tensor, y: Tensor, cell: list[int]) -> None:
        learner.on_weights(run(x, cell, False), y)

    def both(x: Tensor, y: Tensor, cell: list[int]) -> None:
        if mode != "path":
            learner.on_logits(run(x, cell, True), y)
        on_weights(x, y, cell)

    return on_weights, both


TOOLS = {"espalier": espalier, "xautodl": xautodl, "naslib": naslib, "awnas": awnas}


# --- what a checkout imports and a step does not use -----------------------------------------------


class Anything(type):
    """A class that stands for whatever is asked of it; as a decorator it changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not named:
            return args[0]
        return Anything(cls.__name__, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a module of stand-ins for what a checkout imports and this environment lacks."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = str(checkout)
        self.own = {p.name for p in checkout.iterdir() if (p / "__init__.py").exists()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        theirs = frame is not None and frame.f_code.co_filename.startswith(self.checkout)
        if not theirs or name.split(".")[0] in self.own:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name, (), {})

        module.__getattr__ = missing  # type: ignore[method-assign]


def stand_in(checkout: Path) -> None:
    """Makes a checkout's packages importable."""
    resources: Any = types.ModuleType("pkg_resources")  # gone from recent setuptools
    resources.resource_string = lambda *_: b"0"
    resources.resource_filename = lambda *_: ""
    resources.iter_entry_points = lambda *_, **__: []
    resources.working_set = []
    sys.modules.setdefault("pkg_resources", resources)
    with contextlib.suppress(ImportError):
        importlib.import_module("networkx")
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(StandIns(checkout))


# --- the clock and the memory ----------------------------------------------------------------------


def memory(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most since `reset`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in /proc/self/status: memory is measured on Linux only")


def reset() -> None:
    """Lets `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(step: Step, request: dict[str, Any], before: float) -> dict[str, Any]:
    """Seconds a step (median over rounds, each the mean over cells), and the peak of memory."""
    batch = request["batch"]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    many = cells(6) if request["mode"] in ("gdas", "path", "gates") else [[3] * 6]
    for cell in many:
        step(x, y, cell)  # the first of each shape sets up kernels, and is not counted
    gc.collect()
    reset()
    wall, cpu = [], []
    for _ in range(request["rounds"]):
        start, work = time.perf_counter(), time.process_time()
        for cell in many:
            step(x, y, cell)
        wall.append((time.perf_counter() - start) / len(many))
        cpu.append((time.process_time() - work) / len(many))
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "least_seconds": min(wall),
        "peak_mib": memory("VmHWM") - before,
    }


def main() -> None:
    """One request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tools print goes to standard error
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    weights, both = TOOLS[request["tool"]](request)
    gc.collect()
    before = memory("VmRSS")
    found = {"weights": measured(weights, request, before)}
    if request["mode"] != "path":
        found["both"] = measured(both, request, before)
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
