"""A trained model as a family: its space are the decisions of the cuts that are made on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.attention import Attention
from espalier.compress.attention_graph import attended, plain_attention
from espalier.compress.calls import Call, follow
from espalier.compress.coupling.fast_paths import without_nesting
from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.matched import matched
from espalier.compress.own_copy import own_copy
from espalier.compress.pieces.units import Unit, Units
from espalier.errors import EspalierError
from espalier.export import deployed
from espalier.export.check import whole_numbers
from espalier.nets import Family
from espalier.space import Candidate, Decision, Option, Space

ORDER = ("width", "depth", "sparsity", "bits")  # a cut of another kind comes before the last two


class Pretrained(Family):
    """A trained model whose candidates are the model with parts of it cut away.

    - `model`: any `nn.Module` that takes one tensor and gives one; it is copied and never changed.
    - `example`: an input `(b, ...)`, real data where it holds whole numbers (tokens).
    - `cuts`: what may be decided, such as `(Widths(), Depth(), Bits())`; widths and depth by
      default.
    - `calibration`: inputs `(n, ...)` for cuts that need to see data, such as `Bits`.

    A decision that only concerns layers of one block is not active where that block is left out.
    Errors: `EspalierError` when the model does not run on the example, gives no tensor, or nothing
    of it can be decided.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        cuts: Sequence[Cut] | Cut | None = None,
        name: str = "model",
        calibration: Tensor | None = None,
    ) -> None:
        self.name = name
        if not isinstance(example, Tensor) or not example.dim():
            what = type(example).__name__
            raise EspalierError(f"an example is a tensor of inputs (b, ...), got {what}")
        if not isinstance(calibration, (Tensor, NoneType)):
            what = type(calibration).__name__
            raise EspalierError(f"calibration data is a tensor of inputs (b, ...), got {what}")
        self.model: nn.Module = own_copy(model)
        self._example = example.detach().cpu().contiguous()
        without_nesting(self.model, self._example)
        self.calibration = None if calibration is None else calibration.detach().cpu().contiguous()
        self.shape, self.classes = tuple(example.shape[1:]), _classes(self.model, self._example)
        given = (cuts,) if isinstance(cuts, Cut) else cuts
        wanted = sorted(_default() if given is None else given, key=_rank)
        self._settings = tuple(wanted)
        self._attended: dict[str, Call] | None = None
        self.cuts: tuple[BoundCut, ...] = tuple(self._bound(cut) for cut in wanted)
        self._open()

    def _bound(self, cut: Cut) -> BoundCut:
        # a cut that looks at data has the setting `calibration`; what it was given itself stays
        names: list[str] = [f.name for f in fields(cut)] if is_dataclass(cut) else []
        if self.calibration is not None and "calibration" in names:
            given: Any = cut
            if given.calibration is None:
                cut = replace(given, calibration=self.calibration)
        return cut.bind(self.model, self._example)

    def _open(self) -> None:
        """Everything that follows from the bound cuts."""
        decisions = [d for cut in self.cuts for d in cut.decisions]
        if not decisions:
            raise EspalierError(_nothing(self.name, self.ignored))
        decisions = _conditioned(decisions, self.cuts)
        with deployed(self.model):
            self._gives = self.model(self._example).shape
        self._space = Space(decisions, matched(decisions, self.cuts, self._runs))
        self._units: Units | None = None
        self.original: Candidate = self._space.decode(self._space.corner(True))[0]

    def _runs(self, choices: Mapping[str, Option]) -> bool:
        try:
            with deployed(network := self._cut(choices)):
                return bool(network(self._example).shape == self._gives)
        except Exception:  # whatever shapes that do not fit lead to
            return False

    @property
    def space(self) -> Space:
        """The decisions of all cuts."""
        return self._space

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """What no cut touches, and why."""
        return tuple(row for cut in self.cuts for row in cut.ignored)

    def build(self, candidate: Mapping[str, Any]) -> nn.Module:
        """The model as the candidate has it, plain, with copied weights, in evaluation mode.

        Errors: `SpaceError` when the candidate is not of the space.
        """
        return self._cut(self._space.candidate(candidate))

    def _cut(self, choices: Mapping[str, Option], model: nn.Module | None = None) -> nn.Module:
        """The model, or its outline, cut by choices."""
        network = copy.deepcopy(self.model if model is None else model)
        for cut in self.cuts:
            own = {d.name: choices.get(d.name, d.options[-1]) for d in cut.decisions}
            if any(own[d.name] != d.options[-1] for d in cut.decisions):
                cut.apply(network, own)
        if any(isinstance(module, Attention) for module in network.modules()):
            if self._attended is None:
                self._attended = attended(follow(self.model, self._example[:1]).calls)
            plain_attention(network, self._attended)
        return network.eval()

    def example(self, batch: int = 1) -> Tensor:
        """Zeros of the input's shape and type; rows of the example where it holds whole numbers, which
        may be indices, as floats too."""
        if self._example.is_floating_point() and not whole_numbers(self._example):
            return torch.zeros(batch, *self.shape, dtype=self._example.dtype)
        times = -(-batch // len(self._example))
        return self._example.repeat(times, *[1] * len(self.shape))[:batch]

    def units(self) -> tuple[Unit, ...]:
        """The additive pieces: leaf layers with the norm, activation and pooling behind them."""
        return self._pieces().units()

    def unit(self, name: str, candidate: Mapping[str, Option]) -> tuple[nn.Module, Any] | None:
        """One piece under a candidate and its input's shape; None where it does not run."""
        return self._pieces().unit(name, candidate)

    def outline(self, name: str, candidate: Mapping[str, Option]) -> tuple[nn.Module, Any] | None:
        """The same for what asks for shapes alone: where that will do, on torch's meta device."""
        return self._pieces().unit(name, candidate, bare=True)

    def _pieces(self) -> Units:
        if self._units is None:
            self._units = Units(self.model, self._example[:1], self.cuts, self._cut)
        return self._units

    def with_scores(self, scores: Mapping[str, Tensor]) -> Pretrained:
        """The same family with other scores of importance for what its widths keep first.

        Errors: `EspalierError` when widths are not among its decisions.
        """
        if not any(hasattr(cut, "with_scores") for cut in self.cuts):
            raise EspalierError("scores order the channels that widths keep: add Widths() to cuts")
        twin = copy.copy(self)
        twin.cuts = tuple(
            cut.with_scores(scores) if hasattr(cut, "with_scores") else cut for cut in self.cuts
        )
        twin._units = None  # the space is the same: only which channels go first is not
        return twin

    def explain(self) -> list[dict[str, Any]]:
        """A row a decision (decision, kind, layers it changes, options, original), then a row for
        each layer that is left alone (kind, layers, reason)."""
        rows: list[dict[str, Any]] = []
        modules = self.model.named_modules()
        leaves = {path for path, m in modules if m._parameters or next(m.children(), None) is None}
        for cut in self.cuts:
            layers: dict[str, list[str]] = {}
            for path, names in cut.layers().items():
                for name in names if path in leaves else ():
                    layers.setdefault(name, []).append(path)
            for decision in cut.decisions:
                options = list(decision.options)
                row: dict[str, Any] = {
                    "decision": decision.name,
                    "kind": decision.name.partition(":")[0],
                    "layers": layers.get(decision.name, []),
                    "options": options,
                    "original": options[-1],
                }
                note = getattr(cut, "note", "")
                rows.append(row | ({"note": note} if note else {}))
        for left in self.ignored:
            rows.append({"kind": left.kind, "layers": [left.layer], "reason": left.reason})
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": None, "_attended": None}


def _default() -> tuple[Cut, ...]:
    from espalier.compress.depth import Depth
    from espalier.compress.widths import Widths

    return (Widths(), Depth())


def _rank(cut: Cut) -> float:
    if not isinstance(cut, Cut):
        raise EspalierError(f"cuts are such as Widths() or Depth(), got {cut!r}")
    return ORDER.index(cut.kind) if cut.kind in ORDER else 1.5


def _classes(model: nn.Module, example: Tensor) -> int:
    """The width of the output. Errors: `EspalierError` when the output is no tensor."""
    try:
        with deployed(model):
            output = model(example[:1])
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EspalierError(
            f"{type(model).__name__} does not run on an example of shape {tuple(example.shape)} "
            f"and {example.dtype}: {first}"
        ) from error
    if isinstance(output, Tensor) and output.dim() > 0:
        return int(output.shape[-1])
    kinds = [k for k in ("logits", "last_hidden_state") if hasattr(output, k)]
    take = f"output.{kinds[0]}" if kinds else "one tensor"
    raise EspalierError(
        f"a model must give one tensor, {type(model).__name__} gives "
        f"{type(output).__name__}: wrap it in a module whose forward returns {take}"
    )


def _conditioned(decisions: Sequence[Decision], cuts: Sequence[BoundCut]) -> list[Decision]:
    """Decisions that only concern layers of blocks are active where these are kept."""
    reach: dict[str, set[str]] = {d.name: set() for d in decisions}
    for cut in cuts:
        for path, names in cut.layers().items():
            for name in names:
                reach[name].add(path)
    blocks = [d for d in decisions if d.name.startswith("depth:")]
    found = []
    for decision in decisions:
        own = reach[decision.name]
        around = {
            b.name: (b.options[-1],)
            for b in blocks
            if own and own <= reach[b.name] and (decision not in blocks or own < reach[b.name])
        }
        found.append(replace(decision, when={**decision.when, **around}) if around else decision)
    return found


def _nothing(name: str, ignored: Sequence[Ignored]) -> str:
    why = "; ".join(f"{row.layer}: {row.reason}" for row in ignored[:3])
    return f"nothing of {name!r} can be decided with these cuts" + (f" ({why})" if why else "")
