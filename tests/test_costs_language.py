import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import KINDS, anatomy
from espalier.compress.language.shape import surgery
from espalier.compress.language.shape.surgery import keep_hidden
from espalier.costs.language import LanguageCounts
from espalier.costs.language_times import Generation
from espalier.space import Space, ordinal
from espalier.testing.language import tiny

PER_LAYER = {"attention": (0, 1), "feed": (0, 1), "block": (0, 1), "heads": (1, 2)}


def family(model: Any, *extra: Any, every: bool = False) -> Any:
    """The decisions of a Language family by name, without the family: counting builds nothing."""
    found = anatomy(model)
    places = ["every"] if every else [layer.path for layer in found.layers]
    decisions = []
    for place in places:
        of_layer = {**PER_LAYER, "units": (12, 24, 48), "experts": (2, 4), "active": (1, 2)}
        if found.kind in ("gpt2", "opt", "bert", "vit"):
            of_layer["heads"] = (1, 2, 4)
        decisions += [ordinal(f"{kind}:{place}", *options) for kind, options in of_layer.items()]
    decisions += [ordinal("hidden:model", 16, 32), *extra]
    return SimpleNamespace(model=model, anatomy=found, space=Space(decisions))


def cost(counts: LanguageCounts, **chosen: Any) -> dict[str, float]:
    space = counts.space
    row = space.corner(last=True)
    for name, option in chosen.items():
        for decision in space.decisions:
            if decision.name == name or decision.name.split(":")[0] == name:
                place = list(space.names).index(decision.name)
                row[0, place] = decision.options.index(option)
    priced = counts.estimate_codes(row)
    return {name: float(priced[name][0]) for name in priced}


def test_a_table_that_is_narrower_than_the_hidden_states_keeps_its_width() -> None:
    model = tiny("opt", word_embed_proj_dim=16)
    counted = cost(LanguageCounts(family(model)), hidden=16)["params"]
    keep_hidden(model, range(16))
    assert counted == model.num_parameters()


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_sliding_window_bounds_the_cache(kind: str) -> None:
    model = tiny(kind, sliding_window=12)  # 2 layers, 2 groups of 8 channels
    counts = LanguageCounts(family(model), context=40)
    assert cost(counts)["kv_bytes"] == 2 * 2 * 2 * 8 * 12 * 4


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_parts_hold_every_parameter_once(kind: str) -> None:
    model = tiny(kind)
    counts = LanguageCounts(family(model), stored=2)
    assert cost(counts)["params"] == model.num_parameters()
    assert cost(counts)["bytes"] == 2 * model.num_parameters()


@pytest.mark.parametrize(
    ("kind", "chosen", "sizes"),
    [
        ("llama", {"units": 24}, {"width": 24}),
        ("llama", {"heads": 1}, {"heads": 2, "groups": 1, "head_dim": 8}),
        ("llama", {"hidden": 16}, {"hidden": 16, "head_dim": 8}),
        ("qwen3", {"heads": 1}, {"heads": 2, "groups": 1, "head_dim": 8}),
        ("qwen2", {"units": 12}, {"width": 12}),
        ("gemma2", {"hidden": 16, "units": 12}, {"hidden": 16, "head_dim": 8, "width": 12}),
        ("gpt2", {"units": 12}, {"width": 12}),
        ("opt", {"units": 24}, {"width": 24}),
        ("mixtral", {"experts": 2, "units": 24}, {"experts": 2, "width": 24}),
        ("qwen3_moe", {"experts": 2}, {"experts": 2}),
        ("olmoe", {"experts": 2}, {"experts": 2}),
        ("llama", {"block:model.layers.1": 0}, {"layers": 1}),
        ("mixtral", {"block:model.layers.0": 0}, {"layers": 1}),
    ],
)
def test_a_smaller_model_costs_what_one_made_so_has(
    kind: str, chosen: dict[str, Any], sizes: dict[str, int]
) -> None:
    counts = LanguageCounts(family(tiny(kind)))
    assert cost(counts, **chosen)["params"] == tiny(kind, **sizes).num_parameters()
    grouped = LanguageCounts(family(tiny(kind), every=True))
    if not any(":" in name for name in chosen):
        assert cost(grouped, **chosen)["params"] == tiny(kind, **sizes).num_parameters()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_sub_layer_that_is_left_out_takes_along_what_surgery_takes(kind: str) -> None:
    model = tiny(kind)
    counts = LanguageCounts(family(model))
    place = counts.space.names[0].partition(":")[2]
    for part in ("attention", "feed"):
        smaller = copy.deepcopy(model)
        surgery.drop(smaller, 0, part)
        left = sum(p.numel() for p in smaller.parameters())
        assert cost(counts, **{f"{part}:{place}": 0})["params"] == left
    surgery.empty_blocks(model, [0])
    left = sum(p.numel() for p in model.parameters())
    assert cost(counts, **{f"block:{place}": 0})["params"] == left


def test_of_experts_only_the_active_ones_meet_a_token() -> None:
    model = tiny("mixtral")
    counts = LanguageCounts(family(model))
    one = 3 * 48 * 32
    assert cost(counts)["active_params"] == model.num_parameters() - 2 * 2 * one
    assert cost(counts, active=1)["active_params"] == model.num_parameters() - 2 * 3 * one
    assert cost(counts, active=1)["params"] == model.num_parameters()


def test_the_cache_holds_keys_and_values_of_the_groups_that_are_left() -> None:
    counts = LanguageCounts(family(tiny("llama")), stored=2, context=100)
    assert cost(counts)["kv_bytes"] == 2 * (2 * 2 * 8 * 100 * 2)
    assert cost(counts, heads=1)["kv_bytes"] == 2 * (2 * 1 * 8 * 100 * 2)
    name = "attention:model.layers.1"
    assert cost(counts, **{name: 0})["kv_bytes"] == 2 * 2 * 8 * 100 * 2
    sliding = LanguageCounts(family(tiny("gemma2")), stored=2, context=100)
    assert cost(sliding)["kv_bytes"] == 2 * 2 * 8 * (16 + 100) * 2  # one of its layers slides


def test_decisions_on_the_cache_are_priced_by_what_they_hold() -> None:
    asked = []

    def held(chosen: Any, groups: int, head: int, tokens: int) -> float:
        asked.append((groups, head, tokens))
        return chosen["kv:model.layers.0"] * groups * 10.0

    extra = ordinal("kv:model.layers.0", 4, 16)
    counts = LanguageCounts(family(tiny("llama"), extra), context=50, held=held)
    other = 2 * 2 * 8 * 50 * 4
    assert cost(counts)["kv_bytes"] == 16 * 2 * 10 + other
    assert cost(counts, **{"kv:model.layers.0": 4})["kv_bytes"] == 4 * 2 * 10 + other
    assert {(2, 8, 50), (1, 8, 50)} == set(asked)


def test_spans_of_groups_are_counted_one_by_one() -> None:
    places = [ordinal(f"span:model.layers.0.{g}", "16", "all") for g in range(2)]

    def held(chosen: Any, groups: int, head: int, tokens: int) -> float:
        (option,) = (v for n, v in chosen.items() if n.startswith("span:"))
        return groups * (16.0 if option == "16" else tokens)

    counts = LanguageCounts(family(tiny("llama"), *places), context=50, held=held)
    other = 2 * 2 * 8 * 50 * 4
    assert cost(counts)["kv_bytes"] == 2 * 50 + other
    assert cost(counts, **{"span:model.layers.0.1": "16"})["kv_bytes"] == 50 + 16 + other


def test_packed_weights_cost_their_codes_and_scales() -> None:
    extra = ordinal("bits:model.layers.0.up", 4, 8, 32)
    counts = LanguageCounts(family(tiny("llama"), extra), stored=4)
    plain = cost(counts)["bytes"]
    up = 2 * 48 * 32  # gate and up are tied
    packed = up * 4 / 8 + 2 * 48 * 4  # a row of 32 inputs is one block
    assert plain - cost(counts, bits=4)["bytes"] == up * 4 - packed
    halves = family(tiny("llama"), ordinal("bits:model.layers.0.up", 16, 32))
    assert cost(LanguageCounts(halves, stored=4), bits=16)["bytes"] == plain - up * 2
    assert cost(counts, bits=4)["params"] == cost(counts)["params"]


def test_sparse_weights_cost_what_their_cut_counts() -> None:
    from espalier.compress.language.weights.sparse import SparseWeights

    model = tiny("llama")
    cut = SparseWeights(shares=(0.5, 0.7)).bind(model, torch.zeros(1, 4, dtype=torch.long))
    counts = LanguageCounts(family(model, *cut.decisions))
    whole = cost(counts)["bytes"]
    for name in ("sparsity:model.layers.0.qkv", "sparsity:model.layers.1.down"):
        for option in ("2:4", 0.5, 0.7):
            saved = cut.bytes_of(name, 1.0) - cut.bytes_of(name, option)
            assert whole - cost(counts, **{name: option})["bytes"] == pytest.approx(saved, abs=4)


def test_tables_add_up_to_the_cost_of_any_candidate() -> None:
    counts = LanguageCounts(family(tiny("llama")))
    codes = counts.space.sample(50, np.random.default_rng(0))
    for metric in ("bytes", "kv_bytes"):
        summed = sum(t.at(counts.space, codes) for t in counts.tables(metric))
        assert np.array_equal(summed, counts.estimate_codes(codes)[metric])
        assert all(t.values.size < 1000 for t in counts.tables(metric))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_times_are_measured_up_to_the_last_position(kind: str) -> None:
    model = tiny(kind)
    most = model.config.max_position_embeddings  # tokens are written behind them, all the same
    found = Generation(most, seconds=0.01).measure(model)
    assert min(found.values()) > 0
