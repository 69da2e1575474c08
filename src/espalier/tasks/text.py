"""Text as bytes: predict the next one at every place of a window.

Without a source, the text is Python's own standard library as installed: real text, a few megabytes
of it, wherever Python runs.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.errors import DataError
from espalier.problem import Metric
from espalier.tasks.task import Split
from espalier.tasks.tensors import TensorTask

BYTES = 256
_SHARES: dict[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


class TextTask(TensorTask):
    """Windows of bytes `(b, context)` as floats; targets `(b, context)`, the byte after each.

    Networks give `(b, context * 256)`. The metric is bits per byte.
    """

    metrics = (Metric("bits_per_byte", "bits", "min", "measured"),)

    def __init__(self, splits: dict[Split, Tensor], name: str) -> None:
        self.context = splits["train"].shape[1] - 1
        pairs = {split: (rows[:, :-1], rows[:, 1:].long()) for split, rows in splits.items()}
        super().__init__(pairs, self.context * BYTES, name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, in nats, over all places."""
        return cross_entropy(outputs.reshape(-1, BYTES), targets.reshape(-1))

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Bits per byte over all windows."""
        return {"bits_per_byte": float(self.loss(outputs, targets)) / math.log(2)}


def text(
    source: str | Path | bytes | None = None,
    context: int = 64,
    train: int = 4000,
    validation: int = 500,
    test: int = 500,
    seed: int = 0,
) -> TextTask:
    """Windows of `context` bytes of a text: a file's path, bytes, or the standard library.

    The text is cut into blocks of 4 KiB, which `seed` deals to the splits, so that no byte is in
    two of them. Errors: `DataError` where there is no such file, or too little text.
    """
    raw, name = _read(source)
    size = context + 1
    block = max(4096 // size, 1) * size
    blocks = len(raw) // block
    wanted: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    rng = np.random.default_rng([seed, 0x7E87])
    order = rng.permutation(blocks)
    data = np.frombuffer(raw, dtype=np.uint8)[: blocks * block].reshape(blocks, -1, size)
    splits: dict[Split, Tensor] = {}
    start = 0
    for split, share in _SHARES.items():
        end = start + int(share * blocks)
        rows = data[order[start:end]].reshape(-1, size)
        if len(rows) < wanted[split] or wanted[split] < 1:
            raise DataError(
                f"{split}={wanted[split]} windows of {context} bytes asked of {name!r}, which has "
                f"{len(rows)} for it: ask for fewer (1 or more), or give a longer text"
            )
        chosen = rng.permutation(len(rows))[: wanted[split]]
        splits[split] = torch.from_numpy(rows[chosen].copy())
        start = end
    return TextTask(splits, name)


def _read(source: str | Path | bytes | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "bytes"
    if source is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return b"".join(f.read_bytes() for f in files), "standard library"
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no file {str(source)!r}: give the path of a text, or its bytes")
    return path.read_bytes(), path.name
