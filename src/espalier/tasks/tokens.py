"""A text as tokens: calibration, validation and held-out windows for a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.errors import DataError
from espalier.problem import Metric
from espalier.tasks.task import Split
from espalier.tasks.tensors import TensorTask

Encode = Callable[[str], Sequence[int]]
BYTES = 256
_SHARES: dict[Split, float] = {"train": 0.4, "validation": 0.3, "test": 0.3}
_BLOCK = 8  # windows that stay together where there are many: neighbours are of one story
_MOST = 16_000_000  # bytes of a text that are read; of a longer one, pieces from all over it
_PIECES = 64
_EDGES = 6 * _PIECES  # bytes of characters that are cut through at both ends


class TokenText(TensorTask):
    """Windows of `context` tokens and the token after each: `windows(split)` is what models read.

    `metrics` are the loss in nats a token and bits a byte of text; `name` is the file's, `tokens`
    how many it has, `bytes_a_token` how long one is on average. As a task, inputs are the tokens as
    floats `(b, context)`, targets `(b, context)`, outputs `(b, context * vocabulary)`.
    """

    metrics = (
        Metric("loss", "nats a token", "min", "measured"),
        Metric("bits_per_byte", "bits", "min", "measured"),
    )

    def __init__(
        self,
        splits: dict[Split, Tensor],
        vocabulary: int,
        name: str,
        tokens: int = 0,
        bytes_a_token: float = 1.0,
    ) -> None:
        self.vocabulary, self.tokens, self.bytes_a_token = vocabulary, tokens, bytes_a_token
        self.context = splits["train"].shape[1] - 1
        pairs = {split: (rows[:, :-1], rows[:, 1:]) for split, rows in splits.items()}
        super().__init__(pairs, self.context * vocabulary, name)
        self._windows = splits

    def windows(self, split: Split, most: int | None = None) -> Tensor:
        """Token ids `(n, context + 1)` of a split, the first `most` of them; they are shuffled."""
        return self._windows[split][:most]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats a token."""
        return cross_entropy(outputs.reshape(-1, self.vocabulary), targets.reshape(-1))

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss and bits a byte over all windows."""
        return self.told(float(self.loss(outputs, targets)))

    def told(self, loss: float) -> dict[str, float]:
        """Every metric of a loss in nats a token."""
        return {"loss": loss, "bits_per_byte": loss / math.log(2) / self.bytes_a_token}

    def _settings(self) -> str:
        return f"{self.classes} {self.bytes_a_token!r}"


def token_text(
    source: str | Path | bytes,
    vocabulary: int,
    context: int,
    encode: Encode | None = None,
    windows: tuple[int, int, int] = (64, 64, 128),
    seed: int = 0,
) -> TokenText:
    """A text file (or its bytes) as windows of `context` tokens for a model of `vocabulary` tokens.

    `encode` gives the tokens of a text, such as `encoder(tokenizer)`; without it bytes are tokens.
    Blocks of neighbouring windows are dealt by `seed` to train (calibration), validation and test,
    so that no token is in two of them; each split has as many `windows` as asked, or what the text
    gives. Of a text above 16 MB pieces from all over it are read.

    Errors: `DataError` for a missing, empty or too short text, one that is no UTF-8, a tokenizer
    that does not fit the vocabulary.
    """
    if context < 2:
        raise DataError(f"a context is 2 tokens or more, got {context}")
    name, raw = _read(source)
    ids = _encoded(name, raw, encode, vocabulary)
    size = context + 1
    total = len(ids) // size
    if total < 3:
        fits = len(ids) // 3 - 1
        hint = f", or set the context to {fits} or less" if fits >= 2 else ""
        raise DataError(
            f"{name!r} has {len(ids)} tokens, too short for a context of {context}: calibration, "
            f"validation and test need a window of {size} each; give a longer text{hint}"
        )
    block = max(1, min(_BLOCK, total // 32))
    blocks = total // block
    order = np.random.default_rng([seed, 0x70C]).permutation(blocks)
    rows = ids[: blocks * block * size].reshape(blocks, block, size)
    splits: dict[Split, Tensor] = {}
    ends = _ends(blocks)
    for (split, (start, end)), wanted in zip(ends.items(), windows, strict=True):
        dealt = rows[order[start:end]].reshape(-1, size)
        mixed = np.random.default_rng([seed, start]).permutation(len(dealt))[: max(wanted, 1)]
        splits[split] = torch.from_numpy(dealt[mixed].copy())
    return TokenText(splits, vocabulary, name, len(ids), len(raw) / len(ids))


def encoder(tokenizer: Any) -> Encode | None:
    """A tokenizer of `transformers` as a function, no special tokens added; None stays None."""
    if tokenizer is None:
        return None

    def encode(text: str) -> Sequence[int]:
        found: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    return encode


def _ends(blocks: int) -> dict[Split, tuple[int, int]]:
    """Where each split's blocks begin and end; one at least for each."""
    test = max(1, round(_SHARES["test"] * blocks))
    validation = max(1, round(_SHARES["validation"] * blocks))
    first = blocks - test - validation
    return {
        "train": (0, first),
        "validation": (first, first + validation),
        "test": (first + validation, blocks),
    }


def _read(source: str | Path | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        return "text", source
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no file {str(source)!r}: give the path of a text for calibration")
    try:
        return path.name, _pieces(path)
    except OSError as error:
        raise DataError(f"can't read the text {str(source)!r}: {error.strerror or error}") from None


def _pieces(path: Path) -> bytes:
    """The whole file, or evenly spaced pieces of whole lines."""
    size = path.stat().st_size
    if size <= _MOST:
        return path.read_bytes()
    out = []
    with open(path, "rb") as file:
        for i in range(_PIECES):
            file.seek(i * (size // _PIECES))
            piece = file.read(_MOST // _PIECES)
            whole = piece[piece.find(b"\n") + 1 : piece.rfind(b"\n") + 1] if i else piece
            out.append(whole or piece)
    return b"".join(out)


def _encoded(name: str, raw: bytes, encode: Encode | None, vocabulary: int) -> NDArray[np.int64]:
    if not raw:
        raise DataError(f"{name!r} is empty: give a text like what the model is used for")
    if encode is None:
        if vocabulary < BYTES:
            raise DataError(
                f"the model has no tokenizer and {vocabulary} tokens, fewer than the 256 bytes: "
                "put its tokenizer.json into its folder"
            )
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)
    text = _decoded(name, raw)
    ids = np.asarray(encode(text), dtype=np.int64)
    if len(ids) and int(ids.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(ids.max())} and the model has {vocabulary}: they do not "
            "belong together"
        )
    return ids


def _decoded(name: str, raw: bytes) -> str:
    """The text. Pieces of a long one may begin and end within a character; more is refused."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8", "ignore")
        if len(raw) >= _MOST // 2 and len(raw) - len(text.encode()) <= _EDGES:
            return text
        raise DataError(
            f"{name!r} is no UTF-8 text: byte {error.start} can't be read; convert it to UTF-8"
        ) from None
