"""How far a pass through layers has come, kept in a folder: one that died goes on behind the last
layer that it finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from espalier.compress.language.layer_by_layer.held import Held
from espalier.errors import ExportError
from espalier.export import disk

_CARD = "pass.json"


class Keeper(Protocol):
    """Something that fills up on the way through layers: it tells what it has as JSON, takes it back."""

    def to_json(self) -> Any: ...

    def take(self, data: Any) -> None: ...


class Journal:
    """A folder that knows which layers of one pass are behind it, the hidden states after them, and
    what was found so far. Its numbers are exact: what goes on gives the same as what never stopped.

    `found`: what a visit finds, kept as well. The folder is for this pass alone; whoever gave it
    removes it. Errors: `ExportError` where it can't be written.
    """

    def __init__(self, folder: Path, found: Keeper | None = None) -> None:
        self.folder, self._found = folder, found

    @property
    def written(self) -> Path:
        """Where layers that are written wait for the rest."""
        return self.folder / "written"

    def begin(self, held: Held, influence: list[float], writer: Keeper | None) -> int:
        """Brings back what was kept, in place; gives the layer to go on with, 0 where none is known."""
        card = self.folder / _CARD
        if not card.is_file():
            return 0
        data = json.loads(card.read_text())
        held.take(self.folder / data["states"])
        influence[:] = data["influence"]
        for keeper, own in ((self._found, data["found"]), (writer, data["written"])):
            if keeper is not None:
                keeper.take(own)
        return int(data["layers"])

    def layer(
        self, number: int, held: Held, influence: Sequence[float], writer: Keeper | None
    ) -> None:
        """Keeps what is after a layer; only then is what was after the one before it let go."""
        states = f"states-{number}"
        data = {
            "layers": number + 1,
            "states": states,
            "influence": list(influence),
            "found": None if self._found is None else self._found.to_json(),
            "written": None if writer is None else writer.to_json(),
        }
        try:
            shutil.rmtree(self.folder / states, ignore_errors=True)
            held.keep(self.folder / states)
            fresh = disk.write(self.folder / f"{_CARD}.new", json.dumps(data).encode())
            fresh.replace(self.folder / _CARD)
        except OSError as error:
            raise ExportError(
                f"can't write to {self.folder}: {error.strerror or error}; free some space, or "
                "choose a folder on another disk"
            ) from error
        for old in self.folder.glob("states-*"):
            if old.name != states:
                shutil.rmtree(old, ignore_errors=True)
