"""Spans head by head: what is seen, and that a cache which drops the rest gives the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from espalier.compress.language.cache.plan import Plan, Span
from espalier.compress.language.cache.policy import Policy, give
from espalier.compress.language.cache.spans import release, visible
from espalier.compress.language.evaluate import teacher_forced
from espalier.errors import EspalierError
from espalier.testing.language import tiny

SPANS = (Span(3), Span(2, 0.25))
PLAN = Plan(spans=SPANS, sinks=2)


@pytest.fixture
def model() -> Any:
    made = tiny("llama")
    yield made
    release(made)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))


def test_a_span_is_a_rule_of_the_length() -> None:
    span = Span(2, 0.25)
    for position in range(40):
        width = 2 + (position + 1) // 4
        assert int(span.first(position)) == max(position + 1 - width, 0)
    firsts = span.first(torch.arange(40))
    assert firsts.tolist() == [int(span.first(p)) for p in range(40)]
    assert (firsts[1:] >= firsts[:-1]).all()
    fixed = Span(0, 0.5, length=16)  # 8 tokens, wherever
    assert [int(fixed.first(p)) for p in (3, 7, 8, 30)] == [0, 0, 1, 23]


def test_what_is_seen_is_the_span_and_the_first_tokens() -> None:
    keys = torch.arange(12).expand(2, -1)
    seen = visible((Span(3), None), torch.arange(12), keys, sinks=2)
    for query in range(12):
        near = {k for k in range(12) if query - 3 < k <= query}
        first = {k for k in range(2) if k <= query}
        assert set(seen[0, query].nonzero()[:, 0].tolist()) == near | first
        assert set(seen[1, query].nonzero()[:, 0].tolist()) == set(range(query + 1))


def reference(model: Any, tokens: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Logits with the mask of spans put into the scores by hand, layer for layer."""
    import math

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        each, size = module.num_key_value_groups, query.shape[2]
        out = []
        for head in range(query.shape[1]):
            span, k, v = plan.spans[head // each], key[:, head // each], value[:, head // each]
            score = query[:, head] @ k.transpose(1, 2) / math.sqrt(k.shape[-1])
            for i in range(size):
                for j in range(size):
                    near = span is None or j >= int(span.first(i)) or j < plan.sinks
                    if j > i or not near:
                        score[:, i, j] = -math.inf
            out.append(score.softmax(-1) @ v)
        return torch.stack(out, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("by_hand", attend)
    model.set_attn_implementation("by_hand")
    try:
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return found
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_masked_passes_are_attention_within_spans(
    model: Any, tokens: torch.Tensor, kernel: str
) -> None:
    expected = reference(model, tokens, PLAN)
    plain = model(input_ids=tokens).logits
    model.set_attn_implementation(kernel)
    give(model, dict.fromkeys(("model.layers.0", "model.layers.1"), PLAN))
    found = model(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    # through a cache that keeps everything, and one that drops, a token at a time and in stretches
    policy = Policy.of(model)
    for make, chunk in ((DynamicCache, 1), (policy, 1), (policy, 7)):
        cache, parts = make(), []
        for ids in tokens.split(chunk, 1):
            parts.append(model(input_ids=ids, past_key_values=cache).logits)
        assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in _filled(model, tokens).layers)
    assert cache.bytes() == policy.bytes(33, batch=2, peak=False) < 0.5 * dense


def _filled(model: Any, tokens: torch.Tensor) -> Any:
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache)
    return cache


@torch.no_grad()
def test_spans_and_few_bits_go_together(model: Any, tokens: torch.Tensor) -> None:
    mixed = replace(PLAN, bits=8, window=4, block=4)
    give(model, {"model.layers.1": replace(mixed, spans=(Span(3), None))})
    both = teacher_forced(model, tokens, Policy.of(model))
    wide = teacher_forced(model, tokens)  # masked, nothing rounded
    release(model)
    alone = teacher_forced(model, tokens)
    assert abs(both - wide) < 0.02 < abs(wide - alone)


def test_generation_with_padding_and_spans_is_that_of_rows_alone(model: Any) -> None:
    # all groups see everything near, so that padding is only hidden, as without spans
    give(model, {"model.layers.0": replace(PLAN, spans=(Span(40), Span(30)))})
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = (ids > 0).long()
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, past_key_values=Policy.of(model)(),
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    for row, own in zip(found, ids, strict=True):
        alone = model.generate(own[own > 0][None], max_new_tokens=6, do_sample=False)
        assert torch.equal(row[5:], alone[0, -6:])


def test_a_model_that_was_not_told_is_refused(model: Any, tokens: torch.Tensor) -> None:
    policy = Policy.of(model, {"model.layers.0": PLAN})
    with pytest.raises(EspalierError, match="head by head"):
        model(input_ids=tokens, past_key_values=policy())
    with pytest.raises(EspalierError, match="is not there"):
        give(model, {"model.layers.7": PLAN})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(EspalierError, match="set_attn_implementation"):
        give(model, {"model.layers.0": PLAN})
    model.config._attn_implementation = "sdpa"
