"""MoA runs, and its influence is what leaving out an entry of attention does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.compress.language.cache.plan import Span
from espalier.compress.language.cache.sensitivity import influence, span_harm
from espalier.recipes import moa
from espalier.testing.language import tiny


def test_it_runs_within_its_density() -> None:
    found = recipes.run("moa")
    assert json.loads(json.dumps(found)) == found
    check = found["check"]["looking"]
    assert check["bytes_as_predicted"]
    (draw,) = found["subjects"]["looking"]["draws"]
    for row in (draw["48"], draw["64"]):
        assert row["moa"]["decoded_bytes"] < row["whole"]["cache_bytes"]
        if row["about"]["length"] == 48:
            assert row["about"]["density"] <= moa.DENSITY
    assert set(check["wins"]) == {
        f"{key}@{n}" for key in ("bits_per_byte", "answer_loss") for n in (48, 64)
    }


@torch.no_grad()
def test_influence_is_the_slope_of_leaving_an_entry_out() -> None:
    model = tiny("llama", layers=1).double()
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(0))
    marks = torch.zeros_like(ids, dtype=torch.bool)
    marks[:, 6:] = True
    found = influence(model, ids, marks, own=False)
    from transformers import AttentionInterface

    def loss(head: int, i: int, j: int, share: float) -> float:
        """With a share of an entry taken away and given to the others of its row."""

        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
            key, value = (x.repeat_interleave(2, 1) for x in (key, value))
            scores = query @ key.transpose(2, 3) * kw["scaling"]
            scores += torch.full((10, 10), -torch.inf).triu(1)
            a = scores.softmax(-1)
            row = a[0, head, i].clone()
            gone = row.clone()
            gone[j] = 0
            a[0, head, i] = row + share * (gone / gone.sum() - row)
            return (a @ value).transpose(1, 2), a

        AttentionInterface.register("one_entry", attend)
        model.set_attn_implementation("one_entry")
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        model.set_attn_implementation("sdpa")
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        return float(losses[marks[:, 1:]].mean())

    for group, i, j in ((0, 7, 3), (1, 8, 0)):
        slope = sum(
            (loss(h, i, j, 0.01) - loss(h, i, j, -0.01)) / 0.02 for h in (2 * group, 2 * group + 1)
        )
        assert slope == pytest.approx(float(found[0, group, i, j]), rel=5e-3)


def test_harm_of_a_span_is_the_sum_of_what_it_hides() -> None:
    values = torch.arange(36.0).reshape(1, 1, 6, 6)
    harm = span_harm(values, [Span(2).first, Span(6).first], sinks=1)
    hidden = sum(float(values[0, 0, i, j]) for i in range(6) for j in range(1, 6) if j < i + 1 - 2)
    assert harm[0, 0].tolist() == [hidden, 0.0]


def test_plans_keep_the_density_and_the_undominated_stay() -> None:
    groups = [("a", 0), ("a", 1), ("b", 0)]
    rules = ((4, 0.0), (0, 0.5), (0, 1.0))
    rng = np.random.default_rng(0)
    harms = {n: np.sort(rng.random((3, 3)))[:, ::-1] - 0.3 for n in (16, 32)}
    plans = moa.undominated(groups, harms, rules)
    assert plans
    best = np.inf
    import itertools

    for combination in itertools.product(range(3), repeat=3):
        spans = [[min(a + b * n, n) / n for a, b in (rules[c] for c in combination)] for n in harms]
        if all(sum(s) / 3 <= moa.DENSITY for s in spans):
            best = min(best, sum(harms[32][g, c] for g, c in enumerate(combination)))
    own = [
        sum(harms[32][g, rules.index(p[group])] for g, group in enumerate(groups)) for p in plans
    ]
    assert min(own) == pytest.approx(best)
    losses = [
        tuple(
            sum(t[g, rules.index(p[group])] for g, group in enumerate(groups))
            for t in harms.values()
        )
        for p in plans
    ]
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in losses for b in losses)
