"""DeepArchitect: a language whose expressions are search spaces, walked as a tree."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from espalier import train
from espalier.estimators.rows import threads
from espalier.nets.language import Concat, Conv, Dropout, Language, Optional, Or, Pool, Repeat
from espalier.nets.language import Residual as Res
from espalier.recipes import Recipe
from espalier.solvers.strategies import STRATEGIES, make
from espalier.space import Candidate, ordinal
from espalier.tasks import images
from espalier.tasks.task import Task
from espalier.train.loop import Diverged
from espalier.train.seeds import global_seed, mixed

# searches, trainings a search, epochs a training, leaves that must compile and train
_SCALES = {"smoke": (1, 10, 1, 4), "cpu": (10, 64, 4, 32), "gpu": (20, 128, 20, 128)}
_LARGE = 10**6


def expression() -> Language:
    """Two groups of up to two blocks, each block one of three; the learning rate is in the tree."""
    block = Or(
        Conv((8, 16, 32), kernel=(1, 3, 5)),
        Conv((8, 16, 32), kernel=(3, 5), separable=True),
        Res(Conv((8, 16, 32), kernel=(1, 3))),
    )
    network = Concat(
        Conv((4, 8, 16), kernel=(3, 5)),
        Repeat(block, (0, 1, 2)),
        Pool(("max", "mean")),
        Repeat(block, (0, 1, 2)),
        Optional(Dropout((0.1, 0.3))),
    )
    return Language(network, (1, 8, 8), 10, beside=[ordinal("lr", 0.01, 0.03, 0.1, 0.3)])


@cache
def _task() -> Task:
    return images("digits", seed=0, train=300, validation=500, test=500)


def trained(family: Language, candidate: Candidate, epochs: int, seed: int) -> tuple[float, float]:
    """Accuracy on validation and on test after training from scratch; NaN where it diverged."""
    own = mixed(seed, int(candidate.id, 16))
    recipe = train.Recipe(epochs=epochs, batch=32, lr=float(candidate["lr"]), precision="fp32")
    with global_seed(own):
        network = family.build(candidate)
    try:
        train.fit(network, _task(), recipe, own)
    except Diverged:
        return np.nan, np.nan
    validation, test = (
        train.evaluate(network, _task(), split)["accuracy"] for split in ("validation", "test")
    )
    return validation, test


def searched(strategy: str, trials: int, epochs: int, seed: int) -> tuple[list[float], float]:
    """The best validation accuracy after each training, and the test accuracy of the last best."""
    family = expression()
    walker = make(strategy, family.space, seed)
    best, test, curve = -np.inf, np.nan, []
    for _ in range(trials):
        codes = walker.ask(1)
        found, other = trained(family, family.space.decode(codes)[0], epochs, seed)
        walker.tell(codes, np.array([[-found]]), np.zeros(1))
        if found > best:
            best, test = found, other
        curve.append(best)
    return curve, test


def leaves(count: int, seed: int) -> dict[str, Any]:
    """How many networks the expression denotes; how many sampled leaves compile and train."""
    family = expression()
    codes = family.space.sample(count, np.random.default_rng(seed))
    results = [trained(family, c, 1, seed)[0] for c in family.space.decode(codes)]
    good = sum(bool(np.isfinite(r)) for r in results)
    return {"denoted": int(family.space.size), "sampled": count, "trained": good}


def _paired(a: list[float], b: list[float]) -> float:
    """One-sided p-value that `a` is above `b`, pair by pair (Wilcoxon); 1 where nothing differs."""
    from scipy.stats import wilcoxon

    if np.allclose(a, b):
        return 1.0
    return float(wilcoxon(a, b, alternative="greater").pvalue)


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """All searches at equal numbers of trainings; the check compares the best by validation."""
    seeds, trials, epochs, sampled = _SCALES[scale]
    model = "guided" if "guided" in STRATEGIES else "tpe"
    names = {"random": "random", "mcts": "mcts", "smbo": model}
    best: dict[str, list[float]] = {}
    tests: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    with threads(1):
        language = leaves(sampled, seed)
        for role, strategy in names.items():
            runs = [searched(strategy, trials, epochs, 1000 * seed + s) for s in range(seeds)]
            best[role] = [curve[-1] for curve, _ in runs]
            tests[role] = [test for _, test in runs]
            curves[role] = np.median([curve for curve, _ in runs], axis=0).tolist()
    p = {role: _paired(best[role], best["random"]) for role in ("mcts", "smbo")}
    middle = {role: median(values) for role, values in best.items()}
    check = {
        "language": language,
        "median": middle,
        "median_test": {role: median(values) for role, values in tests.items()},
        "p_value": p,
        "language_holds": language["denoted"] > _LARGE
        and language["trained"] == language["sampled"],
        "mcts_holds": middle["mcts"] >= middle["random"],
        "smbo_holds": middle["smbo"] >= middle["random"] and p["smbo"] < 0.05,
    }
    check["holds"] = all(check[f"{part}_holds"] for part in ("language", "mcts", "smbo"))
    return {
        "model": model,
        "searches": seeds,
        "trainings": trials,
        "epochs": epochs,
        "torch": torch.__version__,
        "best": best,
        "test": tests,
        "median_curves": curves,
        "check": check,
    }


RECIPE = Recipe(
    name="deep-architect",
    title="DeepArchitect: a modular language of networks, and search on its tree",
    source="Negrinho & Gordon, DeepArchitect: Automatically Designing and Training Deep "
    "Architectures (2017), https://arxiv.org/abs/1704.08792",
    parts=(
        "space: an expression of Concat, Or, Repeat, Optional, Residual over convolutions, pooling "
        "and dropout (nets.language), with the learning rate in the same tree",
        "strategies: random; mcts (UCT with bisection); guided search as the surrogate",
        "estimator: trained from scratch, a few epochs",
        "objective: validation accuracy; test accuracy is reported for the network it chose",
    ),
    works_when="One expression denotes more than a million networks, and every sampled leaf "
    "compiles and trains. After 64 trained digits networks, the median over 10 searches of the "
    "best validation accuracy is at least random search's for MCTS and for the surrogate, and for "
    "the surrogate a paired test gives p < 0.05.",
    run=run,
    text="""
A network is written as an expression; what it leaves open are the decisions of a tree, and a
decision that only one option leads to exists under that option alone. The same tree holds the
learning rate. Three searches walk it: at random, by upper confidence bounds on prefixes (MCTS, with
long lists of options halved), and led by a surrogate.

Obtained here (`espalier recipe run deep-architect --scale cpu`: 10 searches each, 64 trainings of 4
epochs on 300 digits, 500 validate, 500 others test; median and range of the best validation
accuracy, median test accuracy of the network it chose, one-sided paired Wilcoxon test against
random search):

| search | validation | test | p |
| --- | --- | --- | --- |
| random | 0.917 (0.892 to 0.956) | 0.899 |  |
| MCTS | 0.939 (0.922 to 0.952) | 0.924 | 0.019 |
| surrogate (guided) | 0.969 (0.936 to 0.980) | 0.953 | 0.001 |

The check holds. The expression denotes 30,869,136 networks with their learning rates; all 32 sampled
leaves compiled and trained. The published surrogate is ridge regression on n-grams; here it is the
guided search that Espalier uses everywhere (a Gaussian process), and the published rollouts are
even, here they follow what did well (`rollout="uniform"` gives the published ones).
""",
)
