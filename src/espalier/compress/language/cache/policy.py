"""A cache policy: the plans of all layers of a model, made into caches, measured, kept in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.cache.low_rank import Factors, Rotation
from espalier.compress.language.cache.plan import Plan, Span, both, grown
from espalier.compress.language.cache.spans import PLAN, hold
from espalier.costs.language_parts import sliding_window
from espalier.errors import DataError, EspalierError, MissingExtra

_FILE, _TENSORS = "cache_policy.json", "cache_factors.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class Shape:
    """What a layer's cache depends on: its place in the cache, key and value heads, channels of one."""

    path: str
    index: int
    groups: int
    head: int


def give(model: nn.Module, plans: Mapping[str, Plan]) -> None:
    """Gives attentions of a model, by layer path, their plans, in place.

    A plan stays with its attention when layers or heads are cut away, and adds to one that is
    there. Spans narrow what the attention sees from now on, whatever cache there is; the rest
    only says what `Policy.of(model)` makes. Attentions that slide by themselves hold no more than
    their window then. Errors: `EspalierError`.
    """
    owners = {layer.path: layer.attention for layer in anatomy(model).layers}
    slides = sliding(model) if plans else {}
    for path in dict.fromkeys([*plans, *slides]):
        if (attention := owners.get(path)) is None:
            raise EspalierError(f"a cache plan for {path}, whose attention is not there")
        module: Any = model.get_submodule(attention.path)
        plan, known = plans.get(path), getattr(module, PLAN, None)
        if plan is not None and known is not None:
            plan = both(known, plan)
        plan = plan or known or Plan()
        if path in slides:
            plan = slid(plan, slides[path], attention.groups)
        plan.bundles(attention.groups)
        setattr(module, PLAN, plan)
        if any(plan.spans):
            hold(model, attention)


def slid(plan: Plan, window: int, groups: int) -> Plan:
    """The plan of an attention that sees only `window` tokens by itself: no group of heads holds
    more, and first tokens are not kept, as the model's own mask hides them."""
    spans = plan.spans or (None,) * groups
    own = (Span(window) if s is None or s.fixed > window else s for s in spans)
    return replace(plan, spans=tuple(own), sinks=0)


def sliding(model: nn.Module) -> dict[str, int]:
    """Layer path -> tokens, of attentions that see only so many by the model's own design."""
    owners = {layer.path: layer.attention for layer in anatomy(model).layers}
    found = {path: sliding_window(model, a) for path, a in owners.items() if a is not None}
    return {path: window for path, window in found.items() if window is not None}


@dataclass(frozen=True, eq=False)
class Policy:
    """The cache of a model: plans by layer path; other layers are kept as `transformers` does.

    `shapes`: the layers whose attention is there, as the model has them; `own`: bytes of one of the
    model's numbers. Calling a policy gives a new, empty cache:
    `model.generate(ids, past_key_values=policy())`.
    """

    plans: Mapping[str, Plan]
    shapes: tuple[Shape, ...]
    own: int = 4

    @classmethod
    def of(cls, model: nn.Module, plans: Mapping[str, Plan] | None = None) -> Policy:
        """The policy of a model: the plans that its attentions were given, and these.

        Errors: `EspalierError` for a layer that it does not have, `BudgetError` for a limit that
        a plan can't keep.
        """
        shapes: list[Shape] = []
        found: dict[str, Plan] = {}
        for layer in anatomy(model).layers:
            if (attention := layer.attention) is None:
                continue
            module: Any = model.get_submodule(attention.path)
            index = int(getattr(module, "layer_idx", len(shapes)))
            shapes.append(Shape(layer.path, index, attention.groups, attention.head))
            if (known := getattr(module, PLAN, None)) is not None:
                found[layer.path] = known
        for path, plan in (plans or {}).items():
            found[path] = both(found[path], plan) if path in found else plan
        size = next(p.element_size() for p in model.parameters() if p.is_floating_point())
        return cls(found, tuple(shapes), size)

    def __post_init__(self) -> None:
        known, found = {shape.path: shape for shape in self.shapes}, {}
        for path, plan in self.plans.items():
            if path not in known:
                raise EspalierError(f"a cache plan for {path}, whose attention is not there")
            shape = known[path]
            plan.bundles(shape.groups)
            found[path] = grown(plan, shape.groups, shape.head, self.own)
        object.__setattr__(self, "plans", found)

    @classmethod
    def uniform(cls, model: nn.Module, plan: Plan) -> Policy:
        """The same plan for every layer."""
        own = cls.of(model)
        return replace(own, plans={shape.path: plan for shape in own.shapes})

    def __call__(self) -> Any:
        """A new cache. Errors: `MissingExtra` without transformers."""
        try:
            from espalier.compress.language.cache.cache import PlannedCache
        except ImportError as error:
            raise MissingExtra("transformers", "transformers") from error
        plans = [Plan()] * (1 + max(shape.index for shape in self.shapes))
        for shape in self.shapes:
            plans[shape.index] = self.plan(shape.path)
        return PlannedCache(plans)

    def plan(self, path: str) -> Plan:
        """The plan of a layer."""
        return self.plans.get(path, Plan())

    def bytes(self, length: int, batch: int = 1, peak: bool = True) -> int:
        """Bytes of the cache at `length` tokens; with `peak` the most at any step up to them.

        The peak of layers together is at most the sum of theirs, which is what is given.
        """
        total = 0
        for shape in self.shapes:
            plan = self.plan(shape.path)
            what = plan.peak if peak else plan.held
            total += int(what(length, shape.groups, shape.head, self.own))
        return total * batch

    @property
    def capacity(self) -> int:
        """The most tokens that a text may have, where caches grow into their bits; 0: any number."""
        return min((plan.capacity for plan in self.plans.values() if plan.limit), default=0)

    def within(self, tokens: int) -> Policy:
        """The policy whose growing caches are for texts of so many tokens: at the end of a short text
        they are as full, and in as few bits, as these are at the end of a long one."""
        plans = {p: replace(x, capacity=tokens) for p, x in self.plans.items() if x.capacity}
        return replace(self, plans={**self.plans, **plans}).in_numbers(self.own)

    def in_numbers(self, own: int) -> Policy:
        """The policy of the same model in numbers of `own` bytes: a growing cache's limit follows."""
        plans = {p: replace(x, limit=0) for p, x in self.plans.items() if x.capacity}
        return replace(self, plans={**self.plans, **plans}, own=own)

    # --- files -----------------------------------------------------------------------------------

    def save(self, folder: Path) -> Path:
        """Writes the policy beside a model: JSON, and factors as safetensors where there are any."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        layers = {path: _to_json(path, plan, tensors) for path, plan in self.plans.items()}
        data = {"version": _VERSION, "own": self.own, "plans": layers}
        data["shapes"] = [asdict(shape) for shape in self.shapes]
        if tensors:
            save_file({k: t.contiguous() for k, t in tensors.items()}, folder / _TENSORS)
        (folder / _FILE).write_text(json.dumps(data, indent=1) + "\n")
        return folder / _FILE

    @classmethod
    def load(cls, folder: Path) -> Policy:
        """The policy that `save` wrote. Errors: `DataError`."""
        from safetensors.torch import load_file

        try:
            data = json.loads((folder / _FILE).read_text())
            tensors = load_file(folder / _TENSORS) if (folder / _TENSORS).exists() else {}
            plans = {path: _from_json(path, row, tensors) for path, row in data["plans"].items()}
            shapes = tuple(Shape(**row) for row in data["shapes"])
            return cls(plans, shapes, int(data["own"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"a cache policy is a folder's {_FILE}, written by Policy.save"
            raise DataError(f"{rule}; {str(folder)!r}: {error}") from error


def _to_json(path: str, plan: Plan, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    row = {**vars(plan), "spans": [None if s is None else vars(s) for s in plan.spans]}
    for part in ("keys", "values"):
        factors: Factors | None = row.pop(part)
        if factors is None:
            continue
        row[part] = {"groups": factors.groups}
        tensors[f"{path}.{part}.down"] = factors.down
        tensors[f"{path}.{part}.up"] = factors.up
        if factors.rotation is not None:
            row[part]["scale"] = factors.rotation.scale
            tensors[f"{path}.{part}.rates"] = factors.rotation.rates
    return row


def _from_json(path: str, row: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Plan:
    own = {**row, "spans": tuple(None if s is None else Span(**s) for s in row["spans"])}
    for part in ("keys", "values"):
        if (about := row.get(part)) is None:
            continue
        at = f"{path}.{part}"
        turn = Rotation(tensors[f"{at}.rates"], about["scale"]) if "scale" in about else None
        own[part] = Factors(tensors[f"{at}.down"], tensors[f"{at}.up"], about["groups"], turn)
    return Plan(**own)
