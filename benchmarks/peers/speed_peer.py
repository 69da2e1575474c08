"""Peers time themselves: Optuna, pymoo, and the regularised evolution of AutoDL-Projects.

Run by strategies_speed.py in the peers' environment, one JSON request on standard input; the answer
on standard output is a list of {"wall", "cpu"} in seconds for the whole run. Nothing is piped while
the clock runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

warnings.simplefilter("ignore")


def clocked(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock on the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def value(row: Any) -> float:
    """An objective that costs next to nothing: the same as on the other side."""
    return float(sum(c * (i + 1) for i, c in enumerate(row)))


def optuna_run(request: dict[str, Any]) -> dict[str, float]:
    """Ask and tell in memory."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {
        "random": lambda: optuna.samplers.RandomSampler(seed=request["seed"]),
        "tpe": lambda: optuna.samplers.TPESampler(seed=request["seed"]),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=30, seed=request["seed"]),
    }
    study = optuna.create_study(sampler=samplers[request["method"]]())
    space = {
        f"x{i}": CategoricalDistribution(list(range(n))) for i, n in enumerate(request["counts"])
    }

    def work() -> None:
        for _ in range(request["queries"] // request["batch"]):
            trials = [study.ask(space) for _ in range(request["batch"])]
            for trial in trials:
                study.tell(trial, value(trial.params.values()))

    return clocked(work)


def optuna_durable(request: dict[str, Any]) -> dict[str, float]:
    """Trials recorded on disk: in SQLite, or in a journal file."""
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
        storage: Any
        if request["method"] == "sqlite":
            storage = RDBStorage(f"sqlite:///{folder}/study.db")
        else:
            storage = JournalStorage(JournalFileBackend(f"{folder}/study.log"))
        sampler = optuna.samplers.RandomSampler(seed=request["seed"])
        study = optuna.create_study(storage=storage, sampler=sampler)

        def objective(trial: Any) -> float:
            counts = enumerate(request["counts"])
            return value([trial.suggest_categorical(f"x{i}", list(range(n))) for i, n in counts])

        return clocked(lambda: study.optimize(objective, n_trials=request["queries"]))


def pymoo_run(request: dict[str, Any]) -> dict[str, float]:
    """The genetic algorithm on integers, `batch` offspring at a time."""
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.problems.static import StaticProblem
    from pymoo.termination import get_termination

    counts = request["counts"]
    upper = np.array(counts) - 1
    problem = Problem(n_var=len(counts), n_obj=1, xl=np.zeros(len(counts)), xu=upper, vtype=int)
    algorithm = GA(
        pop_size=30,
        n_offsprings=request["batch"],
        sampling=IntegerRandomSampling(),
        crossover=SBX(vtype=float, repair=RoundingRepair()),
        mutation=PM(vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    forever = get_termination("n_gen", 10**9)
    algorithm.setup(problem, termination=forever, seed=request["seed"], verbose=False)

    def work() -> None:
        done = 0
        while done < request["queries"]:
            rows = algorithm.ask()
            known = StaticProblem(problem, F=np.array([[value(x)] for x in rows.get("X")]))
            Evaluator().eval(known, rows)
            algorithm.tell(infills=rows)
            done += len(rows)

    return clocked(work)


class Api:
    """What AutoDL-Projects' evolution asks of NAS-Bench-201: here, a dictionary."""

    full_train_epochs = "200"

    def __init__(self, values: list[float], operations: list[str]) -> None:
        self.values, self.code = values, {name: i for i, name in enumerate(operations)}

    def reset_time(self) -> None:
        self.spent = 0.0

    def query_index_by_arch(self, arch: Any) -> int:
        row = 0
        for node in arch.nodes:
            for name, _ in node:
                row = 5 * row + self.code[name]
        return row

    def simulate_train_eval(
        self, arch: Any, dataset: str, hp: str
    ) -> tuple[float, int, int, float]:
        self.spent += 1.0
        return self.values[self.query_index_by_arch(arch)], 0, 0, self.spent


def autodl_evolution(request: dict[str, Any]) -> dict[str, float]:
    """exps/NATS-algos/regularized_ea.py of a checkout, as it is, with a table in memory."""
    checkout = Path(request["checkout"])
    sys.path[:0] = [str(checkout), str(checkout / "lib")]
    # the script imports much that its evolution does not use
    for name in ("config_utils", "datasets", "procedures", "utils", "log_utils"):
        stand_in = types.ModuleType(f"xautodl.{name}")
        stand_in.__getattr__ = lambda _: None  # type: ignore[method-assign]
        sys.modules[f"xautodl.{name}"] = stand_in
    models = types.ModuleType("xautodl.models")
    path = next(checkout.rglob("cell_searchs/genotypes.py"))
    models.CellStructure = _loaded("genotypes", path).Structure  # type: ignore[attr-defined]
    models.get_search_spaces = None  # type: ignore[attr-defined]
    bench = types.ModuleType("nats_bench")
    bench.create = None  # type: ignore[attr-defined]
    sys.modules.update({"xautodl.models": models, "nats_bench": bench})
    script = _loaded("regularized_ea", checkout / "exps" / "NATS-algos" / "regularized_ea.py")
    operations = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
    table = np.random.default_rng(0).random(5**6).tolist()

    def work() -> None:
        for seed in range(request["seeds"]):
            random.seed(seed)
            script.regularized_evolution(
                0,
                30,
                10,
                request["queries"],
                script.random_topology_func(operations),
                script.mutate_topology_func(operations),
                Api(table, operations),
                False,
                "cifar10",
            )

    return clocked(work)


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = {
    "optuna": optuna_run,
    "optuna-durable": optuna_durable,
    "pymoo": pymoo_run,
    "autodl": autodl_evolution,
}


def main() -> None:
    """One request, `repeats` runs; the first run of a library loads its code and is not counted."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    request = json.loads(sys.stdin.read())
    run = KINDS[request["kind"]]
    small = {**request, "queries": 2 * request.get("batch", 5), "seeds": 1, "seed": 0}
    if request["kind"] == "autodl":
        small["queries"] = 40  # its population alone is 30
    run(small)
    found = [run({**request, "seed": seed}) for seed in range(request["repeats"])]
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
