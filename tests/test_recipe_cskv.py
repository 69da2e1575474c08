"""CSKV runs, and the caches that it is compared with are what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.compress.language.cache.evict import Evicting
from espalier.compress.language.cache.plan import Plan, Span
from espalier.compress.language.cache.policy import Policy, give
from espalier.compress.language.cache.spans import release
from espalier.compress.language.evaluate import scored, teacher_forced
from espalier.errors import EspalierError
from espalier.recipes import cskv
from espalier.recipes._parts import looking
from espalier.testing.language import tiny


def test_it_runs_within_its_bytes() -> None:
    found = recipes.run("cskv")
    assert json.loads(json.dumps(found)) == found
    (row,) = found["subjects"]["looking"]["draws"]
    whole = row["16 bits"]["cache_bytes"]
    for name in ("svd", "asvd", "cskv", "principal", *cskv.EVICTED):
        assert row[name]["cache_bytes"] <= cskv.SHARE * whole * 1.05
    assert row["cskv"]["bits_per_byte"] != row["svd"]["bits_per_byte"]
    assert not found["check"]["holds"]  # five steps of tuning are as many as of training


def test_the_verdict_measures_the_rise() -> None:
    def row(svd: float, own: float, answers: float = 1.0) -> dict[str, Any]:
        bits = {"16 bits": 2.0, "svd": 2.0 + svd, "cskv": 2.0 + own}
        rows = {n: {"bits_per_byte": b, "answer_loss": answers} for n, b in bits.items()}
        return rows | {n: {"answer_loss": 2.0} for n in cskv.EVICTED}

    assert cskv.verdict([row(0.4, 0.19)] * 5, 0.05)["holds"]
    assert not cskv.verdict([row(0.4, 0.21)] * 5, 0.05)["holds"]
    assert not cskv.verdict([row(0.4, 0.19)] * 5, 0.06)["holds"]
    assert not cskv.verdict([row(0.4, 0.19, 3.0)] * 5, 0.05)["holds"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def test_eviction_keeps_what_its_rule_says(model: Any) -> None:
    ids = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(0))
    exact = teacher_forced(model, ids)
    for by in ("recent", "norm"):
        assert teacher_forced(
            model, ids, lambda by=by: Evicting(2, 30, by), chunk=5
        ) == pytest.approx(exact, abs=1e-5)
    found = scored(model, ids, lambda: Evicting(2, 8, "recent", sinks=2), chunk=1)
    # a sliding window of 6 behind 2 sinks is a span of 7 with the token itself
    give(
        model,
        dict.fromkeys(("model.layers.0", "model.layers.1"), Plan(spans=(Span(7),) * 2, sinks=2)),
    )
    assert found.loss == pytest.approx(teacher_forced(model, ids), abs=1e-5)
    assert found.peak == 8 * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, heads, channels
    release(model)
    with pytest.raises(EspalierError, match="Did you mean 'norm'"):
        Evicting(2, 8, "norms")  # type: ignore[arg-type]


@torch.no_grad()
def test_heavy_hitters_stay(model: Any) -> None:
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    cache = Evicting(2, 6, "attention", sinks=1)
    out = model(input_ids=ids, past_key_values=cache, output_attentions=True)
    keys = [layer.keys for layer in cache.layers]
    cache.observe(out.attentions)
    for layer, attention, before in zip(cache.layers, out.attentions, keys, strict=True):
        for group in range(2):
            given = attention[0, 2 * group : 2 * group + 2].sum((0, 1))
            old = given[1:9].topk(2).indices + 1  # beside the sink and three recent ones
            stays = sorted({0, *old.tolist(), 9, 10, 11})
            assert torch.equal(layer.keys[0, group], before[0, group, stays])
    model.set_attn_implementation("sdpa")
    assert cache.get_mask_sizes(1, 0) == (7, 6)


def test_plans_of_one_length_are_alike(model: Any) -> None:
    whole = Policy.uniform(model, Plan(half=True)).bytes(64)
    rank = cskv.fitting(model, Plan(window=4, block=4, half=True), 64, 0.5 * whole)
    # 8 tokens are exact, the 56 others are twice `rank` numbers of 2 bytes in each of 2 layers
    exact, number = 8 * 2 * 16 * 2 * 2, 2 * 2 * 2
    assert exact + 56 * number * rank <= 0.5 * whole < exact + 56 * number * (rank + 1)


def test_what_is_told_stood_before() -> None:
    ids, told = looking.copies(4, 3, 96)
    again, _ = looking.copies(4, 3, 96)
    assert torch.equal(ids, again)
    for row, mask in zip(ids.tolist(), told.tolist(), strict=True):
        places = [i for i, marked in enumerate(mask) if marked]
        first, last = places[0] - 6, places[-1] + 1  # 24 letters, the first 6 are the cue
        string = row[first:last]
        assert len(string) == 24
        assert first >= 48
        assert any(row[i : i + 24] == string for i in range(25))
    rows = looking.repeats(3, 5, 64)
    assert all(any(torch.equal(r[n:], r[:-n]) for n in range(8, 33)) for r in rows)


def test_the_looking_model_is_kept(tmp_path: Any) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    made = looking.looking_model(tmp_path, 2, 0, **sizes)
    read = looking.looking_model(tmp_path, 2, 0, **sizes)
    ids = looking.repeats(1, 0, 16)
    assert torch.equal(made(input_ids=ids).logits, read(input_ids=ids).logits)
    assert len(list(tmp_path.iterdir())) == 1
