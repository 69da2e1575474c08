"""The table that ships with the package: 2,646 networks for scikit-learn's digits, all trained.

Made by benchmarks/digits_table.py. Every network of `nets.digits_cells.DigitsCells` was trained
three times for 9 epochs on 300 of the 1,797 images, and judged by 500 others (validation) and 500
more (test) after every epoch. One training is what `estimators.Trained` gives with seed 0, 1 or 2,
up to rounding. The largest network is neither the best by validation nor by test; the number of
parameters orders them with a Kendall tau of 0.717, multiply-accumulates with 0.494 (mean test).
"""

from __future__ import annotations

import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import verify
from espalier.errors import DataError
from espalier.nets.digits_cells import DigitsCells
from espalier.problem import Metric

OPTIONS: dict[str, tuple[str, ...]] = {}
FILE = Path(__file__).parents[1] / "data" / "digits.npz"
SHA256 = "74d112f88194ffdb1fd30b5d44610a293c726a05123b2f25ac99dc59a78f92b7"
SOURCE = (
    "every network of digits_cells, trained by benchmarks/digits_table.py on scikit-learn's digits "
    "(300 images to train, 500 to validate, 500 to test; 9 epochs, 3 seeds). Two trainings order the "
    "networks with a Kendall tau of 0.752 (test, seeds 1 and 2): the ceiling of what can be known. "
    "latency_ms: measured in ONNX Runtime, one thread, batch 1, on a shared 2-core AMD EPYC; where "
    "a network took over 1.08 times what its layers explain it was measured again, up to 4 times, "
    "and the least kept; 300 measured once more took -4% to +2% (eight of ten). epoch_seconds: "
    "processor seconds of one training alone, one thread, modelled as a sum over layers from 400 "
    "networks timed (least of 4 epochs); off by 6% (median) on held-out ones"
)

_METRICS = {
    "val_acc": Metric("val_acc", "%", "max", "measured", "validation"),
    "test_acc": Metric("test_acc", "%", "max", "measured", "test"),
    "params": Metric("params", "", "min", "counted"),
    "macs": Metric("macs", "", "min", "counted"),
    "latency_ms": Metric("latency_ms", "ms", "min", "measured"),
}
# name: dtype, dimensions beyond the rows (None: not by row)
_SCHEMA: dict[str, tuple[str, int | None]] = {
    "codes": ("int8", 1),
    "validation": ("uint16", 2),
    "test": ("uint16", 2),
    "images": ("uint16", None),
    "params": ("uint32", 0),
    "macs": ("uint32", 0),
    "latency_ms": ("float32", 0),
    "epoch_seconds": ("float32", 0),
    "space": ("<U16", None),
    "data": ("<U16", None),
}


@cache
def load() -> Table:
    """val_acc (chooses) and test_acc in percent, params, macs, latency_ms; curves; epoch_seconds."""
    return read(FILE, SHA256)


def read(path: Path, sha256: str) -> Table:
    """The table of a file. Errors: `DataError` for another checksum, schema or space.

    `val_acc` is that of the first training alone, for a query is one training; `test_acc` is the
    mean of all trainings. `curves` hold every training: `(n, seeds, epochs)`, in percent.
    """
    if not path.is_file():
        raise DataError(f"{str(path)!r} is missing, though it ships with the package: reinstall it")
    verify(path, sha256, "it ships with the package: reinstall it")
    stored = _arrays(path)
    family = _family()
    if str(stored["space"]) != family.space.fingerprint:
        raise DataError(
            f"{path.name} is of another space ({stored['space']}) than digits_cells "
            f"({family.space.fingerprint}): make it again with benchmarks/digits_table.py"
        )
    of_validation, of_test = (int(n) for n in stored["images"])
    validation = stored["validation"] * (100 / of_validation)
    test = stored["test"] * (100 / of_test)
    plain = {name: stored[name].astype(np.float64) for name in ("params", "macs", "latency_ms")}
    return Table(
        name="digits",
        space=family.space,
        codes=stored["codes"].astype(family.space.dtype),
        columns={"val_acc": validation[:, 0, -1], "test_acc": test[:, :, -1].mean(axis=1), **plain},
        about=_METRICS,
        validation="val_acc",
        test="test_acc",
        source=SOURCE,
        curves={"val_acc": validation, "test_acc": test},
        epoch_seconds=stored["epoch_seconds"].astype(np.float64),
        encode=encode,
        graphs=family.graphs,
    )


def encode(codes: NDArray[Any]) -> NDArray[np.float64]:
    """Features `(n, k)` for predictors, from the codes alone.

    One-hot decisions; how often each operation occurs in each stage; the logarithms of parameters
    and multiply-accumulates, by formula.
    """
    family = _family()
    one_hot = family.space.one_hot(codes).astype(np.float64)
    names = family.space.one_hot_names
    kinds = sorted({name.partition("=")[2] for name in names if name.startswith("op")})
    stages = sorted({name.partition(".")[0] for name in names if name.startswith("op")})
    often = [
        sum(
            one_hot[:, j]
            for j, name in enumerate(names)
            if name.startswith(f"{stage}.") and name.endswith(f"={kind}")
        )
        for stage in stages
        for kind in kinds
    ]
    counts = np.log(np.stack(family.counts(np.asarray(codes)), axis=1))
    return np.concatenate([one_hot, np.stack(often, axis=1), counts], axis=1)


@cache
def _family() -> DigitsCells:
    return DigitsCells()


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file, checked against the schema. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} is no readable .npz file of plain arrays") from error
    rows = len(found["codes"]) if "codes" in found else 0
    for name, (dtype, dimensions) in _SCHEMA.items():
        if name not in found:
            raise DataError(f"{path.name} lacks the array {name!r}")
        array = found[name]
        by_row = dimensions is not None
        if array.dtype != np.dtype(dtype) or (
            by_row and (array.ndim != 1 + (dimensions or 0) or len(array) != rows)
        ):
            shape = "any shape" if dimensions is None else f"{rows} rows, {1 + dimensions} axes"
            raise DataError(
                f"{path.name}: {name!r} must be {dtype} with {shape}, got {array.dtype} "
                f"{array.shape}"
            )
    return found
