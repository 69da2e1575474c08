"""How much a change of a language model harms it, seen on a few windows of its calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from espalier.compress.language.repair.refit import Reconstruction
from espalier.errors import EspalierError, unknown
from espalier.flows.language.building import early, late, reshaped
from espalier.space import Candidate

MEASURES = ("divergence", "loss", "gradient")
MakeCache = Callable[[], Any]
_KEPT = 2**28  # numbers: logits of the original beyond this are computed again for each candidate
_TOKENS = 2048  # in one pass
_CHUNK = 32  # tokens that go through a cache with decisions at once


class LanguageHarm:
    """Builds candidates of a family and reads their harm on windows `(n, t + 1)` of token ids.

    - "divergence": Kullback-Leibler divergence of the next token's distribution from the original's,
      in nats a token.
    - "loss": the loss itself, in nats a token.
    - "gradient": the squared change of the logits, weighted by the squared gradient of the loss
      there (the diagonal of the empirical Fisher matrix; LeCun et al., 1990).

    With `mend` a candidate of another shape is judged after layer-wise reconstruction: what the
    repair will put back is no harm. A candidate whose outputs are not finite has infinite harm. Decisions on the cache are seen by
    passes through that cache, 32 tokens at a time.
    """

    def __init__(
        self,
        family: Any,
        windows: Tensor,
        measure: str = "divergence",
        mend: Reconstruction | None = None,
    ) -> None:
        if measure not in MEASURES:
            raise EspalierError(unknown("measure of harm", measure, MEASURES))
        self.family, self.windows, self.measure, self.mend = family, windows, measure, mend
        self._kept: list[Tensor] | None = None

    @property
    def samples(self) -> int:
        """How many windows are read."""
        return len(self.windows)

    def harm(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """The harm `(n,)`."""
        return np.array([self.judged(c)[self.measure] for c in candidates])

    def judged(self, candidate: Candidate) -> dict[str, float]:
        """The harm, and the loss in nats a token, of one candidate."""
        if self.mend is not None and reshaped(self.family, candidate):
            shape = early(self.family, candidate)
            self.mend.refit(shape)
            model: Any = late(self.family, shape, candidate)
        else:
            model = self.family.build(candidate)
        return self.read(model, felt(self.family, candidate, self.windows))

    def read(self, model: Any, make_cache: MakeCache | None = None) -> dict[str, float]:
        """The harm and the loss of a model in memory."""
        total = {self.measure: 0.0, "loss": 0.0}
        with torch.inference_mode():
            for ids, before in zip(batches(self.windows), self._originals(), strict=True):
                after = logits(model, ids[:, :-1], make_cache)
                loss = cross_entropy(after.flatten(0, 1), ids[:, 1:].flatten())
                share = len(ids) / len(self.windows)
                total["loss"] += share * float(loss)
                if self.measure != "loss":
                    change = self._change(before, after, ids[:, 1:])
                    total[self.measure] += share * float(change)
        return {k: v if math.isfinite(v) else math.inf for k, v in total.items()}

    def _change(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """The mean over tokens."""
        p = log_softmax(before.float(), dim=-1)
        if self.measure == "divergence":
            return (p.exp() * (p - log_softmax(after, dim=-1))).sum(-1).mean()
        gradient = p.exp()
        gradient.scatter_add_(-1, targets[..., None], torch.full_like(gradient[..., :1], -1.0))
        return ((after - before).square() * gradient.square()).sum(-1).mean()

    def _originals(self) -> Iterator[Tensor]:
        """The original's logits for each batch, kept where memory allows."""
        vocabulary = self.family.anatomy.vocabulary
        if self._kept is None and self.windows.numel() * vocabulary <= _KEPT:
            with torch.inference_mode():
                self._kept = [
                    logits(self.family.model, ids[:, :-1]) for ids in batches(self.windows)
                ]
        if self._kept is not None:
            yield from self._kept
            return
        for ids in batches(self.windows):
            yield logits(self.family.model, ids[:, :-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def batches(windows: Tensor) -> Iterator[Tensor]:
    """Windows `(n, t)` in parts of about 2048 tokens."""
    yield from torch.split(windows, max(1, _TOKENS // windows.shape[1]))


def logits(model: Any, ids: Tensor, make_cache: MakeCache | None = None) -> Tensor:
    """The logits `(n, t, vocabulary)` in float32, through a new cache where one is given."""
    ids = ids.to(next(model.parameters()).device)
    if make_cache is None:
        out: Tensor = model(input_ids=ids, use_cache=False).logits
        return out.float()
    cache, parts = make_cache(), []
    for chunk in torch.split(ids, _CHUNK, dim=1):
        parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1).float()


def felt(family: Any, candidate: Candidate, windows: Tensor) -> MakeCache | None:
    """What makes the cache that a candidate is judged with on windows `(n, t + 1)`: one that grows
    goes through all its bits within them, or what it harms behind them would not be seen."""
    policy = family.cache(candidate)
    return None if policy is None else policy.within(windows.shape[1] - 1)


def loss_of(model: Any, windows: Tensor, make_cache: MakeCache | None = None) -> float:
    """The loss of the next token in nats, a mean over windows `(n, t + 1)`."""
    total = 0.0
    with torch.inference_mode():
        for ids in batches(windows):
            found = logits(model, ids[:, :-1], make_cache)
            targets = ids[:, 1:].flatten().to(found.device)
            total += float(cross_entropy(found.flatten(0, 1), targets)) * len(ids)
    return total / len(windows) if math.isfinite(total) else math.inf
