"""A small byte model that looks back: it has learned to go on with what stood far before.

The byte models of `language` read the standard library's source with little use of what lies more
than some tens of bytes back, so that a cache can lose almost everything unseen. This one is smaller,
and half of what it learns from is copies: strings of letters that come again.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.recipes._parts import language
from espalier.train.seeds import global_seed, mixed

STEPS = 2400
_SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_TOKENS = 1024  # a step
_SHARES = ((0.55, 64), (0.85, 256), (1.0, 512))  # up to this share of the steps, so long rows
_LENGTH = 32  # letters of a string that comes again
_CUE = 8  # of which so many are seen again before answers count


def copies(count: int, seed: int, context: int) -> tuple[Tensor, Tensor]:
    """Source with a string of letters in its first half that comes again in its second:
    bytes `(count, context)`, and which of them the first string tells, bool."""
    rng = np.random.default_rng([seed, 0xC0B1])
    rows = language.windows("train", count, mixed(seed, 1), context).numpy().copy()
    told = np.zeros((count, context), dtype=bool)
    half, length = context // 2, min(_LENGTH, context // 4)
    for row, mask in zip(rows, told, strict=True):
        string = rng.integers(ord("a"), ord("z") + 1, length)
        first = int(rng.integers(0, half - length + 1))
        again = int(rng.integers(half, context - length + 1))
        row[first : first + length] = row[again : again + length] = string
        mask[again + length * _CUE // _LENGTH : again + length] = True
    return torch.from_numpy(rows), torch.from_numpy(told)


def repeats(count: int, seed: int, context: int) -> Tensor:
    """Strings of 8 to 96 letters, again and again: bytes `(count, context)`."""
    rng = np.random.default_rng([seed, 0x2E2E])
    rows = np.empty((count, context), dtype=np.int64)
    for row in rows:
        most = min(96, context // 2)
        string = rng.integers(ord("a"), ord("z") + 1, int(rng.integers(8, most + 1)))
        row[:] = np.resize(string, context)
    return torch.from_numpy(rows)


def looking_model(out: Path | None, steps: int = STEPS, seed: int = 0, **sizes: int) -> Any:
    """The trained `LlamaForCausalLM`, float32; read from a folder under `out` where it is there.

    Training that was stopped goes on from its last 50 steps, with a new optimiser.
    """
    transformers = language._transformers()
    if out is None:
        return _trained(None, steps, seed, sizes)
    name = "-".join(["looking", *(f"{k}{v}" for k, v in sorted(sizes.items()))])
    folder = out / f"{name}-{steps}-{seed}"
    if not (folder / "training.json").exists():
        part = folder.with_name(folder.name + ".part")
        model = _trained(part, steps, seed, sizes)
        model.save_pretrained(part)
        (part / "training.json").write_text(json.dumps({"steps": steps, "loss": model.told}))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _trained(part: Path | None, steps: int, seed: int, sizes: dict[str, int]) -> Any:
    model, first = language.fresh_model("dense", seed, **{**_SIZES, **sizes}), 0
    if part is not None and (part / "at.json").exists():
        model = type(model).from_pretrained(part)
        first = int(json.loads((part / "at.json").read_text())["step"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    last: list[float] = []
    with global_seed(seed):
        for step in range(first, steps):
            rate = 3e-3 * min(1.0, (step - first + 1) / 50)
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate
            ids = _batch(mixed(seed, step), next(n for s, n in _SHARES if step < s * steps))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            last = [*last[-99:], float(loss.detach())]
            if part is not None and step % 50 == 49:
                model.save_pretrained(part)
                (part / "at.json").write_text(json.dumps({"step": step + 1, "loss": last[-1]}))
    model.told = sum(last) / max(len(last), 1)
    return model.eval()


def _batch(seed: int, context: int) -> Tensor:
    """A quarter source; strings that only repeat; a quarter copies in source (or both in turn)."""
    rows = _TOKENS // context
    if rows < 4:
        plain = language.windows("train", 1, seed, context)
        make = seed % 2
        return torch.cat(
            [plain, repeats(1, seed, context) if make else copies(1, seed, context)[0]]
        )
    each = rows // 4
    plain = language.windows("train", each, seed, context)
    again = copies(each, seed, context)[0]
    return torch.cat([plain, again, repeats(rows - 2 * each, seed, context)])
