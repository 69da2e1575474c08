"""A folder's model in pieces that are loaded apart: the entry, each layer, the head."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import KINDS, Experts, anatomy
from espalier.compress.language.files.folder import Folder, load, model_class
from espalier.errors import DataError

MAPPED = 32 << 20  # bytes read from a file before it is closed, which gives its pages back
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.")


class Pieces:
    """What of a folder belongs where, without loading it.

    - `skeleton`: the whole model without memory for weights; `own`: its anatomy.
    - `layers`, `entry`, `head`: names of tensors in the files.

    Errors: `DataError` where a layer has no tensors.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self._class = folder, model_class(folder.config)
        with torch.device("meta"):
            self.skeleton: Any = self._class(copy.deepcopy(folder.config)).eval()
        self.own = anatomy(self.skeleton)
        self._prefix = self.skeleton.base_model_prefix
        heads = tuple(f"{n}." for n, _ in self.skeleton.named_children() if n != self._prefix)
        self.files: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}  # numbers in each tensor
        self.layers: list[list[str]] = [[] for _ in self.own.layers]
        self.entry: list[str] = []
        self.head: list[str] = []
        for name in self._read_names():
            if found := _LAYER.search(name):
                if int(found[1]) < len(self.layers):
                    self.layers[int(found[1])].append(name)
            else:
                (self.head if name.startswith(heads) else self.entry).append(name)
        for i, names in enumerate(self.layers):
            if not names:
                raise DataError(f"{folder.path}: no tensors of layer {i} of {len(self.layers)}")

    def _read_names(self) -> Iterable[str]:
        from safetensors import safe_open

        for file in self.folder.weights:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self.files[name] = file
                    self.sizes[name] = _count(opened.get_slice(name).get_shape())
                    yield name

    def bytes(self, names: Iterable[str], dtype: torch.dtype | None = None) -> int:
        """Bytes of tensors in memory."""
        return sum(self.sizes[name] for name in names) * (dtype or self.folder.dtype).itemsize

    def layer_bytes(self, index: int) -> int:
        """The most that loading and holding a layer takes: experts are joined, so held twice."""
        names = self.layers[index]
        held = self.bytes(names) + min(MAPPED, self.bytes(names, self.folder.stored))
        largest = max(self.sizes[name] for name in names) * self.folder.stored.itemsize
        joined = isinstance(self.own.layers[index].feed, Experts)
        return held + largest + (self.bytes(names) if joined else 0)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by name, copied out of their files; in the folder's `dtype` by default."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        opened: Any = None
        at, done = None, 0
        for name in sorted(names, key=lambda n: (str(self.files[n]), n)):
            if self.files[name] != at or done > MAPPED:
                opened = None  # closed before the next is open
                at, done = self.files[name], 0
                opened = safe_open(at, "pt")
            tensor = opened.get_tensor(name)
            done += tensor.nbytes
            wanted = (dtype or self.folder.dtype) if tensor.is_floating_point() else tensor.dtype
            found[name] = tensor.to(wanted, copy=True)
        return found

    def layer(self, index: int) -> tuple[nn.Module, Any]:
        """One layer with its weights, and the one-layer model of `transformers` around it, whose
        other parts are as small as they can be. Errors: `DataError`, naming what is missing."""
        config = self._config(1)
        config.vocab_size = config.num_labels = 1
        if (types := getattr(self.folder.config, "layer_types", None)) is not None:
            config.layer_types = [types[index]]
        if hasattr(config, "mlp_only_layers"):
            mixed = isinstance(self.own.layers[index].feed, Experts)
            config.mlp_only_layers, config.decoder_sparse_step = ([] if mixed else [0]), 1
        if self.own.kind == "vit":
            config.image_size = config.patch_size
        tensors = self.read(self.layers[index])
        state = {renamed(name, 0): tensor for name, tensor in tensors.items()}
        path = self.own.layers[0].path
        made = load(self._class, None, config, self.folder.dtype, state, within=path)
        layer = made.get_submodule(path)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
            if getattr(module, "scale_attn_by_inverse_layer_idx", False):
                module.scaling = module.scaling / (index + 1)  # it was made as the first
        return layer, made

    def base(self) -> Any:
        """The model below its head, with all weights but those of layers, of which it has none."""
        whole = self.skeleton.base_model
        extra = {}
        if hasattr(whole, "pooler"):
            extra = {"add_pooling_layer": whole.pooler is not None}
        state = self.read(self.entry)
        made = load(type(whole), None, self._config(0), self.folder.dtype, state, "", **extra)
        count, types = len(self.own.layers), getattr(self.folder.config, "layer_types", None)
        for module in made.modules():
            if hasattr(module, "config"):  # its loop over layers is to run in full
                module.config.num_hidden_layers = count
                if types is not None:
                    module.config.layer_types = list(types)
            if hasattr(module, "has_sliding_layers"):
                module.has_sliding_layers = "sliding_attention" in (types or ())
        return made

    def stack(self, base: Any) -> tuple[Any, str]:
        """The module of a base that holds the list of layers, and the list's name there."""
        parent, _, name = KINDS[self.own.kind].layers.rpartition(".")
        return base.get_submodule(parent), name

    def whole(self) -> Any:
        """The model with nothing but its head in memory; what is below is to be set by the caller
        under `base_model_prefix`."""
        with torch.device("meta"):
            made = self._class(self._config(0)).eval()
        setattr(made, self._prefix, nn.Identity())
        tied = getattr(made, "_tied_weights_keys", None) or {}
        for name, parameter in list(made.named_parameters()):
            source = self._source(name, tied if isinstance(tied, dict) else {})
            owner, _, last = name.rpartition(".")
            tensor = self.read([source])[source]
            if tensor.shape != parameter.shape:
                raise DataError(f"{self.folder.path}: {source} has shape {tuple(tensor.shape)}")
            setattr(made.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
        for name, parameter in list(made.named_parameters(remove_duplicate=False)):
            if parameter.is_meta:  # a second name of one that was just set
                owner, _, last = name.rpartition(".")
                setattr(made.get_submodule(owner), last, made.get_parameter(tied[name]))
        return made

    def _source(self, name: str, tied: dict[str, str]) -> str:
        """The name in the files of a tensor of the head. Errors: `DataError`."""
        for wanted in (name, tied.get(name, name), *(k for k, v in tied.items() if v == name)):
            short = wanted.removeprefix(f"{self._prefix}.")
            for found in (wanted, short, f"{self._prefix}.{short}"):
                if found in self.files:
                    return found
        raise DataError(f"{self.folder.path}: {name} is missing")

    def _config(self, layers: int) -> Any:
        config = copy.deepcopy(self.folder.config)
        config.num_hidden_layers = layers
        config.pad_token_id = None
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
        return config


def renamed(name: str, index: int) -> str:
    """The name of a layer's tensor with another number of the layer."""
    found = cast("re.Match[str]", _LAYER.search(name))
    return f"{name[: found.start(1)]}{index}{name[found.end(1) :]}"


def _count(shape: Iterable[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
