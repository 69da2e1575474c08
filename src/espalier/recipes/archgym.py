"""ArchGym's protocol: the hyperparameter lottery, and a proxy of the simulator from logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.recipes import Recipe

if TYPE_CHECKING:
    from espalier.bench.table import Table
    from espalier.bench.told import Told

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator], dict[str, Any]]

# hyperparameters drawn, seeds a draw, seeds of the best draw again, samples a run
_SCALES = {"smoke": (3, 1, 2, 40), "cpu": (30, 2, 10, 150), "gpu": (60, 5, 30, 300)}
_UNITS = (8, 16, 32, 64, 128, 256)
_BUFFERS = (16, 64, 256, 1024)
_BANDWIDTHS = (4, 16, 64, 256)
_AREA_MM2 = 6.0
_RMSE, _FASTER = 0.02, 100.0


def _log(low: float, high: float, rng: np.random.Generator) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


AGENTS: dict[str, Draw] = {
    "evolution": lambda rng: {
        "population": int(rng.integers(4, 61)),
        "sample": int(rng.integers(1, 21)),
    },
    "nsga2": lambda rng: {
        "population": int(rng.integers(4, 61)),
        "cross": float(rng.uniform(0, 1)),
        "rate": float(rng.uniform(0.02, 0.6)),
    },
    "reinforce": lambda rng: {
        "rate": _log(1e-3, 0.3, rng),
        "entropy": _log(1e-4, 0.3, rng),
        "hidden": int(rng.choice([8, 16, 32, 64])),
    },
    "local": lambda rng: {"draws": int(rng.integers(1, 81))},
    "mcts": lambda rng: {
        "explore": _log(0.01, 3.0, rng),
        "rollout": str(rng.choice(["average", "uniform"])),
    },
    "random": lambda rng: {},  # it has none: its lottery is of seeds alone
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """The lottery on NAS-Bench-201 (digits at smoke scale) and on systolic arrays; then the proxy."""
    from espalier.bench import tables

    draws, seeds, again, samples = _SCALES[scale]
    table = tables.load("digits" if scale == "smoke" else "nb201:dataset=cifar10")
    hardware = systolic_table(small=scale == "smoke")
    lotteries, logged = {}, set[int]()
    for environment in (table, hardware):
        found, rows = lottery(environment, draws, seeds, again, samples, seed)
        lotteries[environment.name] = found
        if environment is hardware:
            logged = rows
    proxy = proxied(hardware, np.array(sorted(logged)), seed)
    level = {n: bool(x["within_noise"]) for n, x in lotteries.items()}
    close = all(x <= _RMSE for x in proxy["rmse"].values())
    fast = proxy["speedup"] >= _FASTER
    return {
        "draws": draws,
        "samples": samples,
        "environments": lotteries,
        "proxy": proxy,
        "check": {
            "draws": draws,
            "best_draws_within_noise": level,
            "spread_over_draws": {
                n: {a: r["upper"] - r["lower"] for a, r in x["agents"].items()}
                for n, x in lotteries.items()
            },
            "proxy_rmse": dict(proxy["rmse"]),
            "proxy_within_2_percent": close,
            "proxy_speedup": proxy["speedup"],
            "proxy_100_times_faster": fast,
            "holds": all(level.values()) and close and fast,
        },
    }


# --- the lottery ------------------------------------------------------------------------------


def lottery(
    table: Table, draws: int, seeds: int, again: int, samples: int, seed: int
) -> tuple[dict[str, Any], set[int]]:
    """Every agent with `draws` random settings at equal samples: the whole distribution of the mean
    regret. The draw that looks best by what chooses is run with `again` fresh seeds, for its own figure
    is lucky.

    Gives the report, and every row that any agent asked for.
    """
    from espalier.bench.significance import holm
    from espalier.bench.told import told
    from espalier.problem import Limit

    limits = (Limit("area_mm2", _AREA_MM2),) if "area_mm2" in table.columns else ()
    view = told(table, None, limits)
    logged: set[int] = set()
    agents, fresh = {}, {}
    for a, (name, draw) in enumerate(AGENTS.items()):
        rng = np.random.default_rng([seed, a])
        settings = [draw(rng) for _ in range(draws)]
        runs = np.array(
            [
                [_run(table, view, name, s, 1000 * i + k, samples, logged) for k in range(seeds)]
                for i, s in enumerate(settings)
            ]
        )
        looks, lost = runs.mean(axis=1).T
        best = int(np.argmin(looks))  # by what chooses, for test is there to report
        fresh[name] = np.array(
            [
                _run(table, view, name, settings[best], 10**6 + k, samples, logged)[1]
                for k in range(again)
            ]
        )
        low, lower, middle, upper, high = np.quantile(lost, [0, 0.25, 0.5, 0.75, 1])
        agents[name] = {
            "best_settings": settings[best],
            "lowest": float(low),
            "lower": float(lower),
            "median": float(middle),
            "upper": float(upper),
            "highest": float(high),
            "best_again": float(fresh[name].mean()),
            "best_again_error": float(fresh[name].std(ddof=1) / math.sqrt(again)),
        }
    tuned = [n for n in AGENTS if n != "random"]
    pairs = {
        f"{a}, {b}": _welch(fresh[a], fresh[b]) for i, a in enumerate(tuned) for b in tuned[:i]
    }
    adjusted = holm(pairs)
    return {
        "agents": agents,
        "different": {pair: p for pair, p in adjusted.items() if p < 0.05},
        "within_noise": all(p >= 0.05 for p in adjusted.values()),
    }, logged


def _run(
    table: Table,
    view: Told,
    agent: str,
    settings: dict[str, Any],
    seed: int,
    samples: int,
    logged: set[int],
) -> tuple[float, float]:
    """The best of what chooses (minimised) and the test regret of one run."""
    from espalier.bench.drive import drive
    from espalier.bench.regret import chosen, judge, regret
    from espalier.solvers.strategies import make

    trace = drive(make(agent, table.space, seed, **settings), table, samples, seen=view)
    logged.update(trace.rows.tolist())
    judged = judge(table, view)
    best = chosen(trace, judged)[-1]
    looks = judged.choice[trace.rows[best]] if best >= 0 else np.inf
    return float(looks), float(regret(trace, judged)[-1])


def _welch(a: Array, b: Array) -> float:
    """p that two means are alike (Welch's t-test)."""
    from scipy.stats import ttest_ind

    if a.std() == 0 and b.std() == 0:
        return 1.0 if a.mean() == b.mean() else 0.0
    return float(ttest_ind(a, b, equal_var=False).pvalue)


# --- the accelerator --------------------------------------------------------------------------


@cache
def systolic_table(small: bool = False) -> Table:
    """Systolic arrays for ResNet-20 on 32x32 images, every one priced: the second environment. The
    score is the logarithm of energy times delay. 27,648 arrays; 1,536 where `small`."""
    from espalier.bench.table import Table
    from espalier.costs.systolic import DATAFLOWS
    from espalier.problem import Metric
    from espalier.space import Space, choice, ordinal

    units, buffers = (_UNITS[1:5], _BUFFERS[1:3]) if small else (_UNITS, _BUFFERS)
    space = Space(
        [
            ordinal("rows", *units),
            ordinal("columns", *units),
            choice("dataflow", *DATAFLOWS),
            ordinal("input_kb", *buffers),
            ordinal("weight_kb", *buffers),
            ordinal("output_kb", *buffers),
            ordinal("bandwidth", *_BANDWIDTHS),
        ]
    )
    codes = space.enumerate()
    priced = [simulate(dict(c)) for c in space.decode(codes)]
    columns = {n: np.array([p[n] for p in priced]) for n in ("latency_ms", "energy_mj", "area_mm2")}
    columns["score"] = np.log(columns["latency_ms"] * columns["energy_mj"])
    about = {
        "latency_ms": Metric("latency_ms", "ms", "min", "predicted"),
        "energy_mj": Metric("energy_mj", "mJ", "min", "predicted"),
        "area_mm2": Metric("area_mm2", "mm2", "min", "predicted"),
        "score": Metric("score", "log mJ ms", "min", "predicted"),
    }
    return Table(
        name="systolic",
        space=space,
        codes=codes,
        columns=columns,
        about=about,
        validation="score",
        test="score",
        source="espalier.costs.systolic, ResNet-20 for 32x32 images",
    )


def simulate(options: dict[str, Any]) -> dict[str, float]:
    """One array, priced on the workload."""
    from espalier.costs.systolic import Array as Systolic

    return Systolic(**options).price(resnet20())


@cache
def resnet20() -> tuple[Any, ...]:
    """The products of ResNet-20 for 32x32 colour images (He et al., 2016), batch 1."""
    from espalier.costs.systolic import Product

    def conv(side: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Product:
        places = (side // stride) ** 2
        return Product(places, outputs, kernel**2 * inputs, inputs * side**2)

    out = [conv(32, 3, 16)]
    side, channels = 32, 16
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if width > 16 and block == 0 else 1
            out += [conv(side, channels, width, 3, stride)]
            side, channels = side // stride, width
            out += [conv(side, width, width)]
    return (*out, Product(1, 10, 64, 64))


# --- the proxy --------------------------------------------------------------------------------


def proxied(table: Table, logged: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """A random forest a metric, fitted on what the agents' runs logged, judged on other arrays.

    RMSE as a share of the mean of the metric, on up to 2,000 arrays that no agent asked for; the
    speed-up is a simulation's time over the forest's, in one batch of those.
    """
    from sklearn.ensemble import RandomForestRegressor

    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(table)), logged)
    held = rng.permutation(others)[:2000]
    features = np.column_stack([table.codes.astype(float), table.space.one_hot(table.codes)])
    rmse, seconds = {}, 0.0
    for name in ("latency_ms", "energy_mj"):
        truth = np.asarray(table.columns[name], dtype=float)
        forest = RandomForestRegressor(30, random_state=seed, n_jobs=1)
        forest.fit(features[logged], np.log(truth[logged]))
        since = time.perf_counter()
        guess = np.exp(forest.predict(features[held]))
        seconds += time.perf_counter() - since
        error = math.sqrt(float(((guess - truth[held]) ** 2).mean()))
        rmse[name] = error / float(truth[held].mean())
    candidates = [dict(c) for c in table.space.decode(table.codes[held[:200]])]
    since = time.perf_counter()
    for candidate in candidates:
        simulate(candidate)
    simulated = (time.perf_counter() - since) / len(candidates)
    return {
        "logged": len(logged),
        "held_out": len(held),
        "rmse": rmse,
        "simulation_us": simulated * 1e6,
        "proxy_us": seconds / len(held) * 1e6,
        "speedup": simulated / (seconds / len(held)),
    }


RECIPE = Recipe(
    name="archgym",
    title="ArchGym's protocol: the hyperparameter lottery and a proxy from logs",
    source="Krishnan et al., ArchGym: An Open-Source Gymnasium for Machine Learning Assisted "
    "Architecture Design (ISCA 2023), https://arxiv.org/abs/2306.08888",
    parts=(
        "environments: NAS-Bench-201 CIFAR-10; 27,648 systolic arrays for ResNet-20, energy times delay "
        "under 6 mm2, by costs.systolic",
        "agents: evolution, genetic algorithm (nsga2), REINFORCE, local search, MCTS, random, one interface",
        "protocol: 30 settings of each agent drawn at random, equal samples; the whole distribution, and "
        "the best draw again with fresh seeds",
        "proxy: a random forest on the logs of all agents, judged on arrays that none asked for",
    ),
    works_when="Over 30 or more settings the best draw of each agent is within noise of the others' on "
    "both environments; a proxy fitted on the logs has an RMSE of at most 2% and is at least 100 times "
    "faster than the simulator.",
    run=run,
    text="""
Which agent is best is often a lottery of its settings. Each agent is run with many settings drawn at
random and equal samples, and the whole distribution of its regret is reported, not the best. The draw
that looks best by validation is run again with other seeds. Every array that any agent asked for is logged; a
random forest fitted on the log stands in for the simulator.

## What was found here

`python benchmarks/recipes.py archgym --scale cpu --seeds 1`: 30 settings of each agent, 150 samples, two
seeds a setting; the best setting of each with 10 fresh seeds (mean and standard error).

| agent | NAS-Bench-201: regret of the settings, lowest / median / highest | best again | arrays: lowest / median / highest | best again |
| --- | --- | --- | --- | --- |
| evolution | 0.08 / 0.25 / 0.93 | 0.28 ± 0.06 | 0.00 / 0.20 / 0.52 | 0.18 ± 0.03 |
| nsga2 | 0.00 / 0.35 / 0.78 | 0.31 ± 0.06 | 0.08 / 0.24 / 0.49 | 0.25 ± 0.06 |
| reinforce | 0.08 / 0.41 / 0.84 | 0.17 ± 0.05 | 0.09 / 0.28 / 0.80 | 0.21 ± 0.05 |
| local | 0.08 / 0.25 / 0.56 | 0.27 ± 0.05 | 0.00 / 0.00 / 0.25 | 0.14 ± 0.05 |
| mcts | 0.00 / 0.21 / 0.62 | 0.41 ± 0.07 | 0.19 / 0.29 / 1.11 | 0.46 ± 0.09 |
| random (seeds alone) | 0.09 / 0.58 / 0.73 | 0.62 ± 0.10 | 0.15 / 0.33 / 0.76 | 0.34 ± 0.08 |

The first half holds: after Holm's correction no two tuned agents differ on either environment, while the
settings of one agent spread over more than the agents' medians do. The lowest of 30 draws is luck: it lost
0.00 to 0.19, and the draw that looked best by validation, run again, 0.14 to 0.46. Ten seeds can't tell
small differences apart: on the arrays MCTS has a mean behind that of random search.

Of the second half only the error holds: fitted on the 20,197 arrays (of 27,648) that the agents had asked
for, the forest has an RMSE of 0.23% (latency) and 0.34% (energy) on 2,000 others; on 3,248 logged arrays of
a first try it was 8.8% and 2.1%. It is 4.2 times faster than the simulator, far from the 100 times asked
for: the simulator here is closed formulas and takes 0.06 ms an array, not a cycle-by-cycle run of minutes.
""",
)
