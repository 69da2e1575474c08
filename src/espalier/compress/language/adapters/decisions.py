"""Adapters as decisions: which kind, what size, in which layers, when a model is to be tuned.

The modules are those of the `peft` library. Sizes are written as AutoPEFT does (Zhou et al., 2024,
https://arxiv.org/abs/2301.12132): how often the widest bottleneck is halved, until nothing is left.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.language.adapters.kinds import KINDS, library
from espalier.compress.language.adapters.kinds import merged as merged
from espalier.compress.language.anatomy import Anatomy, Feed, Layer, Weights, anatomy
from espalier.errors import EspalierError, unknown
from espalier.space import Decision, choice, ordinal
from espalier.space.options import Option

PARTS = ("attention", "feed", "prefix")


@dataclass(frozen=True)
class Adapters(Cut):
    """Adapters on a frozen model.

    - "adapter:attention", "adapter:feed": the rank on the query, key, value and output maps, and on
      those of the feed-forward layers: the model's width halved so many times. The last option is
      none at all, which is the original.
    - "adapter:prefix": learned keys and values before every layer's own, `prefix` of them halved so
      many times; the last option is none. Causal models only; layers can't be left out of it.
    - "adapter:model.layers.3": 0 where the layer has the adapters, 1 where it stays as it was; not
      offered with `layers=False`.
    - "adapter:kind": one of `kinds` where there are several: "lora" (Hu et al., 2021), "dora" (Liu
      et al., 2024), "loha" (Hyeon-Woo et al., 2022).

    `widest`: the largest rank, where it is not the model's width. Every kind of
    adapter starts as the model is, a prefix from zeros.
    Experts and their routers are left alone. Errors: `EspalierError` for parts and kinds that there
    are not.
    """

    parts: Sequence[str] = ("attention", "feed")
    kinds: Sequence[str] = ("lora",)
    layers: bool = True
    widest: int | None = None
    prefix: int = 32
    kind = "adapter"

    def __post_init__(self) -> None:
        for what, given, known in (("part", self.parts, PARTS), ("kind", self.kinds, KINDS)):
            if not given:
                raise EspalierError(f"adapters need at least one {what} of {', '.join(known)}")
            for name in given:
                if name not in known:
                    raise EspalierError(unknown(f"{what} of adapters", name, known))
        for name, size in (("widest", self.widest), ("prefix", self.prefix)):
            if size is not None and size < 1:
                raise EspalierError(f"{name} of adapters must be at least 1, got {size}")

    def bind(self, model: nn.Module, example: Tensor) -> BoundAdapters:
        """The decisions of a model. Errors: `EspalierError` where it can't be read."""
        del example
        made = anatomy(model)
        if "prefix" in self.parts and not made.decoder:
            raise EspalierError(
                f"a prefix needs a causal model, {made.kind} is none: leave 'prefix' out of parts"
            )
        return BoundAdapters(self, model, made)


class BoundAdapters(BoundCut):
    """The adapters that one model can have."""

    def __init__(self, cut: Adapters, model: nn.Module, made: Anatomy) -> None:
        self._cut, self._kind = cut, made.kind
        self._largest = {"prefix": cut.prefix}
        self._targets: dict[
            str, dict[str, tuple[str, int, int]]
        ] = {}  # part -> path -> layer, size
        ignored = []
        for part in PARTS[:2]:
            found = self._targets[part] = {}
            self._largest[part] = cut.widest or made.width
            for layer in made.layers if part in cut.parts else ():
                maps = _maps(layer, part)
                if not maps:
                    reason = "its experts are stored as one tensor, or the sub-layer was dropped"
                    ignored.append(Ignored(layer.path, "adapter", reason))
                for weights in maps:
                    module: Any = model.get_submodule(weights.path)
                    sizes = tuple(module.weight.shape)
                    out, inner = sizes[::-1] if weights.flipped else sizes
                    found[weights.path] = layer.path, int(out), int(inner)
        self.ignored = tuple(ignored)
        self._prefix_row = sum(  # weights of one learned position
            2 * layer.attention.groups * layer.attention.head
            for layer in made.layers
            if layer.attention is not None
        )
        self.decisions: tuple[Decision, ...] = tuple(self._offered(made))

    def _offered(self, made: Anatomy) -> list[Decision]:
        parts = [p for p in self._cut.parts if p == "prefix" or self._targets[p]]
        found: list[Decision] = [
            ordinal(f"adapter:{part}", *range(self._largest[part].bit_length() + 1))
            for part in parts
        ]
        if self._cut.layers and parts != ["prefix"]:
            inside = {row[0] for rows in self._targets.values() for row in rows.values()}
            found += [ordinal(f"adapter:{x.path}", 0, 1) for x in made.layers if x.path in inside]
        if len(self._cut.kinds) > 1:
            found.append(choice("adapter:kind", *self._cut.kinds))
        return found

    def size(self, part: str, choices: Mapping[str, Option]) -> int:
        """The rank of a part, or the positions of the prefix; 0 where it is not there."""
        halved = choices.get(f"adapter:{part}")
        return 0 if halved is None else self._largest[part] >> int(halved)

    def ranks(self, choices: Mapping[str, Option]) -> dict[str, int]:
        """Module path -> the rank of its adapter, for those that have one."""
        return {
            path: rank
            for part, rows in self._targets.items()
            if (rank := self.size(part, choices))
            for path, (layer, _, _) in rows.items()
            if not choices.get(f"adapter:{layer}", 0)
        }

    def parameters(self, choices: Mapping[str, Option]) -> int:
        """How many weights are learned, without building anything."""
        count = KINDS[self._chosen(choices)][1]
        rows = {path: row for part in self._targets.values() for path, row in part.items()}
        ranks = self.ranks(choices)
        return self.size("prefix", choices) * self._prefix_row + sum(
            count(rows[path][1], rows[path][2], rank) for path, rank in ranks.items()
        )

    def _chosen(self, choices: Mapping[str, Option]) -> str:
        return str(choices.get("adapter:kind", self._cut.kinds[0]))

    def configs(self, choices: Mapping[str, Option]) -> list[Any]:
        """peft's configurations, in the order in which to wrap with them: of the adapters on maps,
        where there are any, and of the prefix. Each can be saved: `adapter_config.json`."""
        return self._configs(choices, self.ranks(choices))

    def _configs(self, choices: Mapping[str, Option], ranks: Mapping[str, int]) -> list[Any]:
        found = []
        if ranks:
            found.append(KINDS[self._chosen(choices)][0](ranks))
        if length := self.size("prefix", choices):
            kinds = library()
            found.append(
                kinds.PrefixTuningConfig(
                    task_type="CAUSAL_LM", num_virtual_tokens=length, init_weights="zero"
                )
            )
        return found

    def adapted(self, model: nn.Module, choices: Mapping[str, Option]) -> nn.Module:
        """The model with its adapters, changed in place, ready to be tuned: only they learn.

        With a prefix it is peft's `PeftModelForCausalLM` around the model, otherwise the model.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        out, present = model, dict(model.named_modules())  # other cuts may have left layers out
        ranks = {path: r for path, r in self.ranks(choices).items() if path in present}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a model is wrapped a second time is meant
            for config in self._configs(choices, ranks):
                learned = [p for p in model.parameters() if p.requires_grad]
                if config.peft_type == "PREFIX_TUNING":
                    out = library().get_peft_model(model, config)
                    for parameter in learned:  # peft freezes all but the prefix
                        parameter.requires_grad_(True)
                else:
                    library().inject_adapter_in_model(config, model)
        return out

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Put the adapters into a model. Errors: `EspalierError` for a prefix, which stands around
        a model and not in it: `adapted` gives one."""
        if self.size("prefix", choices):
            raise EspalierError(
                "a prefix stands around the model, not in it: call adapted(model, choices), or "
                "leave 'prefix' out of parts"
            )
        self.adapted(model, choices)

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Linear map -> the decisions of its part, of its layer, and of the kind."""
        known = {d.name for d in self.decisions}
        rows = [(part, *row) for part, found in self._targets.items() for row in found.items()]
        return {
            path: tuple(
                name
                for name in (f"adapter:{part}", f"adapter:{layer}", "adapter:kind")
                if name in known
            )
            for part, path, (layer, _, _) in rows
        }

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The map with its adapter, if it has one."""
        rank = self.ranks(choices).get(name)
        if rank is None:
            return layer
        holder = nn.ModuleDict({"map": copy.deepcopy(layer)})
        config = KINDS[self._chosen(choices)][0]({"map": rank})
        library().inject_adapter_in_model(config, holder)
        return holder["map"]


def _maps(layer: Layer, part: str) -> list[Weights]:
    """The linear maps of a layer's part, each module once."""
    maps: list[Weights | None] = []
    if part == "attention" and (a := layer.attention):
        maps = [a.query, a.key, a.value, a.out]
    elif part == "feed" and isinstance(f := layer.feed, Feed):
        maps = [f.gate, f.up, f.down]
    return list({w.path: w for w in maps if w is not None}.values())
