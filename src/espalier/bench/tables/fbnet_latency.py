"""Latencies of 5,000 FBNet networks on 27 settings of devices.

Space: Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural
Architecture Search", CVPR 2019 (https://arxiv.org/abs/1812.03443). Measurements: HELP (Lee et al.,
2021, https://arxiv.org/abs/2106.08630) and HW-NAS-Bench (Li et al., 2021,
https://arxiv.org/abs/2103.10584). Settings order the networks very differently: the median rank
correlation of one with the others is 0.31 (gold_6226) to 0.79.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.bench.tables.latencies import priced
from espalier.errors import DataError
from espalier.space import Space, choice

OPTIONS: dict[str, tuple[str, ...]] = {}
FILE = Source(
    "help_latency",
    "fbnet_latency.parquet",
    "f98aa1aa72d2fb5cd0fd4f81335106ad490adadd98da3820307bbb335848a20d",
    "https://github.com/HayeonLee/HELP, data/fbnet",
)
LAYERS = 22
# kernel, expansion, groups; the order is HW-NAS-Bench's
BLOCKS = (
    "k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip"
)  # fmt: skip
SPACE = Space([choice(f"b{i}", *BLOCKS) for i in range(LAYERS)])


def load() -> Table:
    """Columns: `lat_DEVICE_BATCH` in ms. Errors: `DataError` for an absent or another file."""
    latencies = [name for name in FILE.columns() if name.startswith("lat_")]
    found = FILE.read([*SPACE.names, *latencies])
    codes = np.stack([found[name] for name in SPACE.names], axis=1)
    if codes.min() < 0 or codes.max() >= len(BLOCKS):
        raise DataError(f"fbnet_latency: a block is 0 to {len(BLOCKS) - 1}, got {codes.max()}")
    return priced(
        "fbnet_latency",
        SPACE,
        codes.astype(SPACE.dtype),
        {name: found[name] for name in latencies},
        f"{len(codes):,} FBNet networks measured by HELP (2021) and HW-NAS-Bench (2021)",
        encode,
    )


def encode(codes: NDArray[Any]) -> NDArray[np.float64]:
    """Features `(n, 207)`: one-hot blocks, and how many there are of each."""
    hot = SPACE.one_hot(codes).astype(np.float64)
    counts = hot.reshape(len(codes), LAYERS, len(BLOCKS)).sum(axis=1)
    return np.concatenate([hot, counts], axis=1)
