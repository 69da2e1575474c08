"""A folder written layer by layer, as layers are done with: one file of weights for each."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier.compress.language.files.configuration import expressed
from espalier.compress.language.files.folder import Folder, read_folder
from espalier.compress.language.files.saving import COPIED
from espalier.compress.language.files.stored import INDEX
from espalier.compress.language.hush import hushed
from espalier.compress.language.layer_by_layer.held import linked
from espalier.compress.language.layer_by_layer.pieces import MAPPED, Pieces, renamed
from espalier.compress.language.layer_by_layer.shapes import described, reshape
from espalier.errors import ExportError
from espalier.export import disk


class Rewriter:
    """Writes a model's folder in pieces, the layers `gone` left out; nothing is in its place before
    `finish`. Layers wait in the folder `kept`, where one is given, and can be gone on with.

    Errors: `ExportError` where it can't be written, is the folder that is read, or where the
    layers are none that a configuration can express.
    """

    def __init__(
        self,
        pieces: Pieces,
        place: Path,
        gone: frozenset[int] = frozenset(),
        kept: Path | None = None,
    ) -> None:
        if place.resolve() == pieces.folder.path.resolve():
            raise ExportError(f"{place} is the folder that is read: choose another to write to")
        self.place, self._pieces, self._kept = place, pieces, kept
        self._skeleton: Any = copy.deepcopy(pieces.skeleton)
        stay = [i for i in range(len(pieces.layers)) if i not in gone]
        self._now = {old: new for new, old in enumerate(stay)}  # numbers of layers
        self._where: dict[str, str] = {}
        self._bytes = 0
        self._shapes: dict[int, dict[str, Any]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Rewriter:
        self._stage = self._open.enter_context(disk.staging(self.place))
        if self._kept is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @property
    def folder(self) -> Folder:
        """What was written, read anew."""
        return read_folder(self.place, dtype=self._pieces.folder.dtype)

    def layer(self, index: int, layer: nn.Module, around: Any) -> None:
        """Take a layer as it is now; its weights are rounded to the type that is stored, so that
        what goes on is what is written."""
        from transformers.core_model_loading import revert_weight_conversion

        path, stored = self._pieces.own.layers[0].path, self._pieces.folder.stored
        state: dict[str, Tensor] = {}
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point() and stored.itemsize < tensor.dtype.itemsize:
                tensor.copy_(tensor.to(stored))
            state[f"{path}.{name}"] = tensor
        # what save_pretrained would write: names and experts as folders have them
        state = revert_weight_conversion(around, state)
        now, waits = self._now[index], self._kept or self._stage
        self._write({renamed(name, now): tensor for name, tensor in state.items()}, waits)
        owner, _, last = self._pieces.own.layers[index].path.rpartition(".")
        self._skeleton.get_submodule(owner)[int(last)] = _shape_of(layer)
        self._shapes[index] = described(layer)

    def to_json(self) -> dict[str, Any]:
        """The layers that are written."""
        shapes = {str(index): shape for index, shape in self._shapes.items()}
        return {"where": self._where, "bytes": self._bytes, "shapes": shapes}

    def take(self, data: dict[str, Any]) -> None:
        """Go on behind the layers that `to_json` told of, which wait in the folder `kept`."""
        self._where, self._bytes = dict(data["where"]), int(data["bytes"])
        for index, shape in data["shapes"].items():
            path = self._pieces.own.layers[int(index)].path
            reshape(self._skeleton.get_submodule(path), shape)
            self._shapes[int(index)] = shape

    def finish(self) -> None:
        """Write what lies outside of layers, the configuration, the tokenizer; put all in place."""
        if self._kept is not None:  # they stay there too: a pass may die right behind this
            for name in dict.fromkeys(self._where.values()):
                linked(self._kept / name, self._stage / name)
        part: list[str] = []
        for name in (*self._pieces.entry, *self._pieces.head):
            part.append(name)
            if self._pieces.bytes(part) > MAPPED:
                self._write(self._pieces.read(part, self._pieces.folder.stored), self._stage)
                part = []
        if part:
            self._write(self._pieces.read(part, self._pieces.folder.stored), self._stage)
        total = {"metadata": {"total_size": self._bytes}, "weight_map": self._where}
        (self._stage / INDEX).write_text(json.dumps(total, indent=1))
        config = expressed(self._left())
        config.dtype = self._pieces.folder.stored
        with hushed():
            config.save_pretrained(self._stage)
        for name in (*COPIED, "generation_config.json"):
            if (file := self._pieces.folder.path / name).is_file():
                shutil.copyfile(file, self._stage / name)
        for file in self.place.glob("model*.safetensors*"):  # of a model that was here before
            file.unlink()
        disk.settle(self._stage, self.place)

    def _left(self) -> Any:
        """The skeleton with the layers that are written, in their new places."""
        skeleton = self._skeleton
        stack = self._pieces.own.layers[0].path.rpartition(".")[0]
        kept = list(self._now)
        layers: Any = skeleton.get_submodule(stack)
        skeleton.set_submodule(stack, nn.ModuleList(layers[i] for i in kept))
        types = getattr(skeleton.config, "layer_types", None)
        if types is not None:
            skeleton.config.layer_types = [types[i] for i in kept]
        return skeleton

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        stored, name = self._pieces.folder.stored, f"model-{len(set(self._where.values())):05d}"
        name += ".safetensors"
        kept = {
            key: (tensor.to(stored) if tensor.is_floating_point() else tensor).contiguous()
            for key, tensor in tensors.items()
        }
        save_file(kept, folder / name, metadata={"format": "pt"})
        self._where |= dict.fromkeys(kept, name)
        self._bytes += sum(tensor.nbytes for tensor in kept.values())


def _shape_of(layer: nn.Module) -> nn.Module:
    """A copy of the layer without memory for its weights."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in layer.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in layer.buffers()}
    return copy.deepcopy(layer, memo)
