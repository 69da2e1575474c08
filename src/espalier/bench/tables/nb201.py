"""NAS-Bench-201: every cell trained for 200 epochs, and measured on the devices of HELP.

Dong & Yang, 2020 (https://arxiv.org/abs/2001.00326), with accuracies as in NATS-Bench (Dong et al.,
2021, https://arxiv.org/abs/2009.00437); latencies from HELP (Lee et al., 2021,
https://arxiv.org/abs/2106.08630). The file has no learning curves and no training times.
"""

from __future__ import annotations

import numpy as np

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.bench.tables.nb201_features import encode
from espalier.nets.nb201 import SPACE, graphs
from espalier.problem import Metric

FILE = Source(
    "nb201",
    "nb201.parquet",
    "e128fc7dcbb3df12cea195b6697a597283d0780d62999301289e4a9ec8db1b1e",
    "the columns are published with NATS-Bench, NASLib and HELP: see the page on tables in the docs",
)
OPTIONS = {"dataset": ("cifar10", "cifar100")}
_CELLS = 15_625


def load(dataset: str = "cifar10") -> Table:
    """The table of one data set.

    Columns: `val_acc` and `test_acc` in % after 200 epochs (validation on CIFAR-10 is of networks
    trained on half of train; means over seeds), `params` and `macs` counted, `zen` (Zen-score), and
    `lat_DEVICE_BATCH` in ms as measured; the devices without a batch have batch 1 or do not say.
    Errors: `DataError` where the file is absent or another one.
    """
    latencies = [name for name in FILE.columns() if name.startswith("lat_")]
    sources = {
        "val_acc": f"val_acc_{dataset}",
        "test_acc": f"test_acc_{dataset}",
        "params": f"params_{dataset}",
        "macs": f"mflops_{dataset}",
        "zen": f"zen_{dataset}",
    }
    found = FILE.read([*SPACE.names, *sources.values(), *latencies])
    columns = {name: found[source].astype(np.float64) for name, source in sources.items()}
    columns["macs"] = np.round(columns["macs"] * 1e6)
    columns |= {name: found[name].astype(np.float64) for name in latencies}
    codes = np.stack([found[name] for name in SPACE.names], axis=1).astype(SPACE.dtype)
    about = [
        Metric("val_acc", "%", "max", "measured", "validation"),
        Metric("test_acc", "%", "max", "measured", "test"),
        Metric("params"),
        Metric("macs"),
        Metric("zen", "", "max", "estimated"),
        *(Metric(name, "ms", "min", "measured") for name in latencies),
    ]
    return Table(
        name=f"nb201:dataset={dataset}",
        space=SPACE,
        codes=np.asfortranarray(codes),
        columns=columns,
        about={metric.name: metric for metric in about},
        validation="val_acc",
        test="test_acc",
        source=f"NAS-Bench-201 (2020) on {dataset}, {_CELLS:,} cells, 200 epochs, mean over seeds; "
        "latencies from HELP (2021)",
        encode=encode,
        graphs=graphs,
    )
