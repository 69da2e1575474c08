"""Keys or values of some heads as they are held: first and recent tokens exact, old ones coded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.compress.language.cache.bits import Rounded
from espalier.compress.language.cache.low_rank import Factors
from espalier.compress.language.cache.plan import OWN, Plan, Span


class Rows:
    """Tokens `(b, h, n, d)` of some heads, in three parts: sinks, old, recent.

    `columns`: groups of rounding are a channel's over a block of tokens (keys, whose channels
    differ), not a token's channels (values).
    """

    def __init__(self, plan: Plan, span: Span | None, factors: Factors | None, columns: bool):
        self.plan, self.span, self.factors = plan, span, factors
        self._block = plan.block if columns else 0
        self._bits = OWN if plan.limit else plan.bits
        self.start = 0  # the first held position behind the sinks
        self.sinks: Tensor | None = None
        self.old: Tensor | Rounded | None = None
        self.recent: Tensor | None = None

    def read(self) -> Tensor | None:
        """Everything held, in order, as the model takes it; None before the first token."""
        if self.recent is None or self.sinks is None:
            return None
        parts = [self.sinks, self._decoded(), self.recent]
        return torch.cat([p.to(self._dtype) for p in parts if p is not None], 2)

    def _decoded(self) -> Tensor | None:
        if self.old is None:
            return None
        rows = self.old.read(self._dtype) if isinstance(self.old, Rounded) else self.old
        if self.factors is None:
            return rows
        return self.factors.decode(rows.to(self._dtype), self.start)

    def append(self, rows: Tensor, seen: int, level: int) -> None:
        """Takes new tokens; `seen` counts all up to them, `level` is the bits of old ones now."""
        self._dtype = rows.dtype
        kept = rows.half() if self.plan.half and rows.element_size() > 2 else rows
        before = seen - rows.shape[2]
        if self.sinks is None or self.recent is None:
            self.sinks, self.recent = kept[:, :, :0].clone(), kept[:, :, :0].clone()
        room = max(self.plan.sinks - before, 0)
        if room:
            self.sinks = torch.cat([self.sinks, kept[:, :, :room]], 2)
            kept = kept[:, :, room:]
        self._lower(level)
        self._settle(kept, seen)

    def _settle(self, new: Tensor, seen: int) -> None:
        """Codes whole blocks that are no longer recent, and drops what no head sees any more."""
        assert self.recent is not None
        start = int(self.plan.start(seen, self.span))
        split = max(int(self.plan.split(seen)), start) if self.plan.coded else start
        recent = torch.cat([self.recent, new], 2)
        first = seen - recent.shape[2]  # the position of the first of them
        begin = max(first, start)
        aged = recent[:, :, begin - first : max(split - first, begin - first)]
        if self.old is not None and start > self.start:
            self._drop(start - self.start)
        if self.plan.coded and aged.shape[2]:
            self._code(aged, begin)
        self.start = start
        # a copy where the beginning goes, so that its memory is freed
        end = max(split, begin)
        self.recent = recent if end == first else recent[:, :, end - first :].clone()

    def _drop(self, count: int) -> None:
        if isinstance(self.old, Rounded):
            self.old = self.old.without(count) if count < len(self.old) else None
        elif self.old is not None:
            self.old = self.old[:, :, count:].clone() if count < self.old.shape[2] else None

    def _code(self, rows: Tensor, first: int) -> None:
        if self.factors is not None:
            rows = self.factors.encode(rows, first)
        new: Tensor | Rounded = rows.contiguous()
        if self._bits < OWN:
            new = Rounded.of(rows, self._bits, self._block)
        if self.old is None:
            self.old = new.clone() if isinstance(new, Tensor) else new
        elif isinstance(self.old, Rounded) and isinstance(new, Rounded):
            self.old = self.old.joined(new)
        elif isinstance(self.old, Tensor) and isinstance(new, Tensor):
            self.old = torch.cat([self.old, new], 2)

    def _lower(self, level: int) -> None:
        if level == self._bits:
            return
        if isinstance(self.old, Rounded):
            self.old = self.old.fewer(level)
        elif self.old is not None:
            self.old = Rounded.of(self.old, level, self._block)
        self._bits = level

    def tensors(self) -> list[Tensor]:
        """What is held."""
        old = self.old
        middle = old.tensors() if isinstance(old, Rounded) else (old,)
        return [t for t in (self.sinks, *middle, self.recent) if t is not None]

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes every tensor along the batch."""
        self.sinks = None if self.sinks is None else function(self.sinks)
        self.recent = None if self.recent is None else function(self.recent)
        if isinstance(self.old, Rounded):
            self.old = self.old.mapped(function)
        elif self.old is not None:
            self.old = function(self.old)
