"""Where the weights of a transformer are decided on, and what these weights are multiplied with.

Weights that kernels keep together are one place: queries, keys and values; gates and ups; all experts
of a layer. A place's linear maps read the same input, so one Gram matrix is enough for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, Experts, Feed, Weights
from espalier.train.running import device_of, evaluating

_ELEMENTS = 30_000_000  # of the experts' Gram matrices kept at once: 240 MB
EXPERTS = ("gate_up_proj", "down_proj")  # a layer's experts, stacked (n, o, d), as they run

Treat = Callable[[Tensor, Tensor, str], Tensor]  # (weight, gram, which) -> the new weight


@dataclass(frozen=True)
class Place:
    """Linear maps that are decided on together, and the module whose input they read.

    `weights` is empty for `experts`, which are two stacks of matrices on the module itself;
    `table`: an embedding, whose rows are looked up.
    """

    name: str
    module: str
    weights: tuple[Weights, ...] = ()
    experts: bool = False
    table: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that hold the weights."""
        return tuple(dict.fromkeys(w.path for w in self.weights)) or (self.module,)

    def shapes(self, model: nn.Module) -> tuple[tuple[int, ...], ...]:
        """Of each matrix `(o, d)`, or stack of matrices `(n, o, d)`."""
        module = model.get_submodule(self.module)
        if self.experts:
            return tuple(tuple(getattr(module, name).shape) for name in EXPERTS)
        return tuple(tuple(w.read(model).shape) for w in self.weights)

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights by part: maps that read the same input, one below the other `(o, d)`, or the
        stacks of experts `(n, o, d)`."""
        if self.experts:
            module: Any = model.get_submodule(self.module)
            return {name: getattr(module, name) for name in EXPERTS}
        return {"": torch.cat([w.read(model) for w in self.weights])}

    @torch.no_grad()
    def write(self, model: nn.Module, part: str, values: Tensor) -> None:
        """Puts the weights of a part in place, in the parameters' own type."""
        if self.experts:
            getattr(model.get_submodule(self.module), part).copy_(values)
            return
        views = [w.read(model) for w in self.weights]
        for view, new in zip(views, torch.split(values, [len(v) for v in views]), strict=True):
            view.copy_(new)


def places(anatomy: Anatomy, tables: bool = False) -> dict[str, Place]:
    """All places of a model by name, in the order they run: "model.layers.3.qkv", ".out", ".up"
    (with the gate), ".down", ".experts"; with `tables` the embedding and the head too."""
    found: list[Place] = []
    if tables and anatomy.vocabulary and not anatomy.tied:
        own = Weights(anatomy.embedding)
        found.append(Place(anatomy.embedding, anatomy.embedding, (own,), table=True))
    for layer in anatomy.layers:
        if layer.attention is not None:
            a = layer.attention
            found.append(Place(f"{layer.path}.qkv", a.query.path, (a.query, a.key, a.value)))
            found.append(Place(f"{layer.path}.out", a.out.path, (a.out,)))
        if isinstance(layer.feed, Experts):
            found.append(Place(f"{layer.path}.experts", f"{layer.feed.path}.experts", experts=True))
        feed = layer.feed.shared if isinstance(layer.feed, Experts) else layer.feed
        found += _feed(layer.path, feed)
    if tables and anatomy.head is not None:
        # a shared table is multiplied with at the end: that is where its errors are seen
        name = anatomy.embedding if anatomy.tied else anatomy.head
        found.append(Place(name, anatomy.head, (Weights(anatomy.head),)))
    return {place.name: place for place in found}


def _feed(layer: str, feed: Feed | None) -> Iterator[Place]:
    if feed is not None:
        both = (feed.up,) if feed.gate is None else (feed.gate, feed.up)
        yield Place(f"{layer}.up", both[0].path, both)
        yield Place(f"{layer}.down", feed.down.path, (feed.down,))


class _Done(Exception):
    """Nothing that is still to run is asked for."""


def treat_in_turn(
    model: nn.Module, inputs: Tensor, wanted: Mapping[str, tuple[Place, Treat]]
) -> None:
    """Gives every place new weights just before it runs on `inputs (b, ...)`, so that each sees what
    the places before it give now. Stops when the last is done; a place that never runs is treated
    as if nothing ever came in."""
    left = dict(wanted)

    def hook_of(name: str) -> Callable[..., None]:
        place, treat = wanted[name]

        def hook(module: nn.Module, args: Any) -> None:
            if name not in left:
                return  # it runs more than once: the first decides
            del left[name]
            for part, weight in place.read(model).items():
                new = [treat(w, g, part) for w, g in _with_grams(model, place, part, weight, args)]
                place.write(model, part, new[0] if len(new) == 1 else torch.cat(new))
            if not left:
                raise _Done

        return hook

    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for name, (place, _) in wanted.items():
            module = model.get_submodule(place.module)
            stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        _forward(model, inputs)
        for name, (place, treat) in wanted.items():
            for part, weight in place.read(model).items() if name in left else ():
                d = weight.shape[-1]
                none = torch.zeros(*weight.shape[:-2], d, d, dtype=torch.float64)
                place.write(model, part, treat(weight, none.to(weight.device), part))


def grams(
    model: nn.Module, inputs: Tensor, wanted: Sequence[Place], batch: int = 16
) -> dict[str, dict[str, Tensor]]:
    """Gram matrices of what each place reads, by name and part: `(d, d)`, experts' `(n, d, d)`."""

    def run() -> None:
        for rows in torch.split(inputs, batch):
            _forward(model, rows)

    return collected(model, wanted, run)


def collected(
    model: nn.Module, wanted: Sequence[Place], run: Callable[[], None]
) -> dict[str, dict[str, Tensor]]:
    """Gram matrices of what each place reads while `run` calls the model, or layers of it."""
    found: dict[str, dict[str, Tensor]] = {}

    def hook_of(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            own = found.setdefault(place.name, {})
            for part, weight in place.read(model).items():
                new = [g for _, g in _with_grams(model, place, part, weight, args)]
                gram = new[0] if len(new) == 1 else torch.cat(new)
                own[part] = own[part] + gram if part in own else gram

        return hook

    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for place in wanted:
            module = model.get_submodule(place.module)
            stack.callback(module.register_forward_pre_hook(hook_of(place)).remove)
        run()
    return found


def _forward(model: Any, inputs: Tensor) -> None:
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        model(inputs.to(device_of(model)), **cached)
    except _Done:
        return


def _with_grams(
    model: nn.Module, place: Place, part: str, weight: Tensor, args: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight, or as many of the experts at once as memory allows, with its inputs' Gram."""
    if not place.experts:
        x = args[0].reshape(-1, weight.shape[-1]).double()
        yield weight, x.T @ x
        return
    experts: Any = model.get_submodule(place.module)
    hidden, index, gates = args
    step = max(1, _ELEMENTS // weight.shape[-1] ** 2)
    for low in range(0, len(weight), step):
        own = range(low, min(low + step, len(weight)))
        found = [expert_inputs(experts, n, hidden, index, gates, part) for n in own]
        yield weight[low : low + step], torch.stack([x.T @ x for x in found])


def expert_inputs(
    experts: Any, expert: int, hidden: Tensor, index: Tensor, gates: Tensor, part: str
) -> Tensor:
    """What a matrix of one expert reads `(tokens, d)`, each token times its gate: an expert's errors
    weigh as much as its say."""
    rows, at = torch.where(index == expert)
    x, gate = hidden[rows], gates[rows, at, None].double()
    if part == "down_proj":
        first, second = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        x = experts.act_fn(first) * second
    return x.double() * gate
