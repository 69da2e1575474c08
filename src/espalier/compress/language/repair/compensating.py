"""What goes is made up for by what stays: the last map of a sub-layer is fitted anew, closed-form.

A feed-forward's `down` and an attention's `out` add up what units and heads give. Where some go, the
weights of the others take over what can be told from them on the calibration text, by least
squares. The same loss says which go first.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Experts, Layer, Weights, anatomy
from espalier.compress.language.importance import hooked, passes
from espalier.compress.language.weights.places import Place, grams, places

DAMP = 0.01  # of the mean square of a channel, added to each: channels that hang together
SHARE = 0.25  # of the machine's memory, that all Gram matrices together may take
_REMEMBERED = 100_000_000  # numbers of solved shares: 0.4 GB
_ROUNDS = 256  # of elimination, each of which takes several units where there are more


@dataclass(frozen=True)
class Moments:
    """Second moments of what a map reads: `gram` (d, d), or (experts, d, d); `mean` (d,) where the map
    has a bias that can take up means, whose gram is that of deviations from it."""

    gram: Tensor
    mean: Tensor | None = None

    def order(self, weight: Tensor, each: int = 1) -> Tensor:
        """Groups of `each` channels in the order they go: always those whose loss, after all that
        are left have made up for it, is least.

        `weight` (o, d) or (experts, o, d). The loss of removing columns S is tr(W_S K^-1 W_S') with
        K the block of the inverse Gram matrix (the rule of optimal brain surgeon for whole columns;
        Hassibi & Stork, 1993; Kurtic, Frantar & Alistarh, ZipLM, 2023).
        """
        if weight.dim() == 3:
            pairs = zip(self.gram, weight, strict=True)
            return torch.stack([Moments(g).order(w, each) for g, w in pairs])
        w = weight.detach().double().cpu().clone()
        inverse = torch.linalg.inv(self._damped(self.gram))
        left = torch.arange(w.shape[1] // each)
        gone: list[Tensor] = []
        step = max(1, len(left) // _ROUNDS) if each == 1 else 1
        while len(left):
            loss = _losses(w, inverse, left, each)
            worst = left[loss.argsort(stable=True)[: min(step, len(left))]]
            gone.append(worst)
            left = left[~torch.isin(left, worst)]
            _eliminate(w, inverse, _channels(worst, each))
        return torch.cat(gone)

    def take_over(self, weight: Tensor, bias: Tensor | None, kept: Tensor) -> None:
        """Change the kept columns of `weight` (o, d), and `bias` (o,), in place, for the loss of the
        others; `kept` ascending."""
        self.move(weight, bias, kept, self.share(kept))

    def share(self, kept: Tensor) -> Tensor:
        """How much of each that goes each that is kept takes over, `(kept, gone)`."""
        gone = self._gone(kept)
        found: Tensor = torch.linalg.solve(
            self._damped(self.gram)[kept][:, kept], self.gram[kept][:, gone]
        )
        return found

    def move(self, weight: Tensor, bias: Tensor | None, kept: Tensor, share: Tensor) -> None:
        """`take_over` with shares that were solved for before."""
        gone, share = self._gone(kept), share.double()
        lost = weight[:, gone.to(weight.device)].double().cpu()
        weight[:, kept.to(weight.device)] += (lost @ share.T).to(weight)
        if bias is not None and self.mean is not None:
            bias += (lost @ (self.mean[gone] - share.T @ self.mean[kept])).to(bias)

    def _gone(self, kept: Tensor) -> Tensor:
        gone = torch.ones(len(self.gram), dtype=torch.bool)
        gone[kept] = False
        return gone

    def _damped(self, gram: Tensor) -> Tensor:
        size = DAMP * gram.diagonal().mean().clamp_min(1e-12)
        return gram + size * torch.eye(len(gram), dtype=gram.dtype)


def _losses(w: Tensor, inverse: Tensor, left: Tensor, each: int) -> Tensor:
    if each == 1:
        return w[:, left].square().sum(0) / inverse.diagonal()[left]
    found = []
    for group in left.tolist():
        own = slice(group * each, (group + 1) * each)
        found.append((w[:, own] @ torch.linalg.solve(inverse[own, own], w[:, own].T)).trace())
    return torch.stack(found)


def _eliminate(w: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """What is left after columns are gone; their own rows and columns become 0, but for a 1 on the
    diagonal, so that nothing divides by 0."""
    step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    w -= w[:, gone] @ step
    inverse -= inverse[:, gone] @ step
    w[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = 1


def _channels(groups: Tensor, each: int) -> Tensor:
    return (groups[:, None] * each + torch.arange(each)).flatten()


class Compensation:
    """The moments of one model's attentions ("out") or feed-forwards ("down"), by layer's path."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, part: str, layers: Sequence[Layer]
    ) -> None:
        self.part = part
        wanted: dict[str, Place] = {}
        for layer in layers:
            mixed = part == "down" and isinstance(layer.feed, Experts)
            place = f"{layer.path}.{'experts' if mixed else part}"
            wanted[layer.path] = places(anatomy(model))[place]
        found = grams(model, inputs, list(wanted.values()), batch=8) if wanted else {}
        means = _means(model, inputs, {w.module: w for w in wanted.values() if not w.experts})
        self._moments: dict[str, Moments] = {}
        self._shares: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()
        for path, at in wanted.items():
            gram = found[at.name]["down_proj" if at.experts else ""].cpu()
            if at.module in means:
                mean, count = means[at.module]
                self._moments[path] = Moments(gram - count * torch.outer(mean, mean), mean)
            else:
                self._moments[path] = Moments(gram)

    def order(self, model: nn.Module, layer: Layer) -> Tensor:
        """A layer's groups of heads or units in the order they go; (experts, units) in a mixture."""
        each = 1
        if self.part == "out":
            assert layer.attention is not None
            each = layer.attention.heads // layer.attention.groups * layer.attention.head
        return self._moments[layer.path].order(self._weight(model, layer), each)

    @torch.no_grad()
    def apply(self, model: nn.Module, path: str, layer: Layer, kept: Tensor) -> None:
        """Let what is kept of a layer take over; `path` is the layer's in the model of the moments,
        `layer` what it is now, whole but for hidden channels."""
        moments = self._moments[path]
        if self.part == "down" and isinstance(layer.feed, Experts):
            stacked = self._weight(model, layer)
            for e, own in enumerate(kept):
                Moments(moments.gram[e]).take_over(stacked[e], None, own)
            return
        end = _end(layer, self.part)
        if self.part == "out":
            assert layer.attention is not None
            each = layer.attention.heads // layer.attention.groups * layer.attention.head
            kept = _channels(kept, each)
        share = self._share(path, kept)
        moments.move(end.read(model), end.bias(model), kept, share)

    def _share(self, path: str, kept: Tensor) -> Tensor:
        """Shares that were solved for lately are remembered: searches make the same cuts often."""
        key = (path, tuple(kept.tolist()))
        if key not in self._shares:
            self._shares[key] = self._moments[path].share(kept).float()
            while sum(s.numel() for s in self._shares.values()) > _REMEMBERED:
                self._shares.popitem(last=False)
                if len(self._shares) == 1:
                    break
        self._shares.move_to_end(key)
        return self._shares[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shares": OrderedDict()}

    def _weight(self, model: nn.Module, layer: Layer) -> Tensor:
        if self.part == "down" and isinstance(layer.feed, Experts):
            stacked: Any = model.get_submodule(f"{layer.feed.path}.experts")
            return cast(Tensor, stacked.down_proj)
        return _end(layer, self.part).read(model)


def fits(layers: Sequence[Layer], part: str, hidden: int) -> bool:
    """Whether the Gram matrices of all these layers can be held, of hidden states so wide."""
    total = 0
    for layer in layers:
        if part == "out" and layer.attention is not None:
            total += (layer.attention.heads * layer.attention.head) ** 2
        elif part == "down" and layer.feed is not None:
            total += layer.feed.width**2
            if isinstance(layer.feed, Experts):  # what experts read is looked at beside
                total += (layer.feed.count - 1) * layer.feed.width**2
                total += layer.feed.count * hidden**2
    return total <= most()


def most() -> float:
    """How many numbers of Gram matrices may be held. It is the machine's whole memory that counts,
    not what is free, so that one machine always decides alike."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        memory = 8 << 30
    return SHARE * memory / 8


def _end(layer: Layer, part: str) -> Weights:
    owner: Any = layer.attention if part == "out" else layer.feed
    end: Weights = owner.out if part == "out" else owner.down
    return end


def _means(
    model: nn.Module, inputs: Tensor, wanted: Mapping[str, Any]
) -> dict[str, tuple[Tensor, int]]:
    """Mean (d,) and number of tokens of what each map with a bias reads, by the map's path."""
    sums: dict[str, list[Any]] = {}

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0].detach().flatten(0, -2).double()
            before = sums.get(path, [0.0, 0])
            sums[path] = [before[0] + x.sum(0).cpu(), before[1] + len(x)]

        return hook

    biased = [p for p in wanted if getattr(model.get_submodule(p), "bias", None) is not None]
    if biased:
        with hooked(model, {path: look(path) for path in biased}):
            passes(model, inputs)
    return {path: (total / count, count) for path, (total, count) in sums.items()}
