"""The cache of keys and values that a plan describes, for `transformers`' generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from espalier.compress.language.cache.plan import OWN, Plan
from espalier.compress.language.cache.rows import Rows
from espalier.errors import EspalierError


class PlannedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, held as its `Plan` says."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.masked = not any(
            plan.spans
        )  # spans need a mask a head: the hook of `spans.hold` sets it
        self._begin()

    def _begin(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self._bundles: list[tuple[tuple[int, ...], Rows, Rows]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the stores, once the number of heads is known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.groups, self.head = key_states.shape[1], key_states.shape[3]
        for factors in (self.plan.keys, self.plan.values):
            if factors is not None and factors.up.shape[0] != self.groups * self.head:
                raise EspalierError(
                    f"factors for {factors.up.shape[0]} channels meet a layer of "
                    f"{self.groups * self.head}: make the policy for this model"
                )
        self._bundles = [
            (
                heads,
                Rows(self.plan, span, self.plan.keys, columns=True),
                Rows(self.plan, span, self.plan.values, columns=False),
            )
            for heads, span in self.plan.bundles(self.groups)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Holds new tokens `(b, h, t, d)`; gives what was held before with them behind it.

        Heads with different spans hold different numbers of tokens: the shorter ones are filled
        with zeros on the left, which the mask hides.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.masked:
            raise EspalierError(
                "this cache drops tokens head by head, which the model must know: give(model, plans) "
                "tells it, and a family's models know"
            )
        self.seen += key_states.shape[2]
        level = self._level()
        keys = self._through(1, key_states, level)
        values = self._through(2, value_states, level)
        return keys, values

    def _level(self) -> int:
        if not self.plan.limit:
            return self.plan.bits
        own = torch.empty((), dtype=self.dtype).element_size()
        self.plan.held(self.seen, self.groups, self.head, own)  # refuses what the limit can't hold
        return int(self.plan.level(self.seen, self.groups, self.head, own))

    def _through(self, part: int, states: Tensor, level: int) -> Tensor:
        found = []
        for bundle in self._bundles:
            heads, rows = bundle[0], bundle[part]
            assert isinstance(rows, Rows)
            own = states if len(self._bundles) == 1 else states[:, list(heads)]
            held = rows.read()
            new = own.half().to(own.dtype) if self.plan.half else own
            found.append(new if held is None else torch.cat([held, new], 2))
            rows.append(own, self.seen, level)
        if len(found) == 1:
            return found[0]
        longest = max(x.shape[2] for x in found)
        out = states.new_zeros(*states.shape[:2], longest, states.shape[3])
        for (heads, *_), rows_ in zip(self._bundles, found, strict=True):
            out[:, list(heads), longest - rows_.shape[2] :] = rows_
        return out

    def positions(self, new: int, groups: int) -> Tensor:
        """Where each key that the next `update` of `new` tokens gives stands: `(groups, l)`, -1
        for filling. To be asked before it."""
        now = torch.arange(self.seen, self.seen + new)
        if not self.is_initialized:
            return now.expand(groups, -1)
        parts = []
        for heads, span in self.plan.bundles(groups):
            sinks = torch.arange(min(self.seen, self.plan.sinks))
            start = int(self.plan.start(self.seen, span))
            parts.append((heads, torch.cat([sinks, torch.arange(start, self.seen), now])))
        out = torch.full((groups, max(len(p) for _, p in parts)), -1)
        for heads, part in parts:
            out[list(heads), out.shape[1] - len(part) :] = part
        return out

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [t for _, keys, values in self._bundles for r in (keys, values) for t in r.tensors()]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys the mask is for: all so far; what is dropped, the mask of spans leaves out."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.seen

    def get_max_length(self) -> int:
        """No most."""
        return -1

    def reset(self) -> None:
        """Empty again."""
        self._begin()

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what was rounded or dropped is gone."""
        if tokens_to_remove:
            raise EspalierError("a cache that rounds or drops tokens can't take tokens back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of the batch."""
        self._change(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch several times."""
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def _change(self, function: Any) -> None:
        for _, keys, values in self._bundles:
            keys.change(function)
            values.change(function)


class PlannedCache(Cache):  # type: ignore[misc]
    """A cache with a plan a layer; layers without one are kept as `transformers` keeps them.

    Give it to `model.generate(..., past_key_values=cache)` or to `model(..., past_key_values=cache)`,
    a new one for every text. Rows of a batch are of one length, without padding on the left, where
    keys are kept by factors. `peak` is the most that `bytes()` was after any layer's update.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        super().__init__(layers=[DynamicLayer() if p.plain else PlannedLayer(p) for p in plans])
        self.plans = tuple(plans)
        self._held = [0] * len(plans)
        self.peak = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As every cache's. Errors: `EspalierError` for a layer that has no plan, `BudgetError`
        where a layer's limit can't be kept."""
        if layer_idx >= len(self.layers):
            rule = f"this cache is for {len(self.layers)} layers"
            raise EspalierError(f"{rule}, the model asks for layer {layer_idx + 1}")
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        own = self._held[layer_idx] = sum(map(_size, tensors_of(self.layers[layer_idx])))
        limit = self.plans[layer_idx].limit
        if limit and own > limit * key_states.shape[0]:
            raise AssertionError(f"layer {layer_idx} holds {own} bytes, its limit is {limit}")
        self.peak = max(self.peak, sum(self._held))
        return found

    def bytes(self) -> int:
        """Bytes of all tensors held now, as their memory is."""
        return sum(_size(t) for layer in self.layers for t in tensors_of(layer))

    def bits(self) -> list[int]:
        """Bits of each layer's old tokens now."""
        return [
            layer._level() if isinstance(layer, PlannedLayer) and layer.is_initialized else OWN
            for layer in self.layers
        ]


def tensors_of(layer: Any) -> list[Tensor]:
    """What a layer of any cache of growing tensors holds."""
    if isinstance(layer, PlannedLayer):
        return layer.tensors()
    return [t for t in (layer.keys, layer.values) if t is not None]


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors that any `transformers` cache of growing tensors holds."""
    return sum(_size(t) for layer in cache.layers for t in tensors_of(layer))
