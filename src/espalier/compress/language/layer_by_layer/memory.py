"""What a pass through a model, layer by layer, takes of memory: said before anything is loaded."""

from __future__ import annotations

from torch import Tensor

from espalier.compress.language.layer_by_layer.pieces import Pieces

SLACK = 24 << 20  # bytes for what a forward pass and loading use beside the tensors counted here
POSITIONS = 256  # logits are made for so many positions at once


def stages(pieces: Pieces, windows: Tensor, batch: int, room: int = 0) -> dict[str, int]:
    """Bytes that each stage takes, beside what the process holds and the hidden states of all
    windows: "entry", "layer 3", "head". `room`: what a visit of a layer takes."""
    own, size = pieces.own, pieces.folder.dtype.itemsize
    rows, length = min(batch, len(windows)), _length(pieces, windows)
    tokens = rows * length
    states = 2 * tokens * own.width * size
    entry = pieces.bytes(pieces.entry)
    head = pieces.bytes(pieces.head) or entry
    logits = 3 * rows * min(POSITIONS, length) * own.vocabulary * 4
    found = {"entry": entry + min(1 << 25, entry), "head": 2 * head + logits + states}
    config = pieces.skeleton.config
    whole = getattr(config, "_attn_implementation", None) == "eager"  # every head's t x t is held
    for i, layer in enumerate(own.layers):
        numbers = tokens * (4 * own.width + 3 * (layer.feed.width if layer.feed else 0))
        if (attention := layer.attention) is not None:
            numbers += 4 * tokens * attention.heads * attention.head
            numbers += 2 * tokens * length * (attention.heads if whole else 1)
        found[f"layer {i}"] = pieces.layer_bytes(i) + numbers * size + states + room
    return {name: needed + SLACK for name, needed in found.items()}


def states_bytes(pieces: Pieces, windows: Tensor) -> int:
    """Bytes of the hidden states of all windows."""
    tokens = len(windows) * _length(pieces, windows)
    return tokens * pieces.own.width * pieces.folder.dtype.itemsize


def shown(size: int) -> str:
    """Bytes in words: "512 MB"."""
    return f"{size / 1e6:.0f} MB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _length(pieces: Pieces, windows: Tensor) -> int:
    return int(windows.shape[1]) if pieces.own.vocabulary else pieces.own.context
