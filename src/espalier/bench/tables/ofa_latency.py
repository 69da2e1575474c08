"""Latencies of 5,000 networks of Once-for-All's MobileNetV3 space on 12 settings of devices.

Space: Cai, Gan, Wang, Zhang & Han, "Once-for-All: Train One Network and Specialize it for Efficient
Deployment", ICLR 2020 (https://arxiv.org/abs/1908.09791). Measurements: HELP (Lee et al., 2021,
https://arxiv.org/abs/2106.08630).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.bench.tables.latencies import codes_of, priced
from espalier.errors import DataError, SpaceError
from espalier.space import Space, ordinal

OPTIONS: dict[str, tuple[str, ...]] = {}
FILE = Source(
    "help_latency",
    "ofa_latency.parquet",
    "277caaf6eb36c4c8d496f2b84dadf7958b2def62589e47c1b6b3e34972fb24f3",
    "https://github.com/HayeonLee/HELP, data/ofa",
)
STAGES, DEEPEST = 5, 4
KERNELS, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
RESOLUTIONS = tuple(range(128, 225, 4))


def space() -> Space:
    """Decisions `dS` (layers of stage S), `r` (resolution), and `ksI` and `eI` (kernel and
    expansion of layer I, four a stage), which are active where the stage is deep enough."""
    layers = []
    for name, options in (("ks", KERNELS), ("e", EXPANSIONS)):
        for i in range(STAGES * DEEPEST):
            stage, place = divmod(i, DEEPEST)
            deep = tuple(depth for depth in DEPTHS if depth > place)
            when = {} if deep == DEPTHS else {f"d{stage}": deep}
            layers.append(ordinal(f"{name}{i}", *options, when=when))
    depths = [ordinal(f"d{stage}", *DEPTHS) for stage in range(STAGES)]
    return Space([*depths, ordinal("r", *RESOLUTIONS), *layers])


SPACE = space()


def load() -> Table:
    """Columns: `lat_DEVICE_BATCH` in ms. Errors: `DataError` for an absent or another file."""
    latencies = [name for name in FILE.columns() if name.startswith("lat_")]
    found = FILE.read([*SPACE.names, *latencies])
    try:
        codes = codes_of(SPACE, found)
    except SpaceError as error:
        raise DataError(f"ofa_latency: {error}") from None
    return priced(
        "ofa_latency",
        SPACE,
        codes,
        {name: found[name] for name in latencies},
        f"{len(codes):,} networks of Once-for-All's space measured by HELP (2021)",
        encode,
    )


def encode(codes: NDArray[Any]) -> NDArray[np.float64]:
    """Features `(n, k)`: one-hot decisions; the pixels, alone and times each stage's depth and sum
    of expansions."""
    at = np.asarray(codes, dtype=np.int64)
    pixels = (np.take(RESOLUTIONS, at[:, STAGES]) / max(RESOLUTIONS)) ** 2
    on = SPACE.active(codes)[:, -STAGES * DEEPEST :]
    wide = np.where(on, np.take(EXPANSIONS, at[:, -STAGES * DEEPEST :]), 0)
    sums = wide.reshape(len(at), STAGES, DEEPEST).sum(axis=2)
    work = np.concatenate([np.take(DEPTHS, at[:, :STAGES]), sums], axis=1)
    hot = SPACE.one_hot(codes).astype(np.float64)
    return np.concatenate([hot, work, work * pixels[:, None], pixels[:, None]], axis=1)
