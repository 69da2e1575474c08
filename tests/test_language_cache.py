"""The cache of keys and values: rounding, sizes, and generation as transformers does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from espalier.compress.language.cache.bits import (
    WIDTHS,
    Rounded,
    pack,
    rounded_bytes,
    unpack,
)
from espalier.compress.language.cache.cache import PlannedLayer
from espalier.compress.language.cache.cuts import CacheBits, CacheRank, Spans, held
from espalier.compress.language.cache.low_rank import (
    attentions,
    factors,
    rotation,
    seen,
    tuned,
)
from espalier.compress.language.cache.plan import Plan, Span, grown
from espalier.compress.language.cache.policy import Policy, give
from espalier.compress.language.cache.spans import release
from espalier.compress.language.evaluate import teacher_forced, tokens_a_second
from espalier.compress.language.family import Language
from espalier.compress.language.shape.structure import Blocks, Heads
from espalier.costs.language import LanguageCounts
from espalier.errors import BudgetError, EspalierError
from espalier.testing.language import tiny

PLAN = Plan(window=4, sinks=2, block=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 41), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_are_the_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, 5, 13), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == {2: 4, 3: 6, 4: 7, 8: 13}[bits]  # 13 codes in whole groups of bytes
    assert torch.equal(unpack(packed, bits, 13), codes)


@pytest.mark.parametrize("block", [0, 4])
def test_rounding_is_within_half_a_step_of_each_group(block: int) -> None:
    rows = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1)) * 5
    for bits in WIDTHS:
        own = Rounded.of(rows, bits, block)
        axis = rows.unflatten(2, (-1, 4)) if block else rows
        over = 3 if block else -1
        step = (axis.amax(over, True) - axis.amin(over, True)) / (2**bits - 1)
        wrong = (own.read(torch.float32) - rows).abs()
        wrong = wrong.unflatten(2, (-1, 4)) if block else wrong
        assert (wrong <= 0.5 * step * 1.01 + 0.01).all()
        held = sum(t.untyped_storage().nbytes() for t in own.tensors())
        assert held == 2 * rounded_bytes(3, 8, 6, bits, block)


def test_fewer_bits_come_from_the_codes_and_lie_within_a_step() -> None:
    rows = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(2))
    eight = Rounded.of(rows, 8, 4)
    two = eight.fewer(4).fewer(2)
    assert (eight.bits, two.bits) == (8, 2)
    fine, coarse = (unpack(r.codes, r.bits, 6).float() for r in (eight, two))
    # 85 levels of 8 bits lie between two of 2 bits: rounded twice, at most half a step and 1/10
    assert (coarse - fine / 85).abs().max() <= 0.6
    three = eight.fewer(3)
    assert torch.equal(three.codes, Rounded.of(eight.read(torch.float32), 3, 4).codes)


def test_generation_is_transformers_own_where_nothing_is_decided(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    for plan in (Plan(), replace(PLAN, limit=0)):
        cache = Policy.uniform(model, plan)()
        assert torch.equal(
            model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache), expected
        )
        own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cache.bytes() == own == cache.peak


def test_full_rank_and_a_window_over_all_change_no_token(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    wide = Policy.uniform(model, replace(PLAN, bits=2, window=64))
    data, owners = seen(model, ids), attentions(model)
    whole = {
        f"model.layers.{i}": replace(
            PLAN,
            keys=factors(model, a, "keys", 16, data[i], "svd"),
            values=factors(model, a, "values", 16, data[i]),
        )
        for i, a in enumerate(owners)
    }
    for policy in (wide, Policy.of(model, whole)):
        found = model.generate(
            ids, max_new_tokens=20, do_sample=False, past_key_values=policy(), num_beams=1
        )
        assert torch.equal(found, expected)
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    again = model.generate(
        ids, max_new_tokens=8, num_beams=3, do_sample=False, past_key_values=wide()
    )
    assert torch.equal(beams, again)


class Simulated(DynamicCache):  # type: ignore[misc]
    """What a planned cache should give, from whole keys and values that are rounded anew."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def update(self, keys: Any, values: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        before = self.get_seq_length(index)
        keys, values = super().update(keys, values, index)
        plan = self.plan
        end = max(before - plan.sinks - plan.window, 0) // plan.block * plan.block + plan.sinks
        out = []
        for rows, block in ((keys, plan.block), (values, 0)):
            old = rows[:, :, plan.sinks : end]
            if old.shape[2]:
                old = Rounded.of(old, plan.bits, block).read(rows.dtype)
                rows = torch.cat([rows[:, :, : plan.sinks], old, rows[:, :, end:]], 2)
            out.append(rows)
        return tuple(out)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_cache_of_few_bits_gives_what_rounding_all_of_it_gives(
    model: Any, tokens: torch.Tensor, bits: int
) -> None:
    plan = replace(PLAN, bits=bits)
    expected = teacher_forced(model, tokens, lambda: Simulated(plan), chunk=1)
    policy = Policy.uniform(model, plan)
    assert teacher_forced(model, tokens, policy, chunk=1) == pytest.approx(expected, abs=1e-6)
    # stretches that end where blocks are coded are as one token at a time
    assert teacher_forced(model, tokens, policy) == pytest.approx(expected, abs=1e-6)
    exact = teacher_forced(model, tokens)
    assert abs(expected - exact) > (1e-3 if bits < 8 else 1e-7)


@pytest.mark.parametrize("half", [False, True])
def test_bytes_held_are_those_predicted_at_every_step(
    model: Any, tokens: torch.Tensor, half: bool
) -> None:
    data, owners = seen(model, tokens), attentions(model)
    spans = (Span(3, 0.25), None)
    plans = [
        replace(PLAN, bits=4),
        replace(PLAN, spans=spans),
        replace(PLAN, bits=2, spans=spans),
        replace(PLAN, keys=factors(model, owners[0], "keys", 5, data[0]), bits=8),
        replace(PLAN, values=factors(model, owners[0], "values", 3, data[0])),
        replace(PLAN, bits=2, capacity=41),
        replace(PLAN, bits=2, spans=(Span(9), Span(6)), capacity=41),
    ]
    for plan in plans:
        give(model, {"model.layers.0": replace(plan, half=half)})
        policy = Policy.of(model)
        cache = policy()
        held = []
        for at in range(41):
            model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            held.append(cache.bytes())
            assert held[-1] == policy.bytes(at + 1, batch=2, peak=False), (plan, at)
        release(model)
        assert cache.peak <= policy.bytes(41, batch=2)
        assert max(held) <= policy.bytes(41, batch=2) < Policy.of(model).bytes(41, batch=2)


@pytest.mark.parametrize("spans", [(Span(0, 0.5),) * 4, (Span(20), None, Span(0, 0.5), Span(40))])
@pytest.mark.parametrize("step", [1, 32])
def test_a_growing_cache_holds_the_tokens_that_its_mask_is_for(
    spans: tuple[Span | None, ...], step: int
) -> None:
    plan = Plan(bits=3, capacity=512, spans=spans, window=16, sinks=4, half=True)
    layer = PlannedLayer(grown(plan, 4, 8, 4))
    for _ in range(512 // step):
        places = layer.positions(step, 4)
        layer.masked = True
        keys, values = layer.update(*torch.randn(2, 2, 4, step, 8))
        assert keys.shape[2] == values.shape[2] == places.shape[1]


@pytest.mark.parametrize(("bits", "levels"), [(2, {16, 8, 4, 2}), (3, {16, 8, 4, 3})])
def test_a_growing_cache_goes_down_and_keeps_its_limit(
    model: Any, tokens: torch.Tensor, bits: int, levels: set[int]
) -> None:
    policy = Policy.uniform(model, replace(PLAN, bits=bits, capacity=41))
    cache, found = policy(), []
    limit = policy.plan("model.layers.0").limit
    for at in range(41):
        model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        found.append(cache.bits()[0])
        assert cache.bytes() <= 2 * 2 * limit
    assert found == sorted(found, reverse=True)
    assert set(found) == levels
    whole = model(input_ids=tokens, past_key_values=(once := policy()), use_cache=True)
    assert whole.logits.isfinite().all()
    assert once.bytes() == cache.bytes()
    with pytest.raises(BudgetError, match="full after"):
        model(input_ids=tokens[:, :20], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma2", "mixtral", "opt"])
def test_other_architectures_take_it(kind: str) -> None:
    model = tiny(kind)
    ids = torch.arange(40)[None] % 64
    data, owners = seen(model, ids), attentions(model)
    layers = [s.path for s in Policy.of(model).shapes]
    width = owners[0].groups * owners[0].head
    full = {
        path: replace(PLAN, keys=factors(model, a, "keys", width, data[i]))
        for i, (path, a) in enumerate(zip(layers, owners, strict=True))
    }
    exact = teacher_forced(model, ids)
    assert teacher_forced(model, ids, Policy.of(model, full)) == pytest.approx(exact, abs=1e-4)
    rounded = teacher_forced(model, ids, Policy.uniform(model, replace(PLAN, bits=2)))
    assert np.isfinite(rounded)
    assert rounded != pytest.approx(exact, abs=1e-4)


def test_keys_are_turned_as_the_model_turns_them(model: Any) -> None:
    turn = rotation(model)
    assert turn is not None
    rows = torch.randn(1, 2, 6, 8)
    where = torch.arange(3, 9)[None]
    cos, sin = model.model.rotary_emb(rows, where)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    expected = apply_rotary_pos_emb(rows, rows, cos, sin)[1]
    assert torch.allclose(turn.turn(rows, 3), expected, atol=1e-6)
    assert torch.allclose(turn.turn(expected, 3, back=True), rows, atol=1e-6)


def test_factors_of_the_data_are_the_best_and_tuning_goes_towards_them(
    model: Any, tokens: torch.Tensor
) -> None:
    (data, *_), (owner, *_) = seen(model, tokens), attentions(model)
    # keys before they are turned are the layer's own map of its inputs
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    assert torch.allclose(data.keys, (hidden @ owner.key.read(model).t()).flatten(0, 1), atol=1e-5)

    def error(found: Any) -> float:
        return float((data.keys @ found.down.t() @ found.up.t() - data.keys).square().sum())

    best = torch.linalg.svdvals(data.keys.double())[5:].square().sum()  # Eckart & Young
    errors = {m: error(factors(model, owner, "keys", 5, data, m)) for m in ("svd", "asvd", "data")}
    assert errors["data"] == pytest.approx(float(best), rel=1e-4)
    assert errors["data"] < min(errors["svd"], errors["asvd"])
    after = error(tuned(factors(model, owner, "keys", 5, data, "svd"), data.keys, 100, 1e-2))
    assert errors["data"] * 0.999 < after < errors["svd"]


def test_a_policy_comes_back_from_its_files(
    model: Any, tokens: torch.Tensor, tmp_path: Any
) -> None:
    data, owners = seen(model, tokens), attentions(model)
    plans = {
        "model.layers.0": replace(PLAN, bits=4, keys=factors(model, owners[0], "keys", 5, data[0])),
        "model.layers.1": replace(PLAN, spans=(Span(3, 0.25), None), bits=8),
    }
    policy = Policy.of(model, plans)
    policy.save(tmp_path)
    again = Policy.load(tmp_path)
    assert again.bytes(41) == policy.bytes(41)
    only = {"model.layers.0": plans["model.layers.0"]}
    expected = teacher_forced(model, tokens, Policy.of(model, only))
    loaded = replace(again, plans={"model.layers.0": again.plans["model.layers.0"]})
    assert teacher_forced(model, tokens, loaded) == expected
    (tmp_path / "cache_policy.json").write_text("{}")
    with pytest.raises(EspalierError, match="a cache policy is"):
        Policy.load(tmp_path)


def test_decoding_is_measured_with_the_bytes_at_its_end(model: Any) -> None:
    policy = Policy.uniform(model, replace(PLAN, bits=4))
    found = tokens_a_second(model, torch.ones(1, 8, dtype=torch.long), 12, policy, repeats=1)
    assert found.tokens_a_second > 0
    assert found.bytes == policy.bytes(20, peak=False)


def test_wrong_settings_are_told_in_one_line(model: Any) -> None:
    for make, text in [
        (lambda: Plan(bits=5), "got 5"),
        (lambda: Plan(block=0), "a block is >= 1"),
        (lambda: Span(0), "not both 0"),
        (lambda: Policy.of(model, {"model.layers.9": PLAN}), "model.layers.9"),
        (lambda: Policy.of(model, {"model.layers.0": replace(PLAN, spans=(None,))}), "1 spans"),
        (lambda: teacher_forced(model, torch.ones(3, dtype=torch.long)), "windows are"),
    ]:
        with pytest.raises(EspalierError, match=text):
            make()


def test_cache_decisions_follow_what_else_is_cut(tokens: torch.Tensor) -> None:
    model = tiny("llama", layers=3)
    settings: Any = {"window": 4, "sinks": 2, "block": 4}
    cuts = (
        CacheBits(**settings),
        CacheRank((0.25, 0.5), **settings),
        Spans((Span(3), Span(2, 0.25)), sinks=2),
        Heads(scores={f"model.layers.{i}": torch.tensor([0.0, 1.0]) for i in range(3)}),
        Blocks(),
    )
    family = Language(model, tokens, cuts)
    assert family.cache(family.original) is None
    span = "span:model.layers"
    chosen = {
        **family.original,
        "kv:model.layers.1": 4,
        "block:model.layers.0": 0,
        "heads:model.layers.2": 1,
        "rank:model.layers.1": 0.5,
        f"{span}.2.0": "3",
        f"{span}.2.1": "2+0.25N",
    }
    candidate = family.space.candidate(chosen)
    network, make = family.build(candidate), family.cache(candidate)
    assert make is not None
    # the first block is gone and the second group of heads stays: places and groups have moved
    policy = Policy.of(network)
    assert [s.path for s in policy.shapes] == ["model.layers.0", "model.layers.1"]
    assert policy.plan("model.layers.1").spans == (Span(2, 0.25),)
    first = policy.plan("model.layers.0")
    assert first.bits == 4
    assert first.keys is not None
    assert first.keys.rank == 8
    cache = make()
    whole = network(input_ids=tokens, use_cache=False).logits
    parts = [network(input_ids=ids, past_key_values=cache).logits for ids in tokens.split(5, 1)]
    assert cache.bytes() == policy.bytes(41, batch=2, peak=False)
    assert torch.cat(parts, 1).isfinite().all()
    assert torch.allclose(torch.cat(parts, 1)[:, :5], whole[:, :5], atol=1e-5)
    # weights are those that the same candidate has without decisions on the cache
    plain = {**family.original, "block:model.layers.0": 0, "heads:model.layers.2": 1}
    other = family.build(family.space.candidate(plain)).state_dict()
    assert all(torch.equal(t, other[name]) for name, t in network.state_dict().items())
    with pytest.raises(EspalierError, match="generates nothing"):
        CacheBits().bind(tiny("bert"), tokens)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_is_counted_is_what_is_held(kind: str, tokens: torch.Tensor) -> None:
    model = tiny(kind)
    settings: Any = {"window": 4, "sinks": 2, "block": 4}
    cuts = (
        CacheBits(**settings),
        CacheRank((0.25, 0.5), **settings),
        Spans((Span(3), Span(2, 0.25)), sinks=2),
    )
    family = Language(model, tokens, cuts)
    counts = LanguageCounts(family, context=41, held=held(family.cuts, 4, 41))
    choices: list[dict[str, Any]] = [
        {"kv:model.layers.0": 4, "rank:model.layers.1": 0.5},
        {"kv:model.layers.0": 2, "rank:model.layers.0": 0.25, "span:model.layers.1.0": "3"},
        {"kv:model.layers.1": 8, "span:model.layers.1.0": "3", "span:model.layers.1.1": "2+0.25N"},
    ]
    for chosen in choices:
        candidate = family.space.candidate({**family.original, **chosen})
        network, policy = family.build(candidate), family.cache(candidate)
        assert isinstance(policy, Policy)
        counted = float(counts.estimate([candidate])["kv_bytes"][0])
        cache = policy()
        for ids in tokens[:1].split(1, 1):
            network(input_ids=ids, past_key_values=cache)
        assert cache.peak <= policy.bytes(41) <= counted
        # heads of one layer may be at their most at different steps
        assert policy.bytes(41) >= (0.9 if len(chosen) == 3 else 1.0) * counted
        own = teacher_forced(network, tokens, policy)
        assert own == pytest.approx(teacher_forced(network, tokens, policy, chunk=1), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_spans_count_for_the_heads_that_stay_and_never_above_a_sliding_window(
    kind: str, tokens: torch.Tensor
) -> None:
    model = tiny(kind, **({"sliding_window": 12} if kind == "mistral" else {}))
    order = {f"model.layers.{i}": torch.tensor([0.0, 1.0]) for i in range(2)}  # the second stays
    family = Language(model, tokens, (Spans((Span(3), Span(20))), Heads(scores=order)))
    counts = LanguageCounts(family, context=41, held=held(family.cuts, 4, 41))
    span = "span:model.layers"
    choices: list[dict[str, Any]] = [
        {f"{span}.0.0": "3"},  # of one group only
        {f"{span}.0.0": "3", "heads:model.layers.0": 1},  # which then goes
        {f"{span}.0.1": "3", "heads:model.layers.0": 1},
        {f"{span}.0.0": "20", f"{span}.0.1": "3"},
    ]
    for chosen in choices:
        candidate = family.space.candidate({**family.original, **chosen})
        network, policy = family.build(candidate), family.cache(candidate)
        assert isinstance(policy, Policy)
        cache = policy()
        for ids in tokens[:1].split(1, 1):
            network(input_ids=ids, past_key_values=cache)
        counted = float(counts.estimate([candidate])["kv_bytes"][0])
        assert cache.peak <= policy.bytes(41) <= counted
        token = 2 * 2 * 8 * 4  # a layer's of which nothing is decided may hold one more
        assert counted - policy.bytes(41) <= (2 * token if kind == "mistral" else 0)
    plain = LanguageCounts(family, context=41)
    assert (
        counts.estimate([family.original])["kv_bytes"]
        == plain.estimate([family.original])["kv_bytes"]
    )
