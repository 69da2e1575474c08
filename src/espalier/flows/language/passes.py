"""Passes through the layers of a model that does not fit in memory, each once a study."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espalier.compress.language.layer_by_layer.journal import Journal, Keeper
from espalier.compress.language.layer_by_layer.layerwise import Inputs, Layerwise, Visit
from espalier.flows.progress import Display
from espalier.study import Study

UNDERWAY = "underway"  # the folder of passes that are not finished


@dataclass(frozen=True)
class Told:
    """What is recorded of a pass: its loss in nats a token, and the influence of each layer."""

    loss: float
    influence: tuple[float, ...]


class Passes:
    """Takes windows through a model, pass after pass. A pass that is recorded is not made again, and
    one that died goes on behind the last layer that it finished. `peak`: the most resident memory
    of all passes, also of those that another process made."""

    def __init__(self, through: Layerwise, study: Study, show: Display) -> None:
        self.through, self.study, self.show, self.peak = through, study, show, 0
        self._underway = study.folder / UNDERWAY
        self._underway.mkdir(exist_ok=True)
        for left in study.folder.glob(".export-*"):  # half written when a process was killed
            shutil.rmtree(left, ignore_errors=True)

    def __call__(
        self,
        name: str,
        windows: Tensor,
        visit: Visit | None = None,
        *,
        found: Keeper | None = None,
        through: Layerwise | None = None,
        **how: Any,
    ) -> Told:
        """One pass, as `Layerwise.run` makes it; what `found` keeps is as it is after it."""
        model, folder = through or self.through, self._underway / name.replace(": ", " ")
        count = len(model.pieces.layers)

        def run() -> dict[str, Any]:
            folder.mkdir(exist_ok=True)
            self.show.phase(name, count)
            journal = Journal(folder, found)
            done = model.run(windows, _told(visit, self.show, count), journal=journal, **how)
            kept = None if found is None else found.to_json()
            return {
                "loss": done.loss, "peak": done.peak, "influence": done.influence, "found": kept,
            }  # fmt: skip

        known = self.study.once(f"pass/{name}", run)
        if found is not None:
            found.take(known["found"])
        shutil.rmtree(folder, ignore_errors=True)
        self.peak = max(self.peak, known["peak"])
        return Told(known["loss"], tuple(known["influence"]))


def _told(visit: Visit | None, show: Display, total: int) -> Callable[..., None]:
    def told(number: int, layer: nn.Module, inputs: Inputs) -> None:
        if visit is not None:
            visit(number, layer, inputs)
        show.step(number + 1, total, f"layer {number}")

    return told
