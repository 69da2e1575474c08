"""The matrices of a language model and what decides their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import Space

if TYPE_CHECKING:
    from espalier.compress.language.anatomy import Anatomy, Attention, Experts, Feed, Layer, Weights

Array = NDArray[np.float64]
_NORMS = {
    "attention": {"input_layernorm", "ln_1", "layernorm_before", "self_attn_layer_norm"},
    "feed": {
        *("post_attention_layernorm", "ln_2", "layernorm_after", "final_layer_norm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
}
_WORDS = {"attention": "attention", "feed": "feed-forward"}
Place = tuple[str | None, str | None]  # the decisions on bits and on sparsity
_NOWHERE: Place = (None, None)
EVERY = "every"  # the place of a decision that stands for all layers alike


@dataclass(frozen=True)
class Axis:
    """One side of a matrix: its size, and the decision whose options it is a multiple of."""

    whole: int
    decision: str | None = None
    most: int = 1  # the decision's last option

    def size(self, options: Mapping[str, Array]) -> Array:
        """The size at each option."""
        if self.decision is None:
            return np.array(float(self.whole))
        return options[self.decision] * (self.whole / self.most)


ONE = Axis(1)


@dataclass(frozen=True)
class Matrix:
    """A matrix of `axes` (rows, columns), one for each of `stack`; `active` of them meet a token.

    `bits` is the decision on how many bits a weight has, `sparsity` the one on how many stay.
    """

    axes: tuple[Axis, Axis]
    bits: str | None = None
    stack: Axis = ONE
    active: Axis | None = None
    sparsity: str | None = None

    def decisions(self, metric: str) -> tuple[str, ...]:
        """What the metric of this matrix hangs on."""
        axes = [*self.axes, self.stack]
        if metric == "active_params" and self.active is not None:
            axes.append(self.active)
        names = [axis.decision for axis in axes]
        if metric == "bytes":
            names += [self.bits, self.sparsity]
        return tuple(name for name in names if name is not None)

    def copies(self, options: Mapping[str, Array], metric: str) -> Array:
        """How many of it count."""
        count = self.stack.size(options)
        if metric == "active_params" and self.active is not None:
            return np.minimum(count, self.active.size(options))
        return count


@dataclass(frozen=True)
class Part:
    """Some matrices that come and go together: where any decision of `presence` is 0, all go.

    `cache` are the key/value groups of an attention with `head` channels each; `window` tokens are
    the most that it holds, if it is bounded.
    """

    name: str
    layer: str
    presence: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    cache: Axis | None = None
    head: int = 0
    window: int | None = None


def parts(model: Any, anatomy: Anatomy, space: Space) -> Iterator[Part]:
    """All parts of a model; together they hold each parameter once."""
    yield from _Reading(model, anatomy, space).all()


class _Reading:
    def __init__(self, model: Any, anatomy: Anatomy, space: Space) -> None:
        self.model, self.anatomy, self.space = model, anatomy, space
        self.numbers = {name: p.numel() for name, p in model.named_parameters()}
        self.hidden = self.axis(anatomy.width, "hidden", "model")

    def all(self) -> Iterator[Part]:
        found = [*self.inside(), *self.tables()]
        yield from found
        left = sum(self.numbers.values())
        left -= sum(_numel(m) for part in found for m in part.matrices)
        yield Part("norms and positions", "", (), self.rest(left))

    def inside(self) -> Iterator[Part]:
        for layer in self.anatomy.layers:
            left = sum(n for name, n in self.numbers.items() if _under(name, layer.path))
            found = [*self.sublayers(layer), *self.norms(layer)]
            yield from found
            left -= sum(_numel(m) for part in found for m in part.matrices)
            block = self.named("block", layer.path)
            if left:
                yield Part(f"{layer.path} norms", layer.path, block, self.rest(left))

    def sublayers(self, layer: Layer) -> Iterator[Part]:
        block = self.named("block", layer.path)
        if layer.attention is not None:
            presence = (*block, *self.named("attention", layer.path))
            yield self.attention(layer.attention, layer.path, presence)
        if layer.feed is not None:
            presence = (*block, *self.named("feed", layer.path))
            feed: Any = layer.feed
            mixture = not hasattr(feed, "up")
            made = self.mixed(feed, layer.path) if mixture else self.dense(feed, layer.path)
            yield Part(f"{layer.path} feed-forward", layer.path, presence, tuple(made))

    def norms(self, layer: Layer) -> Iterator[Part]:
        """The norms that only feed or follow a sub-layer, and go with it."""
        own = {n: size for n, size in self.numbers.items() if _under(n, layer.path)}
        first = {n: n.removeprefix(layer.path + ".").partition(".")[0] for n in own}
        sandwich = "pre_feedforward_layernorm" in first.values()
        behind = not getattr(self.model.config, "do_layer_norm_before", True)
        block = self.named("block", layer.path)
        for kind in ("attention", "feed") if not behind else ():
            names = {"post_attention_layernorm"} if sandwich else set()
            names = _NORMS[kind] | names if kind == "attention" else _NORMS[kind] - names
            size = sum(own[n] for n, child in first.items() if child in names)
            if size:
                presence = (*block, *self.named(kind, layer.path))
                yield Part(f"{layer.path} {_WORDS[kind]}", layer.path, presence, self.rest(size))

    # --- sub-layers ----------------------------------------------------------------------------

    def attention(self, found: Attention, layer: str, presence: tuple[str, ...]) -> Part:
        queries = self.axis(found.heads * found.head, "heads", layer, found.groups)
        groups = self.axis(found.groups * found.head, "heads", layer, found.groups)
        qkv, out = self.bits(layer, "qkv"), self.bits(layer, "out")
        matrices = [
            *self.linear(found.query, queries, self.hidden, qkv),
            *self.linear(found.key, groups, self.hidden, qkv),
            *self.linear(found.value, groups, self.hidden, qkv),
            *self.linear(found.out, self.hidden, queries, out),
        ]
        matrices += self.head_norms(found, queries, groups)
        return Part(
            f"{layer} attention",
            layer,
            presence,
            tuple(matrices),
            cache=self.axis(found.groups, "heads", layer, found.groups),
            head=found.head,
            window=sliding_window(self.model, found),
        )

    def head_norms(self, found: Attention, queries: Axis, groups: Axis) -> Iterator[Matrix]:
        """Norms of queries and keys: of one head, or of all of them side by side."""
        for name, axis in (("q_norm", queries), ("k_norm", groups)):
            size = self.numbers.get(f"{found.path}.{name}.weight")
            if size:
                side = axis if size == axis.whole and size != found.head else Axis(size)
                yield Matrix((side, ONE))

    def dense(self, found: Feed, layer: str, fixed: bool = False) -> Iterator[Matrix]:
        units = Axis(found.width) if fixed else self.axis(found.width, "units", layer)
        up, down = self.bits(layer, "up"), self.bits(layer, "down")
        for weights in (found.up, found.gate):
            if weights is not None:
                yield from self.linear(weights, units, self.hidden, _NOWHERE if fixed else up)
        yield from self.linear(found.down, self.hidden, units, _NOWHERE if fixed else down)

    def mixed(self, found: Experts, layer: str) -> Iterator[Matrix]:
        count = self.axis(found.count, "experts", layer)
        active = self.axis(found.active, "active", layer)
        bits, units = self.bits(layer, "experts"), self.axis(found.width, "units", layer)
        twice = replace(units, whole=2 * found.width)
        yield Matrix((twice, self.hidden), bits[0], count, active, bits[1])
        yield Matrix((self.hidden, units), bits[0], count, active, bits[1])
        yield Matrix((count, self.hidden))
        if found.shared is not None:
            yield from self.dense(found.shared, layer, fixed=True)
            if f"{found.path}.shared_expert_gate.weight" in self.numbers:
                yield Matrix((ONE, self.hidden))

    def linear(self, weights: Weights, rows: Axis, columns: Axis, bits: Place) -> Iterator[Matrix]:
        yield Matrix((rows, columns), bits[0], sparsity=bits[1])
        if weights.bias(self.model) is not None:
            yield Matrix((rows, ONE))

    # --- outside the layers --------------------------------------------------------------------

    def tables(self) -> Iterator[Part]:
        a = self.anatomy
        rows = {"embedding": a.embedding, "head": None if a.tied else a.head}
        for name, path in rows.items():
            if path is None or f"{path}.weight" not in self.numbers or not a.vocabulary:
                continue
            size = self.numbers[f"{path}.weight"]
            wide = size == a.vocabulary * a.width  # OPT may have a narrower table
            side = self.hidden if wide else Axis(size // a.vocabulary)
            bits = f"bits:{path}" if f"bits:{path}" in self.space.names else None
            count = Axis(size // side.whole)
            yield Part(name, "", (), (Matrix((count, side), bits),))
        for name, size in self.numbers.items() if a.kind == "bert" else ():
            if name.endswith(("transform.dense.weight", "pooler.dense.weight")):
                yield Part(name, "", (), (Matrix((self.hidden, self.hidden)),))
            elif name.endswith("predictions.bias"):
                yield Part(name, "", (), (Matrix((Axis(size), ONE)),))

    def rest(self, count: int) -> tuple[Matrix, ...]:
        """Vectors as wide as the hidden states, and what is not."""
        wide, other = divmod(count, self.anatomy.width)
        matrices = [Matrix((Axis(wide), self.hidden))] if wide else []
        return tuple([*matrices, Matrix((Axis(other), ONE))] if other else matrices)

    # --- decisions by name ---------------------------------------------------------------------

    def named(self, kind: str, place: str) -> tuple[str, ...]:
        found = [f"{kind}:{p}" for p in (place, EVERY) if f"{kind}:{p}" in self.space.names]
        return tuple(found[:1])

    def axis(self, whole: int, kind: str, place: str, most: int | None = None) -> Axis:
        names = self.named(kind, place)
        return Axis(whole, names[0], most or whole) if names else Axis(whole)

    def bits(self, layer: str, part: str) -> Place:
        """The decisions on the bits and on the sparsity of a place."""
        found = []
        for kind in ("bits", "sparsity"):
            names = self.named(kind, f"{layer}.{part}") or self.named(kind, f"{EVERY}.{part}")
            found.append(names[0] if names else None)
        return found[0], found[1]


def sliding_window(model: Any, attention: Attention) -> int | None:
    """Tokens that an attention sees by the model's own design; None where it sees all."""
    module, config = model.get_submodule(attention.path), model.config
    kinds = getattr(config, "layer_types", None)
    whole = kinds is not None and kinds[module.layer_idx] != "sliding_attention"
    default = None if whole else getattr(config, "sliding_window", None)
    size = getattr(module, "sliding_window", default)
    return int(size) if size else None


def _numel(matrix: Matrix) -> int:
    rows, columns = matrix.axes
    return rows.whole * columns.whole * matrix.stack.whole


def _under(name: str, path: str) -> bool:
    return name.startswith(path + ".")
