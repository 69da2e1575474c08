"""The byte models that recipes on language models share: a dense one and one of eight experts.

Decoders of six blocks of width 128, trained here on the source of Python's standard library and on
tables to look up; context 256, in the last fifth of the training 512.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import DataError, MissingExtra
from espalier.train.loop import Diverged
from espalier.train.seeds import global_seed, mixed

Kind = Literal["dense", "experts"]
Part = Literal["train", "fresh"]
CONTEXT = 256
STEPS = 2000
_LONG = 512  # what positions go up to
_PLACES = 2048  # tokens a step
_BLOCK = 4096  # bytes of text that stay together
_FRESH = 5  # one block of so many is never trained on
_ROUTER = 0.02  # weight of the balance of experts
_log = logging.getLogger(__name__)


def byte_model(
    kind: Kind, seed: int = 0, steps: int = STEPS, out: str | Path | None = None, **sizes: Any
) -> Any:
    """The trained `LlamaForCausalLM` or `MixtralForCausalLM`, float32, ready to run.

    With `out` it is read from `byte_folder`, and trained first where that is not there. `sizes`
    change the configuration (a smoke run's).
    """
    if out is None:
        return _trained(kind, seed, steps, sizes)
    transformers = _transformers()
    folder = byte_folder(kind, seed, steps, out, **sizes)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def byte_folder(
    kind: Kind, seed: int = 0, steps: int = STEPS, out: str | Path = ".", **sizes: Any
) -> Path:
    """The folder of the model under `out`, with `fresh.txt`, which it was not trained on.

    Its name holds what the weights depend on but the text: that is the installed Python's.
    """
    name = "-".join([f"bytes-{kind}", *(f"{k}{v}" for k, v in sorted(sizes.items()))])
    folder = Path(out) / f"{name}-{steps}-{seed}"
    if not (folder / "fresh.txt").exists():  # written last
        model = _trained(kind, seed, steps, sizes)
        begun = folder.with_name(folder.name + ".part")
        shutil.rmtree(begun, ignore_errors=True)
        model.save_pretrained(begun)
        (begun / "training.json").write_text(json.dumps({"kind": kind, "seed": seed, **model.told}))
        (begun / "fresh.txt").write_bytes(byte_text("fresh"))
        shutil.rmtree(folder, ignore_errors=True)
        begun.rename(folder)
    return folder


@cache
def byte_text(part: Part) -> bytes:
    """The standard library's source: "train", what the models learn, or "fresh", one block of five.

    A block is about 4 KiB of whole lines.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise DataError("no source of the standard library here: install Python with its .py files")
    blocks: list[bytes] = []
    held, size = [], 0
    for line in b"".join(f.read_bytes() for f in files).splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= _BLOCK:
            blocks.append(b"".join(held))
            held, size = [], 0
    chosen = np.random.default_rng(0x7E87).permutation(len(blocks))
    fresh = sorted(chosen[: len(blocks) // _FRESH])
    where = set(fresh) if part == "fresh" else set(range(len(blocks))) - set(fresh)
    return b"".join(blocks[i] for i in sorted(where))


def windows(part: Part, count: int, seed: int, context: int = CONTEXT) -> Tensor:
    """So many windows of a text, `(count, context)` of bytes as int64, from places drawn by a seed."""
    return _at_random(byte_text(part), count, context, np.random.default_rng([seed, 0x5EED]))


def _at_random(text: bytes, count: int, context: int, rng: np.random.Generator) -> Tensor:
    data = np.frombuffer(text, dtype=np.uint8)
    starts = rng.integers(0, len(data) - context, count)
    return torch.from_numpy(data[starts[:, None] + np.arange(context)].astype(np.int64))


def lookups(count: int, seed: int, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Tables to look up: bytes `(count, context)`, and which of them are answers, bool.

    A row is lines such as `kx=07`: each key twice, in two orders, the second time with the same
    number; those digits are the answers, which nothing but the first line tells.
    """
    rng = np.random.default_rng([seed, 0x100C])
    entries = context // 12
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
    rows = np.full((count, context), ord("\n"), dtype=np.uint8)
    asked = np.zeros((count, context), dtype=bool)
    for row, mask in zip(rows, asked, strict=True):
        keys = rng.choice(26 * 26, entries, replace=False)
        digits = rng.integers(0, 10, (entries, 2))
        for again in (0, 1):
            for place, i in enumerate(rng.permutation(entries)):
                at = (again * entries + place) * 6
                row[at : at + 2] = letters[[keys[i] // 26, keys[i] % 26]]
                row[at + 2] = ord("=")
                row[at + 3 : at + 5] = digits[i] + ord("0")
                mask[at + 3 : at + 5] = bool(again)
    return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(asked)


def fresh_model(kind: Kind, seed: int = 0, **sizes: Any) -> Any:
    """The model with random weights."""
    transformers = _transformers()
    shared = {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _LONG,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "dense":
        own: dict[str, Any] = {"intermediate_size": 320, "tie_word_embeddings": True}
        config = transformers.LlamaConfig(**{**shared, **own, **sizes})
    else:
        own = {
            "intermediate_size": 160,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": _ROUTER,
        }
        config = transformers.MixtralConfig(**{**shared, **own, **sizes})
    with global_seed(seed):
        return transformers.AutoModelForCausalLM.from_config(config)


def _trained(kind: Kind, seed: int, steps: int, sizes: dict[str, Any]) -> Any:
    model = fresh_model(kind, seed, **sizes)
    model.told = {"steps": steps, "loss": _fit(model, steps, seed, kind == "experts")}
    return model


def _fit(model: nn.Module, steps: int, seed: int, routed: bool, lr: float = 3e-3) -> float:
    """AdamW, a warm-up of a tenth and half a cosine; the mean loss of the last tenth."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    last: list[float] = []
    model.train()
    for step in range(steps):
        rise = min(1.0, (step + 1) / max(0.1 * steps, 1))
        rate = lr * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = _batch(mixed(seed, step), CONTEXT if step < 0.8 * steps else _LONG)
        options = {"output_router_logits": True} if routed else {}
        loss = model(input_ids=x, labels=x, use_cache=False, **options).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"the loss is NaN in step {step + 1}: lower the rate, {lr:.3g}")
        if step >= 0.9 * steps - 1:
            last.append(value)
        if step % 100 == 99:
            _log.info("step %d of %d: loss %.3f", step + 1, steps, value)
    model.eval()
    return sum(last) / max(len(last), 1)


def _batch(seed: int, context: int) -> Tensor:
    """One row in eight is a table to look up, the others are text; at least one is a table."""
    rows = _PLACES // context
    tables = max(rows // 8, 1)
    text = windows("train", rows - tables, seed, context)
    return torch.cat([text, lookups(tables, seed, context)[0]])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
    return transformers
