"""What one layer's cache of keys and values is to hold, and how many bytes that is at any length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.compress.language.cache.bits import WIDTHS, rounded_bytes
from espalier.errors import BudgetError, EspalierError

if TYPE_CHECKING:
    from espalier.compress.language.cache.low_rank import Factors

Array = NDArray[np.int64]
OWN = 16  # bits that stand for the numbers as the model gives them
LEVELS = (OWN, 8, 4, 2)  # what a growing cache goes through


@dataclass(frozen=True)
class Span:
    """How far back a head looks: fixed + share * N tokens, itself among them.

    N is the number of tokens up to the query's own; `length` puts a fixed one in its place, as
    when the span is set by the prompt (MoA; Fu et al., 2024).
    """

    fixed: int
    share: float = 0.0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.fixed < 0 or not 0 <= self.share <= 1 or self.fixed + self.share == 0:
            rule = "a span is fixed >= 0 tokens and a share of the length from 0 to 1, not both 0"
            raise EspalierError(f"{rule}; got {self.fixed} and {self.share}")

    def first(self, position: Any) -> Any:
        """The first position that the query at `position` (a number or an array) still sees.

        It never goes back as positions grow, so that what is dropped is never wanted again.
        """
        count = position + 1
        base = count if self.length is None else self.length
        if isinstance(count, torch.Tensor):
            share = torch.as_tensor(base).double() * self.share
            span = self.fixed + share.floor().long()
            return (count - span.clamp_min(1)).clamp_min(0)
        span = self.fixed + np.floor(np.multiply(base, self.share)).astype(np.int64)
        return np.maximum(count - np.maximum(span, 1), 0)


@dataclass(frozen=True)
class Plan:
    """One layer's cache.

    - `bits`: of old tokens' numbers; 16 are the model's own.
    - `limit`: bytes of one sequence that the layer may hold; with it the cache begins at 16 bits
      and goes to 8, 4, 2, not below `bits`, when what it holds would not fit. 0: `bits` at once.
    - `capacity`: tokens that the limit is for; without a limit, a policy takes what its own bits
      need for so many (`grown`).
    - `keys`, `values`: low-rank factors that old tokens are kept by; None keeps them whole.
    - `spans`: a span for each group of heads, None where it looks at everything; () for no spans.
    - `window`, `sinks`: recent and first tokens that are kept exactly; `block`: how many tokens
      are coded at a time. Up to block - 1 more recent ones wait for their block.
    - `half`: exact numbers are kept as float16 where the model computes in more.
    """

    bits: int = OWN
    limit: int = 0
    capacity: int = 0
    keys: Factors | None = None
    values: Factors | None = None
    spans: tuple[Span | None, ...] = ()
    window: int = 32
    sinks: int = 1
    block: int = 32
    half: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*WIDTHS, OWN):
            raise EspalierError(f"bits of a cache are {WIDTHS} or {OWN}, got {self.bits!r}")
        if self.window < 0 or self.sinks < 0 or self.block < 1:
            raise EspalierError(
                "window and sinks are tokens >= 0 and a block is >= 1 tokens; got "
                f"{self.window}, {self.sinks} and {self.block}"
            )

    @property
    def low_rank(self) -> bool:
        """Whether old tokens are kept by factors."""
        return self.keys is not None or self.values is not None

    @property
    def coded(self) -> bool:
        """Whether old tokens are kept other than exactly."""
        return self.bits < OWN or self.low_rank

    @property
    def plain(self) -> bool:
        """Whether this is what transformers does itself."""
        return not self.coded and not self.half and not any(self.spans)

    def itemsize(self, own: int) -> int:
        """Bytes of an exact number, of a model whose numbers have `own` bytes."""
        return min(own, 2) if self.half else own

    def bundles(self, groups: int) -> list[tuple[tuple[int, ...], Span | None]]:
        """Groups of heads that are kept together, and their span.

        Factors mix all groups: nothing of a layer that has them is dropped.
        """
        spans = self.spans or (None,) * groups
        if len(spans) != groups:
            raise EspalierError(f"{len(spans)} spans for a layer of {groups} key and value heads")
        if self.low_rank:
            return [(tuple(range(groups)), None)]
        found: dict[Span | None, list[int]] = {}
        for group, span in enumerate(spans):
            found.setdefault(span, []).append(group)
        return [(tuple(heads), span) for span, heads in found.items()]

    # --- where tokens are after n of them; the cache itself asks the same -----------------------

    def split(self, n: Any) -> Any:
        """Where the coded tokens end and the recent ones begin, after `n` tokens."""
        if not self.coded:
            return np.minimum(n, self.sinks)
        old = np.maximum(n - self.sinks - self.window, 0) // self.block * self.block
        return np.minimum(n, self.sinks) + old

    def start(self, n: Any, span: Span | None) -> Any:
        """The first token behind the sinks that is still held, after `n` tokens."""
        edge = np.minimum(n, self.sinks)
        if span is None:
            return edge
        first = np.maximum(span.first(np.asarray(n)), edge)  # of the next query
        if self.coded:
            first = edge + (first - edge) // self.block * self.block
        return np.minimum(first, n)

    def level(self, n: Any, groups: int, head: int, own: int) -> Any:
        """Bits of the old tokens after `n` tokens."""
        if not self.limit or self.bits == OWN:
            return np.full_like(n, self.bits)
        known = _levels(self, groups, head, own)
        return np.where(n < len(known), known[np.minimum(n, len(known) - 1)], self.bits)

    def held(self, n: Any, groups: int, head: int, own: int) -> Any:
        """Bytes of one sequence after `n` tokens (a number or an array), for a model whose numbers
        have `own` bytes. Errors: `BudgetError` where a limit can't be kept."""
        n = np.asarray(n, dtype=np.int64)
        found = self._bytes(n, self.level(n, groups, head, own), groups, head, own)
        if self.limit and (found > self.limit).any():
            at = int(n[found > self.limit].min()) if n.ndim else int(n)
            raise BudgetError(
                f"a cache of {self.limit} bytes a layer is full after {at} tokens at {self.bits} "
                "bits: allow more bytes or fewer bits"
            )
        return found

    def peak(self, length: int, groups: int, head: int, own: int) -> int:
        """The most bytes of one sequence at any step up to `length` tokens."""
        return int(self.held(np.arange(1, length + 1), groups, head, own).max())

    def _bytes(self, n: Any, level: Any, groups: int, head: int, own: int) -> Any:
        size, total = self.itemsize(own), np.zeros_like(n)
        for heads, span in self.bundles(groups):
            start, split = self.start(n, span), self.split(n)
            old = np.maximum(split - start, 0)
            exact = np.minimum(n, self.sinks) + n - np.maximum(split, start)
            total = total + 2 * len(heads) * exact * head * size
            for factors, block in ((self.keys, self.block), (self.values, 0)):
                rows, width = (len(heads), head) if factors is None else (1, factors.rank)
                for bits in (*WIDTHS, OWN):
                    one = (
                        rows * old * width * size
                        if bits == OWN
                        else rounded_bytes(rows, old, width, bits, block)
                    )
                    total = total + np.where(level == bits, one, 0)
        return total


@lru_cache(maxsize=512)
def _levels(plan: Plan, groups: int, head: int, own: int) -> Array:
    """Bits of old tokens after 0, 1, ... up to the plan's capacity of tokens.

    Recent tokens pile up until the next block is coded, and levels change with blocks only: what
    fits at the fullest step of a block, fits. Bits never rise again.
    """
    n = np.arange(plan.capacity + 1)
    block = np.unique(plan.split(n), return_inverse=True)[1]
    found = np.full_like(n, plan.bits)
    for bits in (b for b in sorted(LEVELS) if b > plan.bits):
        most = np.zeros(block.max() + 1, dtype=np.int64)
        np.maximum.at(most, block, plan._bytes(n, np.full_like(n, bits), groups, head, own))
        found = np.where(most[block] <= plan.limit, bits, found)
    return np.minimum.accumulate(found)


def grown(plan: Plan, groups: int, head: int, own: int) -> Plan:
    """The plan with the least limit that its own bits keep up to its capacity, where it has one."""
    if plan.limit or not plan.capacity or plan.bits == OWN:
        return plan
    return replace(plan, limit=plan.peak(plan.capacity, groups, head, own))


def both(first: Plan, other: Plan) -> Plan:
    """What either decides; what both decide is the other's, but the sinks, which are the most of
    both. Windows and blocks are decided by what codes old tokens."""
    own = vars(other).copy()
    for name in ("bits", "limit", "capacity", "keys", "values", "spans"):
        if own[name] == getattr(_NOTHING, name):
            own[name] = getattr(first, name)
    if not other.coded and first.coded:
        own["window"], own["block"] = first.window, first.block
    decides = [plan.sinks for plan in (first, other) if not plan.plain]
    own["sinks"] = max(decides, default=other.sinks)
    own["half"] = first.half or other.half
    return Plan(**own)


def narrowed(plan: Plan, groups: tuple[int, ...]) -> Plan:
    """The plan of a layer of which only these groups of heads stay."""
    return replace(
        plan,
        keys=None if plan.keys is None else plan.keys.kept(groups),
        values=None if plan.values is None else plan.values.kept(groups),
        spans=tuple(plan.spans[g] for g in groups) if plan.spans else (),
    )


_NOTHING = Plan()
