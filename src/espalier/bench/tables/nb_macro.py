"""NAS-Bench-Macro: 6,561 networks for CIFAR-10, each trained three times.

Su et al., CVPR 2021 (https://arxiv.org/abs/2103.11922). The file has test accuracies only. So that
a search does not choose by what it reports, training 1 chooses and the mean of trainings 2 and 3
reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.errors import DataError
from espalier.nets.macro import HEAD, LAYERS, SPACE, STAGES, STEM, graphs
from espalier.problem import Metric

OPTIONS: dict[str, tuple[str, ...]] = {}
FILE = Source(
    "nasbench_macro",
    "nasbench_macro_cifar10.parquet",
    "87eb32cafcb740b7a418191df4f015602675151f740e170271e856de0486d9e3",
    "https://github.com/xiusu/NAS-Bench-Macro, data/nas-bench-macro_cifar10.json",
)
_RUNS = ("test_acc_0", "test_acc_1", "test_acc_2")
Array = NDArray[np.float64]


def load() -> Table:
    """Columns: `val_acc` (training 1), `test_acc` (mean of trainings 2 and 3), `acc_1` to `acc_3`
    (each training), in %; `params`, and `macs`, which the file calls FLOPs.

    Errors: `DataError` where the file is absent or another one.
    """
    found = FILE.read(["arch", *_RUNS, "params", "flops"])
    runs = [found[name].astype(np.float64) for name in _RUNS]
    columns = {
        "val_acc": runs[0],
        "test_acc": (runs[1] + runs[2]) / 2,
        **{f"acc_{i}": run for i, run in enumerate(runs, 1)},
        "params": found["params"].astype(np.float64),
        "macs": found["flops"].astype(np.float64),
    }
    accuracies = [Metric(n, "%", "max", "measured", "test") for n in columns if "acc" in n]
    about = [*accuracies, Metric("params"), Metric("macs")]
    return Table(
        name="nb_macro",
        space=SPACE,
        codes=_codes(found["arch"]),
        columns=columns,
        about={metric.name: metric for metric in about},
        validation="val_acc",
        test="test_acc",
        source="NAS-Bench-Macro (2021) on cifar10, 6,561 networks; test accuracy of training 1 "
        "chooses, the mean of trainings 2 and 3 reports",
        encode=encode,
        graphs=graphs,
    )


def _codes(names: NDArray[Any]) -> NDArray[Any]:
    text = [str(name) for name in names]
    if any(len(name) != LAYERS or not name.isdigit() for name in text):
        bad = next(n for n in text if len(n) != LAYERS or not n.isdigit())
        raise DataError(f"nb_macro: an architecture is {LAYERS} digits, got {bad!r}")
    return np.asfortranarray([[int(c) for c in name] for name in text], dtype=SPACE.dtype)


# --- features ----------------------------------------------------------------------------------


def encode(codes: NDArray[Any]) -> Array:
    """Features `(n, 35)`: one-hot blocks, how many of each kind, of each kind but identity in each
    stage, and the logarithms of parameters and multiply-accumulates."""
    chosen = np.asarray(codes, dtype=np.int64)
    hot = SPACE.one_hot(codes).astype(np.float64)
    counts = [(chosen == block).sum(axis=1) for block in range(3)]
    ends = np.cumsum(STAGES)
    for start, end in zip(ends - STAGES, ends, strict=True):
        counts.append((chosen[:, start:end] > 0).sum(axis=1))
        counts.append((chosen[:, start:end] == 2).sum(axis=1))
    sizes = np.log(np.stack(sizes_of(codes), axis=1))
    return np.concatenate([hot, np.stack(counts, axis=1), sizes], axis=1)


def sizes_of(codes: NDArray[Any]) -> tuple[Array, Array]:
    """Parameters and multiply-accumulates `(n,)` for images of 32 x 32, from the codes."""
    chosen, layers = np.asarray(codes, dtype=np.int64), np.arange(LAYERS)
    params, macs = (part[layers, chosen].sum(axis=1) for part in (_PARAMS, _MACS))
    width, side = STEM * 2 ** len(STAGES), 32 // 2 ** len(STAGES)
    fixed = 27 * STEM + 2 * STEM + width * HEAD + 2 * HEAD + HEAD * 10 + 10
    work = 27 * STEM * 32**2 + width * HEAD * side**2 + HEAD * 10
    return params + fixed, macs + work


def _tables() -> tuple[Array, Array]:
    """Parameters and multiply-accumulates of each block in each layer `(8, 3)`."""
    params, macs = np.zeros((LAYERS, 3)), np.zeros((LAYERS, 3))
    width, side, layer = STEM, 32, 0
    for count in STAGES:
        for index in range(count):
            out, small = (2 * width, side // 2) if index == 0 else (width, side)
            if index == 0:  # the convolution in the place of an identity
                params[layer, 0], macs[layer, 0] = width * out + 2 * out, width * out * small**2
            for block, (expansion, kernel) in enumerate(((3, 3), (6, 5)), 1):
                wide = expansion * width
                weights = wide * width, wide * kernel**2, wide * out
                params[layer, block] = sum(weights) + 4 * wide + 2 * out
                macs[layer, block] = weights[0] * side**2 + sum(weights[1:]) * small**2
            width, side, layer = out, small, layer + 1
    return params, macs


_PARAMS, _MACS = _tables()
