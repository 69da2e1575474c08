"""A transformer of `transformers` as a family: any mix of decisions on it is one space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.language.anatomy import Anatomy, anatomy
from espalier.compress.language.shape.grouped import Grouped, unsaid
from espalier.compress.language.shape.surgery import drop_blocks, empty
from espalier.errors import EspalierError
from espalier.nets import Family
from espalier.space import Candidate, Constraint, Decision, Space

# what only changes an attention's cache says so by its name; its plans stay with attentions, so
# they are given first, then come shapes, then the numbers in what is left
_CACHED = ("kv", "rank", "span")
ORDER = (*_CACHED, "block", "sublayer", "hidden", "heads", "units", "experts", "active")
LAST = ("sparsity", "bits")


class Language(Family):
    """A transformer whose candidates are the model with parts of it cut away, in fewer bits, or with
    another cache.

    - `model`: a `PreTrainedModel` of an architecture of `KINDS`; it is copied and never changed.
    - `calibration`: what the model takes, `(n, t)` ids of tokens (images for ViT); cuts that look at
      data look at this where they were given none.
    - `cuts`: what may be decided, such as `(Blocks(), Heads(), Units(), WeightBits())`.
    - `grouped`: heads, units, experts and active experts are one decision for all layers, and what
      no configuration can say is left alone, so that a folder can hold the result.

    Cuts are made in the order of `ORDER`. A decision that only concerns parts that another leaves
    out is not active then. Errors: `EspalierError` where nothing can be decided.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor,
        cuts: Sequence[Cut],
        *,
        grouped: bool = False,
        name: str = "model",
    ) -> None:
        self.name, self.grouped = name, grouped
        self.model: nn.Module = copy.deepcopy(model).eval()
        self.calibration = calibration.detach()
        self.anatomy: Anatomy = anatomy(self.model)
        self.shape = tuple(calibration.shape[1:])
        labels = getattr(cast(Any, self.model).config, "num_labels", 0)
        self.classes = self.anatomy.vocabulary or int(labels)
        self._left: list[Ignored] = []
        self.cuts: tuple[BoundCut, ...] = tuple(
            bound for cut in sorted(cuts, key=_rank) if (bound := self._bound(cut)) is not None
        )
        decisions = [d for cut in self.cuts for d in cut.decisions]
        if not decisions:
            why = "; ".join(f"{row.layer}: {row.reason}" for row in self.ignored[:3])
            raise EspalierError(
                f"nothing of {name!r} can be decided with these cuts" + (f" ({why})" if why else "")
            )
        self._space = Space(_conditioned(decisions, self.cuts, self.anatomy), _rules(self.cuts))
        self.original: Candidate = self._space.decode(self._space.corner(True))[0]

    def _bound(self, cut: Cut) -> BoundCut | None:
        reason = unsaid(cut.kind, self.anatomy) if self.grouped else ""
        if reason:
            self._left.append(Ignored(self.name, cut.kind, reason))
            return None
        # a cut that looks at data has the setting `calibration`; what it was given itself stays
        if is_dataclass(cut) and "calibration" in [f.name for f in fields(cut)]:
            given: Any = cut
            if given.calibration is None:
                cut = replace(given, calibration=self.calibration)
        bound = cut.bind(self.model, self.calibration)
        return Grouped(bound, self.anatomy) if self.grouped else bound

    @property
    def space(self) -> Space:
        """The decisions of all cuts."""
        return self._space

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """What no cut touches, and why."""
        return (*self._left, *(row for cut in self.cuts for row in cut.ignored))

    def build(self, candidate: Mapping[str, Any]) -> nn.Module:
        """The model as the candidate has it: a changed copy, in evaluation mode. Decisions on the
        cache change no weight: see `cache`.

        Errors: `SpaceError` when the candidate is not of the space.
        """
        return self._cut(self._space.candidate(candidate), self.cuts)

    def _cut(self, choices: Mapping[str, Any], cuts: Sequence[BoundCut]) -> nn.Module:
        network = copy.deepcopy(self.model)
        for cut in cuts:
            own = {d.name: choices.get(d.name, d.options[-1]) for d in cut.decisions}
            if any(own[d.name] != d.options[-1] for d in cut.decisions):
                cut.apply(network, own)
        gone = empty(network)
        if len(gone) == len(self.anatomy.layers):
            gone = gone[1:]
        drop_blocks(network, gone)
        return network.eval()

    def cache(self, candidate: Mapping[str, Any]) -> Callable[[], Any] | None:
        """What makes the cache that the candidate generates with, `model.generate(...,
        past_key_values=make())`; None where it is transformers' own.

        Errors: `SpaceError` when the candidate is not of the space.
        """
        from espalier.compress.language.cache.policy import Policy

        choices = self._space.candidate(candidate)
        last = {d.name: d.options[-1] for cut in self.cuts for d in cut.decisions}
        kinds = {n.partition(":")[0] for n, o in last.items() if choices.get(n, o) != o}
        if kinds.isdisjoint(_CACHED):
            return None
        # sparse weights and their bits take long, and no cache hangs on them
        shapes = [cut for cut in self.cuts if not _ends(cut)]
        return Policy.of(self._cut(choices, shapes))

    def example(self, batch: int = 1) -> Tensor:
        """Rows of the calibration."""
        times = -(-batch // len(self.calibration))
        return self.calibration.repeat(times, *[1] * len(self.shape))[:batch]

    def explain(self) -> list[dict[str, Any]]:
        """A row a decision (decision, kind, layers it changes, options, original), then a row for
        what is left alone (kind, layers, reason)."""
        rows: list[dict[str, Any]] = []
        for cut in self.cuts:
            layers: dict[str, list[str]] = {}
            for path, names in cut.layers().items():
                for name in names:
                    layers.setdefault(name, []).append(path)
            for decision in cut.decisions:
                row: dict[str, Any] = {
                    "decision": decision.name,
                    "kind": decision.name.partition(":")[0],
                    "layers": layers.get(decision.name, []),
                    "options": list(decision.options),
                    "original": decision.options[-1],
                }
                note = getattr(cut, "note", "")
                rows.append(row | ({"note": note} if note else {}))
        for left in self.ignored:
            rows.append({"kind": left.kind, "layers": [left.layer], "reason": left.reason})
        return rows


def _rank(cut: Cut) -> int:
    if cut.kind in ORDER:
        return ORDER.index(cut.kind)
    return len(ORDER) + 1 + LAST.index(cut.kind) if cut.kind in LAST else len(ORDER)


def _ends(cut: BoundCut) -> bool:
    return any(d.name.partition(":")[0] in LAST for d in cut.decisions)


def _rules(cuts: Sequence[BoundCut]) -> list[Constraint]:
    return [rule for cut in cuts for rule in getattr(cut, "constraints", ())]


def _conditioned(
    decisions: Sequence[Decision], cuts: Sequence[BoundCut], parts: Anatomy
) -> list[Decision]:
    """Decisions that are not active where the part that they are about is left out."""
    reach: dict[str, set[str]] = {d.name: set() for d in decisions}
    for cut in cuts:
        for path, names in cut.layers().items():
            for name in names:
                reach[name].add(path)
    gates = [d for d in decisions if d.name.partition(":")[0] in ("block", "attention", "feed")]
    found = []
    for decision in decisions:
        around: dict[str, tuple[Any, ...]] = {}
        for gate in gates:
            if gate is not decision and _within(decision, gate, reach):
                around[gate.name] = (gate.options[-1],)
        found.append(replace(decision, when={**decision.when, **around}) if around else decision)
    return found


def _within(decision: Decision, gate: Decision, reach: Mapping[str, set[str]]) -> bool:
    """Whether all that a decision changes is in the part that a gate may leave out."""
    kind, _, place = decision.name.partition(":")
    part, _, layer = gate.name.partition(":")
    if part == "block":
        if place == layer or place.startswith(layer + "."):
            return kind != "block"
    elif kind in _CACHED and part == "attention":
        return place == layer or place.startswith(layer + ".")
    own = reach[decision.name]
    return bool(own) and own <= reach[gate.name] and (kind != part or own < reach[gate.name])
