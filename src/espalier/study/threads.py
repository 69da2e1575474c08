"""One thread a trial, so that numbers do not depend on where a trial runs.

Floating-point sums depend on how they are divided among threads. PyTorch is not imported here: it
is told only where something else has loaded it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # a waiting thread sleeps: spinning threads of several processes starve each other
    "OMP_WAIT_POLICY": "passive",
}


def limit_torch() -> int | None:
    """Sets PyTorch to one thread where it is loaded; gives the number it had, else None."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_num_threads"):
        return None
    before = int(torch.get_num_threads())
    if before != 1:
        torch.set_num_threads(1)
    return before


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch and for the array libraries in this process, restored at the end."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    environment = {k: os.environ.get(k) for k in ONE_THREAD}
    os.environ.update(ONE_THREAD)  # for a library that is first imported inside
    before = limit_torch()
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        if before is not None and before != 1:
            sys.modules["torch"].set_num_threads(before)
