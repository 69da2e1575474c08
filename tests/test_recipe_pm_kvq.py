"""PM-KVQ runs, and its parts are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from espalier import recipes
from espalier.compress.language.cache.bits import Rounded
from espalier.compress.language.cache.plan import Plan
from espalier.compress.language.cache.sensitivity import bits_harm, cache_slopes
from espalier.recipes import pm_kvq
from espalier.testing.language import tiny


def test_it_runs_within_its_budget() -> None:
    found = recipes.run("pm-kvq")
    assert json.loads(json.dumps(found)) == found
    (row,) = found["subjects"]["looking"]["draws"]
    budget = row["budget"]["bytes"]
    assert row["budget"]["tokenwise_peak"] <= budget
    assert all(row[name]["cache_bytes"] <= budget for name in ("pm-kvq", "uniform", "grown to 3"))
    assert row["16 bits"]["cache_bytes"] > budget
    assert all(bits in pm_kvq.OPTIONS for bits in row["bits"].values())


def test_the_verdict_counts_the_published_order() -> None:
    def row(ours: float, uniform: float, direct: float) -> dict[str, Any]:
        values = {"pm-kvq": ours, "uniform": uniform, "direct": direct}
        return {name: {"bits_per_byte": value} for name, value in values.items()}

    good = [row(1.0, 2.0, 3.0)] * 4
    assert pm_kvq.verdict([*good, row(3.0, 2.0, 1.0)])["holds"]
    assert not pm_kvq.verdict([*good[:3], *[row(1.0, 3.0, 2.0)] * 2])["holds"]


class _Moved(DynamicCache):  # type: ignore[misc]
    """Every key of one layer moved a little along a direction."""

    def __init__(self, layer: int, direction: torch.Tensor, by: float) -> None:
        super().__init__()
        self.at, self.direction, self.by = layer, direction, by

    def update(self, keys: Any, values: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        keys = keys + self.by * self.direction if index == self.at else keys
        return super().update(keys, values, index)


@torch.no_grad()
def test_slopes_are_what_moving_the_cache_does_to_the_loss() -> None:
    model = tiny("llama").double()
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    taken = cache_slopes(model, ids, stride=2)[1]
    direction = torch.randn(taken.keys.shape, generator=torch.Generator().manual_seed(1)).double()
    where = 2 * torch.arange(16)[None].expand(2, -1)
    losses = []
    for by in (-1e-3, 1e-3):
        cache = _Moved(1, direction, by)
        logits = model(input_ids=ids, position_ids=where, past_key_values=cache).logits
        losses.append(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        )
    slope = float(losses[1] - losses[0]) / 2e-3
    assert slope == pytest.approx(float((taken.key_slopes * direction).sum()), rel=5e-3)
    # harm is the mean size of the products, of whole blocks
    plan = Plan(bits=4, block=8)
    keys = (Rounded.of(taken.keys, 4, 8).read(torch.float64) - taken.keys) * taken.key_slopes
    values = (Rounded.of(taken.values, 4).read(torch.float64) - taken.values) * taken.value_slopes
    expected = float(keys.abs().mean() + values.abs().mean())
    assert bits_harm(taken, 4, plan) == pytest.approx(expected, rel=1e-4)
    assert bits_harm(taken, 16, replace(plan, bits=16)) == 0 < bits_harm(taken, 8, plan) < expected
