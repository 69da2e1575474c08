"""How well and how fast a language model goes on, with the cache that it would have."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.errors import EspalierError

MakeCache = Callable[[], Any]


@torch.no_grad()
def teacher_forced(
    model: Any,
    tokens: Tensor,
    cache: MakeCache | None = None,
    chunk: int = 0,
    batch: int = 16,
    where: Tensor | None = None,
) -> float:
    """Mean loss in nats a token of windows `(n, t)`, each token predicted from those before it.

    With `cache`, which makes a new one for each batch, tokens go through it as in generation: what
    is rounded or dropped is felt by everything behind it. `chunk` tokens go in at once and see each
    other exactly; 0 takes as many as the cache keeps waiting for their block, which gives what one
    token at a time gives (`Plan.block`), and everything at once without a cache. `where` `(n, t)`
    of bool marks the tokens that count. Errors: `EspalierError` for fewer than 2 tokens a window.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise EspalierError(
            f"windows are (n, t) token ids with t >= 2, got shape {tuple(tokens.shape)}"
        )
    return scored(model, tokens, cache, chunk, batch, where).loss


@dataclass(frozen=True)
class Score:
    """Mean loss in nats a token, the share of tokens that were the likeliest, how many counted, the
    most bytes that the cache of one window held."""

    loss: float
    right: float
    count: int
    peak: float = 0.0


@torch.no_grad()
def scored(
    model: Any,
    tokens: Tensor,
    cache: MakeCache | None = None,
    chunk: int = 0,
    batch: int = 16,
    where: Tensor | None = None,
) -> Score:
    """As `teacher_forced`, with more to tell."""
    loss, right, count, peak = 0.0, 0, 0, 0.0
    for at in range(0, len(tokens), batch):
        rows = tokens[at : at + batch]
        held = None if cache is None else cache()
        losses, hits = _losses(model, rows, held, chunk)
        marked = torch.ones_like(hits) if where is None else where[at : at + batch, 1:]
        loss += float(losses[marked].double().sum())
        right += int(hits[marked].sum())
        count += int(marked.sum())
        peak = max(peak, getattr(held, "peak", 0) / len(rows))
    if count == 0:
        raise EspalierError("no token counts: `where` marks none behind the first of a window")
    return Score(loss / count, right / count, count, peak)


def _losses(model: Any, rows: Tensor, held: Any, chunk: int) -> tuple[Tensor, Tensor]:
    """Loss of every token but the first, and whether it was the likeliest, `(n, t - 1)`."""
    losses, hits = [], []
    looked = {"output_attentions": True} if getattr(held, "wants_attention", False) else {}
    for first, last in stretches(rows.shape[1] - 1, held, chunk):
        out = model(
            input_ids=rows[:, first:last],
            past_key_values=held,
            use_cache=held is not None,
            **looked,
        )
        if looked:
            held.observe(out.attentions)
        logits, labels = out.logits.float(), rows[:, first + 1 : last + 1]
        losses.append(cross_entropy(logits.transpose(1, 2), labels, reduction="none"))
        hits.append(logits.argmax(-1) == labels)
    return torch.cat(losses, 1), torch.cat(hits, 1)


def stretches(length: int, cache: Any, chunk: int) -> list[tuple[int, int]]:
    """How tokens go through a cache: stretches `(first, last)` that end where blocks are coded, so
    that each token sees what it would see alone (`chunk` 0), or of `chunk` tokens."""
    if cache is None:
        return [(0, length)]
    plans = [p for p in getattr(cache, "plans", ()) if not p.plain]
    coded = {(p.sinks + p.window, p.block) for p in plans if p.coded}
    offset = 0
    if not chunk:
        if len(coded) > 1:
            chunk = 1
        elif coded:
            ((offset, chunk),) = coded
        else:
            chunk = 32
    ends = list(range(offset, length, chunk)) if offset else list(range(chunk, length, chunk))
    edges = [0, *(e for e in ends if 0 < e < length), length]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Speed:
    """Tokens a second of decoding: the median of runs and each run; `bytes` of cache at the end."""

    tokens_a_second: float
    runs: tuple[float, ...]
    prompt: int
    new: int
    bytes: int


@torch.no_grad()
def tokens_a_second(
    model: Any, prompt: Tensor, new: int = 64, cache: MakeCache | None = None, repeats: int = 3
) -> Speed:
    """Measures greedy decoding of `new` tokens behind a prompt `(b, t)`, the prompt's pass apart.

    Tokens of all rows count. Without `cache`, transformers' own `DynamicCache` is used.
    """
    from transformers import DynamicCache

    from espalier.compress.language.cache.cache import held_bytes

    runs, size = [], 0
    for _ in range(repeats):
        held = DynamicCache() if cache is None else cache()
        logits = model(input_ids=prompt, past_key_values=held, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(new):
            logits = model(input_ids=token, past_key_values=held, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        runs.append(prompt.shape[0] * new / (time.perf_counter() - start))
        size = held_bytes(held)
    return Speed(median(runs), tuple(runs), prompt.shape[1], new, size)
