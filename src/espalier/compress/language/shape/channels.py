"""Channels of the hidden states: who reads them, which matter, and how what stays makes up for what
goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, Experts, Feed, Weights, anatomy
from espalier.compress.language.importance import column_norms, hooked, passes
from espalier.compress.language.repair.compensating import Moments, most


@dataclass(frozen=True)
class Reader:
    """Maps that read the same hidden states, those that the module `at` is called with.

    `stacked` is the path of experts that read them too, "" where there are none.
    """

    at: str
    maps: tuple[Weights, ...]
    stacked: str = ""

    def weights(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Views of all matrices `(o, width)` and biases."""
        for weights in self.maps:
            yield weights.read(model), weights.bias(model)
        if self.stacked:
            stacked: Any = model.get_submodule(self.stacked)
            yield stacked.gate_up_proj.flatten(0, 1), None


def readers(model: nn.Module, parts: Anatomy) -> list[Reader]:
    """All places where hidden states are read, in the order they run; not a head that is tied."""
    found: list[Reader] = []
    for layer in parts.layers:
        if layer.attention is not None:
            a = layer.attention
            found.append(Reader(a.query.path, (a.query, a.key, a.value)))
        feed = layer.feed
        if isinstance(feed, Experts):
            maps = [Weights(feed.router)]
            if feed.shared is not None:
                maps += [Weights(f"{feed.path}.shared_expert_gate"), *_entries(feed.shared)]
            found.append(Reader(feed.router, tuple(maps), f"{feed.path}.experts"))
        elif feed is not None:
            found.append(Reader(feed.up.path, _entries(feed)))
    passed = [layer.path + "." for layer in parts.layers]
    passed += [parts.head] if parts.tied and parts.head else []
    for path, module in model.named_modules():
        reads = isinstance(module, nn.Linear) and module.in_features == parts.width
        if reads and not path.startswith(tuple(passed)) and not path.endswith("project_in"):
            found.append(Reader(path, (Weights(path),)))
    return found


def _entries(feed: Feed) -> tuple[Weights, ...]:
    return tuple(w for w in (feed.up, feed.gate) if w is not None)


def hidden_scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """How much each channel (width,) of the hidden states matters: over all places that read it,
    mean square after the norm times the squared norm of the weights that read it, as a share of
    the place's sum. `inputs` (n, ...): what the model takes."""
    parts = anatomy(model)
    places = readers(model, parts)
    if parts.tied and parts.head is not None:
        tied = Reader(parts.head, (Weights(parts.head),))
        # old OPT's head reads what is projected to the table's own width
        places += [tied] if Weights(parts.head).read(model).shape[1] == parts.width else []
    squares = {place.at: torch.zeros(parts.width, dtype=torch.float64) for place in places}

    def look(at: str, x: Tensor) -> None:
        squares[at] += x.square().sum(0).cpu()

    _look(model, places, inputs, look)
    found = torch.zeros(parts.width, dtype=torch.float64)
    for place in places:
        norms = sum(column_norms(weight).cpu() for weight, _ in place.weights(model))
        score = squares[place.at] * norms
        found += score / score.sum().clamp_min(1e-300)
    return found


class Narrowing:
    """How the channels that stay make up for those that go, wherever hidden states are read.

    A reader's weights of the others take over what can be told from them on the `inputs`, by least
    squares. A head that is tied to the embedding stays as it is.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        parts = anatomy(model)
        self._places = readers(model, parts)
        sums: dict[str, tuple[Tensor, Tensor, int]] = {}

        def look(at: str, x: Tensor) -> None:
            new = ((x.T @ x).cpu(), x.sum(0).cpu(), len(x))
            old = sums.get(at)
            sums[at] = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2])

        _look(model, self._places, inputs, look)
        self._moments: dict[str, Moments] = {}
        for place in self._places:
            if place.at not in sums:
                continue  # it never ran: nothing is known
            gram, total, count = sums[place.at]
            if all(bias is not None for _, bias in place.weights(model)):
                gram = gram - torch.outer(total, total) / count
                self._moments[place.at] = Moments(gram, total / count)
            else:
                self._moments[place.at] = Moments(gram)

    @torch.no_grad()
    def apply(self, model: nn.Module, kept: Tensor) -> None:
        """Change the readers of a model that is still as wide; those that are gone are passed over."""
        now = {place.at: place for place in readers(model, anatomy(model))}
        for at, moments in self._moments.items():
            if at in now:
                share = moments.share(kept)
                for weight, bias in now[at].weights(model):
                    moments.move(weight, bias, kept, share)


def narrows(model: nn.Module) -> bool:
    """Whether the Gram matrices of all readers can be held."""
    parts = anatomy(model)
    return len(readers(model, parts)) * parts.width**2 <= most()


def _look(
    model: nn.Module, places: list[Reader], inputs: Tensor, look: Callable[[str, Tensor], None]
) -> None:
    """Calls `look(at, x (tokens, width) in float64)` whenever hidden states are read."""

    def hook(at: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            look(at, x.detach().flatten(0, -2).double())

        return seen

    with hooked(model, {place.at: hook(place.at) for place in places}):
        passes(model, inputs)
