"""Runs a small shrink in its own process; kills itself where a phase begins, as a lost machine does.

`python shrink_driver.py FOLDER PHASE [resume]`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import espalier as esp
from espalier.flows.progress import Silent
from quick import QUICK
from shrink_toys import task, trained


class Killing(Silent):
    """SIGKILL in the second step of a phase whose name begins with `wanted`."""

    def __init__(self, wanted: str) -> None:
        self.wanted, self.now = wanted, ""

    def phase(self, name: str, total: int) -> None:
        """Remembers where we are."""
        self.now = name

    def step(self, done: int, total: int, text: str = "") -> None:
        """No cleaning up, no last words."""
        if self.now.startswith(self.wanted) and done >= 2:
            os.kill(os.getpid(), signal.SIGKILL)


def shrunk(folder: Path, **more: Any) -> esp.Shrunk:
    """The shrink that is killed, or goes on: short, and without a limit on time."""
    return esp.shrink(
        trained(), task(), within={"bytes": "60%"}, decisions="width:multiple=4/steps=3,depth",
        solver="allocate", recipe=esp.Recipe(epochs=2, lr=0.02), budget="10 trials",
        on=QUICK, seed=3, out=folder, **more,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    shrunk(Path(sys.argv[1]), progress=Killing(sys.argv[2]), resume="resume" in sys.argv)
