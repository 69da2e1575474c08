"""Tokens a second of generation before and after a shrink that decides on the cache: measured once,
behind as many tokens as the limit names."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.cache.cache import held_bytes
from espalier.flows.language.building import CACHED
from espalier.flows.language.job import LanguageJob
from espalier.flows.speed import threads
from espalier.space import Candidate

_NEW, _RUNS = 12, 3  # tokens of a run, runs of each model
_CHUNK = 128  # tokens that are read at once: masks of heads with spans grow with their square
_SHARE, _LEAST = 0.03, 2.0  # of the whole time, for reading the context once; seconds at least
_NAMES = ("original", "shrunk")


def generation(
    job: LanguageJob, candidate: Candidate, make: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Tokens a second of the original and of an answer (`make` gives its model), each with its own
    cache; recorded. Empty where nothing about the cache is limited or decided.

    Greedy decoding of one sequence: the text ends at as many tokens as kv_bytes is limited at, or
    where the model's positions end; where reading so many takes too long, sooner. Runs of the two
    models alternate, so that other work on the machine slows both; the middle run counts.
    """
    decided = {d.name.partition(":")[0] for d in job.family.space.decisions}
    end = min(job.context, job.family.anatomy.context)
    if decided.isdisjoint(CACHED) and "kv_bytes" not in {x.metric for x in job.limits}:
        return {}
    if end <= _RUNS:
        return {}

    def measure() -> dict[str, Any]:
        job.show.phase("tokens a second of generation", len(_NAMES) * _RUNS)
        models = (job.family.model, make())
        caches = (None, job.family.cache(candidate))
        with ExitStack() as stack:
            stack.enter_context(threads(job.asked.threads))
            stack.enter_context(torch.inference_mode())
            texts = [_Text(*pair) for pair in zip(models, caches, strict=True)]
            behind = max(1, end - _NEW * _RUNS)
            texts[0].read(min(behind, _CHUNK))
            texts[0].begin()  # not counted: what is done once
            behind = _affordable(job, texts[0], behind)
            for text in texts:
                text.read(behind)
            new = max(1, min(_NEW, (end - behind) // _RUNS))
            runs: list[list[float]] = [[], []]
            for i in range(_RUNS):
                for own, text in zip(runs, texts, strict=True):
                    own.append(text.write(new))
                    job.show.step(len(_NAMES) * i + len(own), len(_NAMES) * _RUNS)
        found: dict[str, Any] = {
            name: {"tokens_a_second": median(own), "runs": own, "cache_bytes": text.held}
            for name, own, text in zip(_NAMES, runs, texts, strict=True)
        }
        return {
            **found, "behind": behind, "new": new, "asked": job.context,
            "threads": job.asked.threads, "stored_bits": 8 * job.folder.stored.itemsize,
        }  # fmt: skip

    done: dict[str, Any] = job.study.once(f"tokens a second/{candidate.id}", measure)
    return done


def _affordable(job: LanguageJob, original: _Text, behind: int) -> int:
    """As many tokens of context as can be read in a small share of the time."""
    if job.budget.seconds is None or behind <= _CHUNK:
        return behind
    began = time.perf_counter()
    original.read(_CHUNK)
    each = (time.perf_counter() - began) / _CHUNK
    original.begin()
    return min(behind, max(_CHUNK, int(max(_LEAST, _SHARE * job.budget.seconds) / each)))


class _Text:
    """One sequence that a model reads and goes on with."""

    def __init__(self, model: Any, make_cache: Callable[[], Any] | None) -> None:
        self._model, self._make = model, make_cache
        self._rows = int(model.get_input_embeddings().weight.shape[0])
        self.begin()

    def begin(self) -> None:
        """With an empty cache."""
        self._cache = None if self._make is None else self._make()  # None: the model's own
        self._next = torch.zeros(1, 1, dtype=torch.long)

    def read(self, tokens: int) -> None:
        """Takes random tokens in."""
        draw = torch.Generator().manual_seed(0)
        for part in torch.split(torch.randint(self._rows, (1, tokens), generator=draw), _CHUNK, 1):
            self._step(part)

    def write(self, tokens: int) -> float:
        """Goes on greedily; gives tokens a second."""
        began = time.perf_counter()
        for _ in range(tokens):
            self._step(self._next)
        return tokens / (time.perf_counter() - began)

    def _step(self, ids: Tensor) -> None:
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @property
    def held(self) -> int:
        """Bytes of the cache now."""
        return held_bytes(self._cache)


def told(found: dict[str, Any]) -> str:
    """One sentence on it; '' where it was not measured."""
    if not found:
        return ""
    before, after = (found[name] for name in _NAMES)
    many, ends = found["threads"] > 1, found["behind"] + found["new"] * _RUNS
    short = "" if ends >= found["asked"] else f" (the limit's {found['asked']:,} were not reached)"
    stored = found.get("stored_bits", 32)
    halved = "" if stored == 32 else f", in 32-bit floats where the folder has {stored} bits"
    return (
        f"Generation behind {found['behind']:,} tokens{short}: {after['tokens_a_second']:.3g} tokens a "
        f"second (runs of {min(after['runs']):.3g} to {max(after['runs']):.3g}), the original "
        f"{before['tokens_a_second']:.3g} ({min(before['runs']):.3g} to {max(before['runs']):.3g}); "
        f"at its end the cache holds {after['cache_bytes']:,} bytes, the original's "
        f"{before['cache_bytes']:,}{halved}. Measured by torch and transformers on "
        f"{found['threads']} thread{'s' if many else ''}, the middle of {_RUNS} runs of {found['new']} tokens: what "
        "saves memory here need not save time."
    )
