"""The Llama of 260,032 weights that writes children's stories, and its tokens.

Trained by A. Karpathy on TinyStories (Eldan & Li, 2023; https://github.com/karpathy/llama2.c, MIT).
"""

from __future__ import annotations

import json
import lzma
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from espalier.errors import DataError
from espalier.nets.llama import Llama, Sizes
from espalier.tasks.sources import read_npz

FIRST_MERGE = 259  # pieces below are marks and the 256 bytes
_BYTE = 3  # the piece of byte 0
_NAMES = {
    "query": "wq",
    "key": "wk",
    "value": "wv",
    "out": "wo",
    "gate": "w1",
    "down": "w2",
    "up": "w3",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
}


def data_file(*parts: str) -> Path:
    """A file under ESPALIER_DATA. Errors: `DataError` says what is missing."""
    root = os.environ.get("ESPALIER_DATA", "")
    if not root:
        raise DataError(f"set ESPALIER_DATA to a folder that holds {'/'.join(parts)}")
    path = Path(root).expanduser().joinpath(*parts)
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}: the folder of ESPALIER_DATA must hold it")
    return path


def read_text(*parts: str) -> str:
    """A text under ESPALIER_DATA, compressed with xz."""
    return lzma.decompress(data_file(*parts).read_bytes()).decode()


def model() -> Llama:
    """The model with its weights, ready to run; float32."""
    config = _config()
    sizes = Sizes(
        vocabulary=config["vocab_size"],
        width=config["dim"],
        hidden=config["hidden_dim"],
        depth=config["n_layers"],
        heads=config["n_heads"],
        groups=config["n_kv_heads"],
        context=config["max_seq_len"],
        theta=config["rope_theta"],
        eps=config["rms_eps"],
    )
    arrays = read_npz(data_file("weights", "llama_stories260k.npz"))
    weights = {"embed.weight": arrays["tok_embeddings"], "norm.weight": arrays["norm"]}
    for name, key in _NAMES.items():
        weights |= {f"blocks.{i}.{name}.weight": w for i, w in enumerate(arrays[key])}
    made = Llama(sizes)
    made.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return made.eval()


def _config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data_file("weights", "llama_stories260k.json").read_text())
    return found


class Tokens:
    """Text to tokens and back: byte pairs, the pair whose piece comes first is joined first."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self._ids = {piece: i for i, piece in enumerate(pieces) if i >= FIRST_MERGE}
        self._word = cache(self._split)

    @classmethod
    def read(cls) -> Tokens:
        """The model's own."""
        return cls(_config()["tokenizer_pieces"])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, a space put before it; no piece goes over the start of a word."""
        words = ("\u2581" + text.replace(" ", "\u2581")).split("\u2581")[1:]
        return [token for word in words for token in self._word("\u2581" + word)]

    def _split(self, word: str) -> tuple[int, ...]:
        parts = list(word)
        while True:
            joined = (self._ids.get(a + b) for a, b in pairwise(parts))
            found = [(i, at) for at, i in enumerate(joined) if i is not None]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out: list[int] = []
        for part in parts:
            known = self._ids.get(part)
            out += [known] if known is not None else [_BYTE + b for b in part.encode()]
        return tuple(out)

    def bytes_of(self, token: int) -> bytes:
        """The text that a token stands for."""
        if _BYTE <= token < FIRST_MERGE:
            return bytes([token - _BYTE])
        return self.pieces[token].replace("\u2581", " ").encode()
