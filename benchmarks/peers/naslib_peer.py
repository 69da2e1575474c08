"""Strategies of NASLib, as they stand in a checkout, over a table in the place of its search spaces.

    python naslib_peer.py CHECKOUT

NASLib is in no package index and imports dozens of others. Only its strategies are loaded (regularised
evolution, local search, BANANAS); what they import and don't use is stood in for. A candidate is a
list of options with NASLib's own moves on it: draws, mutations of one option, all neighbours.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve import loaded, serve_inside

# NASLib draws from numpy's global generator, and so do the moves here
np_random = np.random.mtrand._rand
Query = Callable[[list[int]], float]
# as in NASLib's example configurations
SETTINGS = {
    "epochs": 10**9, "num_init": 10, "k": 10, "num_ensemble": 3, "predictor_type": "bananas",
    "acq_fn_type": "its", "acq_fn_optimization": "mutation", "encoding_type": "path",
    "num_arches_to_mutate": 2, "max_mutations": 1, "num_candidates": 20,
    "sample_size": 10, "population_size": 30,
}  # fmt: skip


class Cell:
    """What NASLib's strategies ask of a search space and of a candidate of it."""

    QUERYABLE, OPTIMIZER_SCOPE, space_name, instantiate_model = True, (), "nasbench201", False

    def __init__(self, counts: list[int], query: Query, row: list[int] | None = None) -> None:
        self.counts, self.ask, self.row = counts, query, row

    def clone(self) -> Cell:
        return Cell(self.counts, self.ask, self.row)

    def sample_random_architecture(self, **_: Any) -> None:
        self.row = [int(np_random.randint(n)) for n in self.counts]

    def mutate(self, parent: Cell, **_: Any) -> None:
        assert parent.row is not None
        self.row = list(parent.row)
        place = int(np_random.choice(len(self.row)))
        others = [o for o in range(self.counts[place]) if o != self.row[place]]
        self.row[place] = int(np_random.choice(others))

    def get_nbhd(self, **_: Any) -> list[Any]:
        assert self.row is not None
        found = []
        for place, count in enumerate(self.counts):
            for option in range(count):
                if option != self.row[place]:
                    model = torch.nn.Module()
                    row = [*self.row[:place], option, *self.row[place + 1 :]]
                    model.arch = Cell(self.counts, self.ask, row)
                    found.append(model)
        random.shuffle(found)
        return found

    def query(self, *_: Any, **__: Any) -> float:
        assert self.row is not None
        return self.ask(self.row)

    def get_hash(self) -> tuple[int, ...]:
        assert self.row is not None
        return tuple(self.row)

    def get_op_indices(self) -> list[int]:
        assert self.row is not None
        return self.row

    def get_type(self) -> str:
        return "nasbench201"

    def encode(self, encoding_type: Any = None) -> Any:
        """NASLib's own encoding by paths, whose edges come in the order of the table's columns."""
        encodings = importlib.import_module("naslib.search_spaces.nasbench201.encodings")
        return encodings.encode_paths(self)


class _Anything(types.ModuleType):
    """Stands for a module of which names are imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *_, **__: None})


def enter(checkout: Path) -> None:
    """Makes NASLib's modules importable one by one, without its packages' own imports."""
    packages = (
        "", ".optimizers", ".optimizers.core", ".optimizers.discrete", ".optimizers.discrete.re",
        ".optimizers.discrete.ls", ".optimizers.discrete.bananas", ".search_spaces",
        ".search_spaces.core", ".search_spaces.nasbench201",
    )  # fmt: skip
    for name in packages:
        package = types.ModuleType(f"naslib{name}")
        package.__path__ = [str(checkout / f"naslib{name}".replace(".", "/"))]
        sys.modules[f"naslib{name}"] = package
    predictor = loaded("naslib_predictor", checkout / "naslib/predictors/predictor.py")
    predictors = types.ModuleType("naslib.predictors")
    predictors.__path__ = [str(checkout / "naslib/predictors")]
    predictors.Predictor = predictor.Predictor  # type: ignore[attr-defined]
    sys.modules.update({"naslib.predictors": predictors, "naslib.predictors.predictor": predictor})
    utils = _Anything("naslib.utils")
    utils.__path__ = [str(checkout / "naslib/utils")]  # type: ignore[attr-defined]
    utils.AverageMeterGroup = _Meter  # type: ignore[attr-defined]
    sys.modules["naslib.utils"] = utils
    for name in ("trees", "gcn", "bonas", "bnn", "seminas", "gp", "omni_ngb", "omni_seminas",
                 "zerocost", "utils", "utils.encodings"):  # fmt: skip
        sys.modules[f"naslib.predictors.{name}"] = _Anything(name)
    for name in ("fvcore", "fvcore.common", "fvcore.common.config", "naslib.utils.log",
                 "naslib.search_spaces.core.graph"):  # fmt: skip
        sys.modules[name] = _Anything(name)


class _Meter:
    """Counts what the predictor reports; nothing reads it."""

    def update(self, *_: Any, **__: Any) -> None: ...


CLASSES = {"re": "RegularizedEvolution", "ls": "LocalSearch", "bananas": "Bananas"}


def run(begin: dict[str, Any], ask: Query) -> None:
    """One search, for as long as it is answered."""
    random.seed(begin["seed"])
    np_random.seed(begin["seed"])
    torch.manual_seed(begin["seed"])
    method = begin["method"]
    module = importlib.import_module(f"naslib.optimizers.discrete.{method}.optimizer")
    config = types.SimpleNamespace(
        search=types.SimpleNamespace(**SETTINGS), dataset="cifar10", seed=begin["seed"]
    )
    made = getattr(module, CLASSES[method])(config)
    # NASLib maximises
    made.adapt_search_space(Cell(begin["counts"], lambda row: -ask(row)), dataset_api={})
    epoch = 0
    while True:
        made.new_epoch(epoch)
        epoch += 1


if __name__ == "__main__":
    enter(Path(sys.argv[1]))
    serve_inside(run)
