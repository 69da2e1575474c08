"""HW-GPT-Bench: 10,000 GPT networks of a supernet, measured on 14 devices, and a surrogate.

Sukthanker, Zela, Staffler, Klein, Purucker, Franke & Hutter, "HW-GPT-Bench: Hardware-Aware
Architecture Benchmark for Language Models", NeurIPS 2024 (https://arxiv.org/abs/2405.10299). The
space has 10^12 candidates and more, so the table is a surrogate: networks that were not measured are
predicted. The models are ours, not the benchmark's; their errors are in `held_out`. Scales run
different workloads: compare within one only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.surrogate import HeldOut, Surrogate, fit
from espalier.bench.tables.files import Source
from espalier.bench.tables.hw_gpt_space import (
    SCALES,
    codes_of,
    counts,
    encode,
    regressors,
    space,
)
from espalier.problem import Metric

OPTIONS = {"scale": tuple(SCALES)}
_ORIGIN = "https://github.com/automl/HW-GPT-Bench, raw observations, one row a network"
FILES = {
    "s": Source(
        "hw_gpt_bench",
        "hwgpt_s.parquet",
        "2a5d0dc11a5eedf3562cc52525018b47bf765c4599045f8410b9cf8294b1923d",
        _ORIGIN,
    ),
    "m": Source(
        "hw_gpt_bench",
        "hwgpt_m.parquet",
        "19612e97c28f2392e8d9d4fe81b5f0e41341072563e3bf7ca13226f2925c56e1",
        _ORIGIN,
    ),
}
# column in the file, by its beginning: our name, unit
_FAMILIES = {
    "lat_ms_": ("lat_", "ms"),
    "energy_kwh_": ("energy_", "kWh"),
    "mem_mb_": ("mem_", "MB"),
}


def load(scale: str = "s") -> Surrogate:
    """The table of one scale of the supernet, GPT-2 small or medium.

    Columns: `perplexity` and `accuracy` (of the next token) on OpenWebText, `params` and `macs`
    counted, `lat_DEVICE` in ms, `energy_DEVICE` in kWh and `mem_DEVICE` in MB as measured. Rows are
    those with a perplexity; models are fitted on all rows that have the metric.
    Errors: `DataError` where the file is absent or another one.
    """
    file, domain = FILES[scale], space(scale)
    chosen = {"perplexity": ("perplexity", ""), "accuracy": ("accuracy", "")}
    for name in file.columns():
        for start, (ours, unit) in _FAMILIES.items():
            if name.startswith(start):
                chosen[ours + name.removeprefix(start)] = (name, unit)
    found = file.read(
        ["embed_dim", "n_layer", "bias", "n_head", "mlp_ratio", "params", "macs"]
        + [column for column, _ in chosen.values()]
    )
    codes = codes_of(scale, found)
    values = {name: found[column].astype(np.float64) for name, (column, _) in chosen.items()}
    fits, errors = fit(partial(regressors, scale), codes, values)
    models: dict[str, Callable[[NDArray[Any]], NDArray[np.float64]]] = {**fits}
    for i, name in enumerate(("params", "macs")):
        values[name] = found[name].astype(np.float64)
        models[name] = partial(_count, scale, i)
    kept = ~np.isnan(values["perplexity"])
    about = [
        Metric("perplexity", "", "min", "predicted", "validation"),
        Metric("accuracy", "", "max", "predicted", "validation"),
        Metric("params"),
        Metric("macs"),
        *(
            Metric(name, unit, "min", "predicted")
            for name, (_, unit) in chosen.items()
            if name not in ("perplexity", "accuracy")
        ),
    ]
    return Surrogate(
        name=f"hw_gpt:scale={scale}",
        space=domain,
        codes=np.asfortranarray(codes[kept]),
        columns={metric.name: values[metric.name][kept] for metric in about},
        about={metric.name: metric for metric in about},
        validation="perplexity",
        test="perplexity",
        source=f"HW-GPT-Bench (2024), GPT-2 {scale.upper()}, {kept.sum():,} networks measured, "
        f"others predicted; {_worth(errors)}",
        encode=partial(encode, scale),
        models=models,
        held_out=errors,
    )


def _count(scale: str, which: int, codes: NDArray[Any]) -> NDArray[np.float64]:
    return counts(scale, codes)[which]


def _worth(errors: dict[str, HeldOut]) -> str:
    """The held-out errors in words."""
    quality = errors["perplexity"]
    times = {name: e for name, e in errors.items() if name.startswith("lat_")}
    worst = min(times, key=lambda name: times[name].spearman)
    middle = float(np.median([e.spearman for e in times.values()]))
    return (
        f"of {quality.rows:,} held-out networks perplexity is predicted to {quality.error:.2%} in "
        f"the median (Spearman {quality.spearman:.4f}); the latencies have Spearman {middle:.4f} "
        f"in the median and {times[worst].spearman:.4f} at worst ({worst})"
    )
