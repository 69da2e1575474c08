"""A part of a model that is left out: what takes its place, and whether the model runs without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from espalier.compress.calls import Call
from espalier.compress.coupling.fast_paths import ONE_STEP, in_steps
from espalier.export import deployed
from espalier.export.placing import places
from espalier.export.quiet import quiet

_NO_ATTENTION = {"batch_first": True, "in_proj_bias": None, "_qkv_same_embed_dim": False}


@dataclass(frozen=True)
class Part:
    """A module to be replaced. `plain`: it is called with one tensor and gives one; otherwise the
    first of `outputs` results is a tensor and the rest become None (0: no tuple). `attention`: it
    is torch's own, at which torch's encoder layers look. `keyword`: by what name it is given its
    first tensor, where it is not given it by place. `keys`: what it names its results where it gives
    a dictionary, the tensor's name first."""

    path: str
    plain: bool
    outputs: int = 0
    attention: bool = False
    keyword: str = ""
    keys: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Removal:
    """A block or a branch; `inside`: the paths of all modules in it. `zero`: its result is 0, else it is its input. `shaped`: zeros of the
    input's shape, not one zero that is broadcast."""

    name: str
    parts: tuple[Part, ...]
    inside: tuple[str, ...]
    zero: bool
    shaped: bool = False

    def apply(self, model: nn.Module) -> None:
        """Replace the modules; of plain ones nothing but `nn.Identity` is left."""
        for holder, name, part in self._places(model):
            holder._modules[name] = self._stand_in(part).train(model.training)
            in_steps(holder)

    def _places(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, Part]]:
        """Where each part is held, and by what name."""
        for part in self.parts:
            parent, _, last = part.path.rpartition(".")
            try:
                holder = model.get_submodule(parent)
            except AttributeError:  # it went with a block around it
                continue
            if last in holder._modules:
                for place in places(model, holder.get_submodule(last)):
                    yield *place, part

    def _stand_in(self, part: Part) -> nn.Module:
        if part.plain and not self.zero:
            return nn.Identity()
        return _passing(part, self.zero, self.shaped)

    def trouble(self, model: nn.Module, example: Tensor, expected: Any) -> str:
        """Why the model does not run as before without it, when it gave `expected`; '' where it
        does. The model is left as it was."""
        before = [(h, n, h._modules[n], vars(h).get(ONE_STEP)) for h, n, _ in self._places(model)]
        try:
            with quiet(), deployed(model):
                self.apply(model)
                got = model(example)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return f"without it the model does not run: {first}"
        finally:
            for holder, name, module, one_step in before:
                holder._modules[name] = module
                if one_step is not None:
                    setattr(holder, ONE_STEP, one_step)
        same = _shapes(got) == _shapes(expected)
        return "" if same else "without it the model's output changes its shape"

    def tried(self, model: nn.Module, example: Tensor, expected: Any) -> tuple[Removal, str]:
        """The form of it with which the model runs, and what is wrong where none is."""
        reason = self.trouble(model, example, expected)
        if reason and self.zero:  # an addition in place needs the whole shape
            shaped = replace(self, shaped=True)
            return shaped, shaped.trouble(model, example, expected)
        return self, reason


def _shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tree_leaves(output) if isinstance(t, Tensor)]


def _passing(part: Part, zero: bool, shaped: bool) -> nn.Module:
    """A module of torch's own that gives its first input, or zero, whatever else it is given."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder(part.keyword or "hidden_states")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    made: Any = x
    if zero and shaped:
        made = graph.call_function(torch.zeros_like, (x,))
    elif zero:
        made = graph.call_method("new_zeros", (x, ()))
    if part.attention:
        root.__dict__.update(_NO_ATTENTION)
        with warnings.catch_warnings(action="ignore"):
            for name in _NO_ATTENTION:  # what a graph reads is kept, and copied, by its module
                graph.get_attr(name)
    if part.outputs:
        made = (made, *[None] * (part.outputs - 1))
    elif part.keys:
        made = {part.keys[0]: made, **dict.fromkeys(part.keys[1:])}
    graph.output(made)
    return fx.GraphModule(root, graph)


def part_of(call: Call) -> Part:
    """A module to be replaced, as it was called."""
    gives = call.output
    outputs = len(gives) if isinstance(gives, tuple) else 0
    attention = isinstance(call.module, nn.MultiheadAttention)
    return Part(call.path, call.single, outputs, attention, keyword(call) or "", _names(gives))


def keyword(call: Call) -> str | None:
    """By what name a call is given its first tensor: '' by place; None where it can't be told."""
    if call.args:
        return "" if isinstance(call.args[0], Tensor) else None
    holding = [name for name, given in call.kwargs.items() if _first(given) is not None]
    return holding[0] if holding and isinstance(call.kwargs[holding[0]], Tensor) else None


def _names(gives: Any) -> tuple[Any, ...]:
    """The names of a dictionary, that of its first tensor before the others; none of deeper ones."""
    first = _first(gives) if isinstance(gives, dict) else None
    held = [name for name in gives if gives[name] is first] if first is not None else []
    return (held[0], *(name for name in gives if name != held[0])) if held else ()


def _first(tree: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)), None)
