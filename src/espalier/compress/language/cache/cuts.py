"""Decisions on the cache of keys and values: bits and rank of a layer, spans of its heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Cut
from espalier.compress.language.anatomy import Attention, anatomy
from espalier.compress.language.cache.low_rank import (
    METHODS,
    Factors,
    Method,
    Seen,
    factors,
    seen,
    tuned,
)
from espalier.compress.language.cache.plan import OWN, Plan, Span, both, grown
from espalier.compress.language.cache.policy import Policy, give, slid, sliding
from espalier.errors import EspalierError, unknown
from espalier.space import Decision, ordinal
from espalier.space.options import Option

Choices = Mapping[str, Option]
ALL = "all"


class BoundCache(BoundCut):
    """Decisions on the cache of one model. `owners`: layer path -> its attention."""

    def __init__(self, model: nn.Module, decisions: Iterable[Decision], basis: Plan) -> None:
        self.decisions, self.basis = tuple(decisions), basis
        self.owners, self.windows = _owners(model), sliding(model)
        self._empty = Policy.of(model)

    @abstractmethod
    def plans(self, choices: Choices) -> dict[str, Plan]:
        """The plan of each layer that is not to be as in the original."""

    def apply(self, model: nn.Module, choices: Choices) -> None:
        """Gives the attentions that are there their plans; weights stay as they are."""
        there = {layer.path for layer in anatomy(model).layers if layer.attention is not None}
        give(model, {path: p for path, p in self.plans(choices).items() if path in there})

    def cache(self, choices: Choices) -> Policy | None:
        """What makes the cache of the model that was bound; None where it is transformers' own."""
        found = self.plans(choices)
        return replace(self._empty, plans=found) if found else None

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """No layer's shape hangs on these decisions."""
        return {}

    def slice(self, name: str, layer: nn.Module, choices: Choices) -> nn.Module | None:
        """The layer as it is."""
        return layer

    def _chosen(self, choices: Choices) -> Iterable[tuple[str, Any]]:
        """(place, option) of every decision that is not as in the original."""
        for decision in self.decisions:
            option = choices.get(decision.name, decision.options[-1])
            if option is not None and option != decision.options[-1]:
                yield decision.name.partition(":")[2], option


@dataclass(frozen=True)
class CacheBits(Cut):
    """Bits of each layer's keys and values: "kv:model.layers.3" is one of `options`, ascending; 16
    are the model's own numbers and the original.

    - `window`, `sinks`: recent and first tokens that stay exact; `block`: tokens coded at a time.
    - `capacity`: with it the cache grows into its bits: each layer begins at 16 and goes to 8, 4, 2
      when it would hold more than its own bits need for so many tokens (PM-KVQ; Liu et al., 2025).
    - `half`: exact tokens are kept in 16 bits where the model computes in 32.
    - `only`: numbers of layers, all by default.
    """

    kind: ClassVar[str] = "kv"
    options: tuple[int, ...] = (2, 4, 8, OWN)
    window: int = 32
    sinks: int = 1
    block: int = 32
    capacity: int = 0
    half: bool = False
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted({*self.options, OWN})))
        for bits in self.options:
            self._plan(bits)  # refuses what is no plan
        if len(self.options) < 2:
            raise EspalierError(f"bits to choose from are some below {OWN}, got none")

    def _plan(self, bits: int) -> Plan:
        settings = {n: getattr(self, n) for n in ("window", "sinks", "block", "capacity", "half")}
        return Plan(bits=bits, **settings)

    def bind(self, model: nn.Module, example: Tensor) -> BoundBits:
        """The attentions of a model. Errors: `EspalierError`."""
        names = [f"{self.kind}:{path}" for path in _owners(model, self.only)]
        return BoundBits(model, [ordinal(n, *self.options) for n in names], self._plan(OWN))


class BoundBits(BoundCache):
    """The bits of one model's cache."""

    def plans(self, choices: Choices) -> dict[str, Plan]:
        """As chosen."""
        return {path: replace(self.basis, bits=int(b)) for path, b in self._chosen(choices)}


@dataclass(frozen=True)
class CacheRank(Cut):
    """How many numbers each layer keeps of a token: "rank:model.layers.3" is the share of the
    channels of its keys and of its values, 1 the original. Old tokens are kept by low-rank factors,
    the recent `window` and the first `sinks` exactly (CSKV; Wang et al., 2024).

    - `method`: where factors come from, see `low_rank.factors`; `steps` of tuning behind that.
    - `keys`, `values`: what the share is multiplied by for each, so that the two can differ.
    - `calibration`: windows of token ids, by default the example it is bound with.
    """

    kind: ClassVar[str] = "rank"
    options: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    method: Method = "data"
    steps: int = 0
    keys: float = 1.0
    values: float = 1.0
    window: int = 32
    sinks: int = 1
    block: int = 32
    half: bool = False
    only: Sequence[int] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted({*map(float, self.options), 1.0})))
        if len(self.options) < 2 or self.options[0] <= 0 or self.options[-1] > 1:
            raise EspalierError(f"shares of channels are above 0 and below 1, got {self.options}")
        if self.method not in METHODS:
            raise EspalierError(unknown("method of factors", self.method, METHODS))

    def bind(self, model: nn.Module, example: Tensor) -> BoundRank:
        """The attentions of a model. Errors: `EspalierError` where its positions do not allow it."""
        windows = example if self.calibration is None else self.calibration
        settings = {n: getattr(self, n) for n in ("window", "sinks", "block", "half")}
        return BoundRank(self, model, Plan(**settings), windows)


class BoundRank(BoundCache):
    """The ranks of one model's cache; factors are found when first asked for, and kept."""

    def __init__(self, cut: CacheRank, model: nn.Module, basis: Plan, windows: Tensor) -> None:
        names = [f"{cut.kind}:{path}" for path in _owners(model, cut.only)]
        super().__init__(model, [ordinal(n, *cut.options) for n in names], basis)
        self.cut, self._model = cut, model
        rows = seen(model, windows)
        self._seen: dict[str, Seen] = dict(zip(self.owners, rows, strict=True))
        self._found: dict[tuple[str, str, int], Factors] = {}

    def plans(self, choices: Choices) -> dict[str, Plan]:
        """As chosen."""
        return {path: self.plan(path, float(share)) for path, share in self._chosen(choices)}

    def plan(self, path: str, share: float) -> Plan:
        """The plan of a layer that keeps this share; a part that keeps all has no factors."""
        own: dict[str, Factors] = {}
        for part in ("keys", "values"):
            width = self.owners[path].groups * self.owners[path].head
            rank = max(round(share * getattr(self.cut, part) * width), 1)
            if rank < width:
                own[part] = self._factors(path, part, rank)
        return replace(self.basis, **own)  # type: ignore[arg-type]

    def _factors(self, path: str, part: Any, rank: int) -> Factors:
        key = (path, part, rank)
        if key not in self._found:
            rows, cut = self._seen[path], self.cut
            found = factors(self._model, self.owners[path], part, rank, rows, cut.method)
            if cut.steps:
                data = rows.keys if part == "keys" else rows.values
                found = tuned(found, data, cut.steps)
            self._found[key] = found
        return self._found[key]


RULES = tuple(Span(fixed, share) for fixed in (16, 64) for share in (0.0, 0.25, 0.5))


@dataclass(frozen=True)
class Spans(Cut):
    """How far back each group of heads looks: "span:model.layers.3.0" is a rule such as "64+0.25N"
    of the N tokens so far, "all" the original (MoA; Fu et al., 2024). Heads that share keys and
    values are decided together: only so does their cache shrink.

    - `rules`: to choose from, put in order of their length at `at` tokens (by default the model's
      context); `sinks`: first tokens that every head sees.
    - `half`: tokens are kept in 16 bits where the model computes in 32.
    """

    kind: ClassVar[str] = "span"
    rules: Sequence[Span] = RULES
    sinks: int = 4
    at: int = 0
    half: bool = False
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise EspalierError("spans to choose from are some rules, got none")

    def bind(self, model: nn.Module, example: Tensor) -> BoundSpans:
        """The groups of heads of a model. Errors: `EspalierError`."""
        at = self.at or anatomy(model).context
        ordered = sorted(self.rules, key=lambda s: at - int(s.first(at - 1)))
        named = {label(span): span for span in ordered}
        decisions = [
            ordinal(f"{self.kind}:{path}.{group}", *named, ALL)
            for path, attention in _owners(model, self.only).items()
            for group in range(attention.groups)
        ]
        return BoundSpans(model, decisions, Plan(sinks=self.sinks, half=self.half), named)


def label(span: Span) -> str:
    """A rule as an option: "64+0.25N"; "64+0.25*512" where N is fixed."""
    share = f"+{span.share:g}" + ("N" if span.length is None else f"*{span.length}")
    return f"{span.fixed}" + (share if span.share else "")


class BoundSpans(BoundCache):
    """The spans of one model's heads."""

    def __init__(
        self, model: nn.Module, decisions: Iterable[Decision], basis: Plan, named: dict[str, Span]
    ) -> None:
        super().__init__(model, decisions, basis)
        self.named = named

    def plans(self, choices: Choices) -> dict[str, Plan]:
        """As chosen."""
        found: dict[str, list[Span | None]] = {}
        for place, option in self._chosen(choices):
            path, _, group = place.rpartition(".")
            own = found.setdefault(path, [None] * self.owners[path].groups)
            own[int(group)] = self.named[str(option)]
        return {path: replace(self.basis, spans=tuple(own)) for path, own in found.items()}


def _owners(model: nn.Module, only: Sequence[int] | None = None) -> dict[str, Attention]:
    """Layer path -> attention, of those that are there. Errors: `EspalierError`."""
    parts = anatomy(model)
    if not parts.decoder:
        raise EspalierError(f"{parts.kind} generates nothing: it has no cache to decide on")
    wanted = range(len(parts.layers)) if only is None else only
    if wrong := [i for i in wanted if not 0 <= i < len(parts.layers)]:
        raise EspalierError(f"layers are 0 to {len(parts.layers) - 1}, got {wrong[0]}")
    own = {parts.layers[i].path: parts.layers[i].attention for i in wanted}
    return {path: attention for path, attention in own.items() if attention is not None}


def held(cuts: Iterable[Any], own: int, length: int) -> Callable[[Choices, int, int, int], float]:
    """What counts a layer's cache, for `costs.LanguageCounts`: `(options by decision, groups, head,
    tokens) -> bytes`, the most of one sequence at any step up to `length` tokens, of a model whose
    numbers have `own` bytes. The decisions are those of one layer.

    Of spans, options name at most one group. What it holds is given for all groups that the layer
    had, nothing where its heads are cut away: a layer's bytes are the mean over these. (Tokens are
    those that a layer sees at most; a sliding one's are known here.)
    """
    given = list(cuts)
    inner = [getattr(cut, "bound", cut) for cut in given]
    bound = [cut for cut in inner if isinstance(cut, BoundCache)]
    heads = next((c for c in given if getattr(getattr(c, "bound", c), "kind", "") == "heads"), None)
    known: dict[Any, float] = {}

    def count(options: Choices, groups: int, head: int, tokens: int) -> float:
        plan, slides, spanned = Plan(), 0, ""
        for cut in bound:
            mine = {d.name: options[d.name] for d in cut.decisions if d.name in options}
            for name in mine:
                path = name.partition(":")[2]
                if isinstance(cut, BoundSpans):
                    spanned, path = path, path.rpartition(".")[0]
                    whole, sinks = cut.owners[path].groups, cut.basis.sinks
                slides = slides or cut.windows.get(path, 0)
            for found in cut.plans(mine).values():
                plan = both(plan, found)
        decided = not plan.plain
        if own_span := tuple(span for span in plan.spans if span is not None):
            plan = replace(plan, spans=own_span * groups)
        elif spanned and plan.coded:  # another group of the layer may ask for more first tokens
            plan = replace(plan, sinks=max(plan.sinks, sinks))
        if slides and decided:
            plan = slid(plan, slides, groups)
        elif slides:  # transformers' own holds one more
            plan = Plan(spans=(Span(slides),) * groups, sinks=1)
        ranks = [None if f is None else f.rank for f in (plan.keys, plan.values)]
        key = (
            *ranks,
            *(v for v in vars(plan).values() if not isinstance(v, Factors)),
            groups,
            head,
        )
        if key not in known:
            known[key] = float(grown(plan, groups, head, own).peak(length, groups, head, own))
        if not spanned or plan.low_rank:  # factors keep all groups together
            return known[key]
        return 0.0 if _cut_away(heads, options, spanned) else known[key] / groups * whole

    return count


def _cut_away(heads: Any, options: Choices, place: str) -> bool:
    """Whether a group of heads ("model.layers.3.0") is not among those that stay."""
    if heads is None:
        return False
    own = heads.apart(options) if hasattr(heads, "apart") else options
    slices, (path, _, group) = getattr(heads, "bound", heads), place.rpartition(".")
    return path in slices.order and int(group) not in slices.kept(path, own)
