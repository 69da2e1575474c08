"""One decision for all layers: what a configuration of one shape can say, and servers can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from espalier.compress.cut import BoundCut, Ignored
from espalier.compress.language.anatomy import Anatomy
from espalier.space import Decision, ordinal
from espalier.space.options import Option

TIED = ("heads", "units", "experts", "active")
EVERY = "every"
# a head's channels are the width over the heads, and no field of the configuration says otherwise
_SHARED = ("gpt2", "opt", "bert")


class Grouped(BoundCut):
    """A bound cut whose decisions of `TIED` kinds are one for all layers: "units:every".

    Its options are those that all layers have. Decisions of other kinds (windows, bits) stay each
    layer's own. Where the model's layers differ in shape, or a layer has no such decision, there is
    no common one, and the kind is left alone.
    """

    def __init__(self, cut: BoundCut, parts: Anatomy) -> None:
        self.cut = cut
        self._own: dict[str, list[Decision]] = {}
        ignored = list(cut.ignored)
        for decision in cut.decisions:
            kind, _, _ = decision.name.partition(":")
            if kind in TIED:
                self._own.setdefault(kind, []).append(decision)
        tied: dict[str, Decision] = {}
        for kind, found in self._own.items():
            if reason := _against(kind, found, parts):
                ignored.append(Ignored(EVERY, kind, reason))
                continue
            common = [o for o in found[0].options if all(o in d.options for d in found)]
            if kind == "heads":
                common = [o for o in common if _divides(int(o), parts)]
            if len(common) > 1:
                tied[kind] = ordinal(f"{kind}:{EVERY}", *common)
        decisions: list[Decision] = []
        for decision in cut.decisions:
            kind, _, _ = decision.name.partition(":")
            if kind not in self._own:
                if (renamed := _renamed(decision, tied)) is not None:
                    decisions.append(renamed)
            elif kind in tied and tied[kind] not in decisions:
                decisions.append(tied[kind])
        self.decisions, self.ignored, self._tied = tuple(decisions), tuple(ignored), tied

    @property
    def bound(self) -> BoundCut:
        """The cut with a decision for every layer."""
        return self.cut

    @property
    def note(self) -> str:
        """What must be known of the cut's options; '' where nothing."""
        return str(getattr(self.cut, "note", ""))

    def apart(self, choices: Mapping[str, Option]) -> dict[str, Option]:
        """The choices of each layer's own decisions."""
        found = {d.name: choices[d.name] for d in self.cut.decisions if d.name in choices}
        for kind, decisions in self._own.items():
            for decision in decisions:
                found[decision.name] = choices.get(f"{kind}:{EVERY}", decision.options[-1])
        return found

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Change all layers alike."""
        own = {d.name: d.options[-1] for d in self.cut.decisions}
        self.cut.apply(model, own | self.apart(choices))

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """As the cut has them, under the names of the common decisions."""
        names = {d.name for d in self.decisions}
        found = {}
        for path, own in self.cut.layers().items():
            common = (n if n in names else f"{n.partition(':')[0]}:{EVERY}" for n in own)
            found[path] = tuple(n for n in dict.fromkeys(common) if n in names)
        return found

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """One module as `apply` would leave it."""
        return self.cut.slice(name, layer, self.apart(choices))


def _divides(groups: int, parts: Anatomy) -> bool:
    """Whether configurations allow so many groups: heads must divide the width of the model."""
    found = next(la.attention for la in parts.layers if la.attention is not None)
    return groups == found.groups or parts.width % (found.heads // found.groups * groups) == 0


def _against(kind: str, found: Sequence[Decision], parts: Anatomy) -> str:
    """Why there is no decision for all layers; '' where there is."""
    if len({d.options[-1] for d in found}) > 1:
        return "layers differ in shape already"
    there = sum((la.attention if kind == "heads" else la.feed) is not None for la in parts.layers)
    if len(found) < there:
        return f"only {len(found)} of {there} layers have this decision"
    return ""


def _renamed(decision: Decision, tied: Mapping[str, Decision]) -> Decision | None:
    """A decision that hangs on tied ones, hanging on the common one; None where that is not."""
    when = {}
    for parent, allowed in decision.when.items():
        kind = parent.partition(":")[0]
        if kind not in TIED:
            when[parent] = allowed
        elif kind not in tied:
            return None
        else:
            options = tied[kind].options
            when[f"{kind}:{EVERY}"] = tuple(o for o in options if o in allowed)
    return replace(decision, when=when)


def unsaid(kind: str, parts: Anatomy) -> str:
    """Why no configuration can say what a kind of cut does, though all layers are alike; '' where
    one can."""
    if kind == "sublayer":
        return "a configuration can't say that a layer has one sub-layer: take Blocks"
    if kind in ("heads", "hidden") and parts.kind in _SHARED:
        return f"{parts.kind}'s configuration splits the width among the heads"
    if kind in ("heads", "hidden") and parts.kind == "olmoe":
        return "olmoe's norms of queries and keys are as wide as the hidden states"
    return ""
