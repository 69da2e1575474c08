"""Peers time themselves: Optuna, pymoo, Archai, and the regularised evolution of AutoDL-Projects.

Run by strategies_speed.py in the peers' environment, one JSON request on standard input; the answer
on standard output is a list of {"wall", "cpu"} in seconds for the whole run. Nothing is piped while
the clock runs.
"""

from __future__ import annotations

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
from serve import loaded

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


AUTODL_OPERATORS = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]


class Api:
    """What AutoDL-Projects' evolution asks of NAS-Bench-201: here, a dictionary."""

    full_train_epochs = "200"

    def __init__(self, values: list[float], operations: list[str]) -> None:
        self.values, self.code = values, {name: i for i, name in enumerate(operations)}

    def reset_time(self) -> None:
        self.spent = 0.0

    def codes(self, arch: Any) -> list[int]:
        """Operators by edge, in the order of NAS-Bench-201."""
        return [self.code[name] for node in arch.nodes for name, _ in node]

    def query_index_by_arch(self, arch: Any) -> int:
        row = 0
        for code in self.codes(arch):
            row = 5 * row + code
        return row

    def simulate_train_eval(
        self, arch: Any, dataset: str, hp: str
    ) -> tuple[float, int, int, float]:
        self.spent += 1.0
        return self.values[self.query_index_by_arch(arch)], 0, 0, self.spent


def autodl_script(checkout: Path) -> Any:
    """exps/NATS-algos/regularized_ea.py of a checkout, as it is."""
    sys.path[:0] = [str(checkout), str(checkout / "lib")]
    # the script imports much that its evolution does not use
    for name in ("config_utils", "datasets", "procedures", "utils", "log_utils"):
        stand_in = types.ModuleType(f"xautodl.{name}")
        stand_in.__getattr__ = lambda _: None  # type: ignore[method-assign]
        sys.modules[f"xautodl.{name}"] = stand_in
    models = types.ModuleType("xautodl.models")
    path = next(checkout.rglob("cell_searchs/genotypes.py"))
    models.CellStructure = loaded("genotypes", path).Structure  # type: ignore[attr-defined]
    models.get_search_spaces = None  # type: ignore[attr-defined]
    bench = types.ModuleType("nats_bench")
    bench.create = None  # type: ignore[attr-defined]
    sys.modules.update({"xautodl.models": models, "nats_bench": bench})
    return loaded("regularized_ea", checkout / "exps" / "NATS-algos" / "regularized_ea.py")


def autodl_evolution(request: dict[str, Any]) -> dict[str, float]:
    """The script's evolution, with a table in memory."""
    script = autodl_script(Path(request["checkout"]))
    operations = AUTODL_OPERATORS
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


def archai_run(request: dict[str, Any]) -> dict[str, float]:
    """Archai's searches over its own interface of spaces, networks left out.

    Each is told its iterations beforehand, and evolution proposes what the Pareto front of a sample
    gives, so the number of candidates is counted and the times are scaled to `queries`.
    """
    os.chdir(tempfile.gettempdir())  # it writes a log where it stands
    from archai.discrete_search.algos.random_search import RandomSearch
    from archai.discrete_search.algos.regularized_evolution import RegularizedEvolutionSearch
    from archai.discrete_search.api.archai_model import ArchaiModel
    from archai.discrete_search.api.model_evaluator import ModelEvaluator
    from archai.discrete_search.api.search_objectives import SearchObjectives
    from archai.discrete_search.api.search_space import EvolutionarySearchSpace

    counts, rng = request["counts"], random.Random(request["seed"])

    def marked(method: Any) -> Any:
        # what the decorator of `overrides` leaves behind; 3.1, which is asked for, fails on Python 3.11
        method.__override__ = True
        return method

    class Rows(EvolutionarySearchSpace):  # type: ignore[misc]
        def model(self, row: list[int]) -> Any:
            return ArchaiModel(row, "-".join(map(str, row)))

        @marked
        def random_sample(self) -> Any:
            return self.model([rng.randrange(n) for n in counts])

        @marked
        def mutate(self, arch: Any) -> Any:
            row = [int(x) for x in arch.archid.split("-")]
            i = rng.randrange(len(row))
            row[i] = rng.choice([x for x in range(counts[i]) if x != row[i]])
            return self.model(row)

        @marked
        def crossover(self, arch_list: Any) -> Any:
            return self.mutate(arch_list[0])

        @marked
        def save_arch(self, model: Any, file_path: str) -> None:
            Path(file_path).write_text(model.archid)

        @marked
        def load_arch(self, file_path: str) -> Any:
            return self.model([int(x) for x in Path(file_path).read_text().split("-")])

        @marked
        def save_model_weights(self, model: Any, file_path: str) -> None: ...

        @marked
        def load_model_weights(self, model: Any, file_path: str) -> None: ...

    asked = 0

    class Value(ModelEvaluator):  # type: ignore[misc]
        @marked
        def evaluate(self, model: Any, budget: Any = None) -> float:
            nonlocal asked
            asked += 1
            return value([int(x) for x in model.archid.split("-")])

    objectives = SearchObjectives()
    objectives.add_objective("value", Value(), higher_is_better=False)
    batch = request["batch"]
    rounds = max(1, request["queries"] // batch)
    with tempfile.TemporaryDirectory() as folder:
        shared = {"num_iters": rounds, "seed": request["seed"], "save_pareto_model_weights": False}
        if request["method"] == "random":
            search = RandomSearch(Rows(), objectives, folder, samples_per_iter=batch, **shared)
        else:
            search = RegularizedEvolutionSearch(
                Rows(), objectives, folder, init_num_models=30, pareto_sample_size=10,
                history_size=30, **shared
            )  # fmt: skip
        spent = clocked(search.search)
    return {name: seconds * request["queries"] / asked for name, seconds in spent.items()}


KINDS = {
    "archai": archai_run,
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
