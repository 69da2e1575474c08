"""Adapters as decisions: what is learned, that nothing changes before tuning, and after merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from espalier.compress.language.adapters.decisions import KINDS, Adapters, merged  # noqa: E402
from espalier.compress.language.family import Language  # noqa: E402
from espalier.compress.language.shape.structure import SubLayers, Units  # noqa: E402
from espalier.compress.language.weights.bits import WeightBits  # noqa: E402
from espalier.errors import EspalierError  # noqa: E402
from espalier.space import Space  # noqa: E402
from espalier.testing.language import tiny  # noqa: E402

IDS = torch.arange(24).reshape(2, 12)
LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def learned(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_last_option_is_the_model_as_it_is(llama: Any) -> None:
    bound = Adapters(("attention", "feed", "prefix"), ("lora", "dora")).bind(llama, IDS)
    assert [d.name for d in bound.decisions] == [
        "adapter:attention", "adapter:feed", "adapter:prefix",
        *(f"adapter:{x}" for x in LAYERS), "adapter:kind",
    ]  # fmt: skip
    assert bound.decisions[0].options == tuple(range(7))  # ranks 32, 16, 8, 4, 2, 1 and none
    space = Space(bound.decisions)
    last = dict(space.decode(space.corner(True))[0])
    assert bound.parameters(last) == 0
    assert bound.configs(last) == []
    assert (
        bound.adapted(copy.deepcopy(llama), last).state_dict().keys() == llama.state_dict().keys()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_are_counted_and_start_at_nothing(llama: Any, kind: str) -> None:
    bound = Adapters(kinds=(kind,)).bind(llama, IDS)
    choices = {"adapter:attention": 3, "adapter:feed": 4, f"adapter:{LAYERS[0]}": 1}
    assert set(bound.ranks(choices)) == {
        *(f"{LAYERS[1]}.self_attn.{x}_proj" for x in "qkvo"),
        *(f"{LAYERS[1]}.mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    model = copy.deepcopy(llama)
    bound.apply(model, choices)
    assert learned(model) == bound.parameters(choices) > 0
    assert torch.allclose(logits(model), logits(llama), atol=1e-5)
    inner = model.get_submodule(f"{LAYERS[1]}.mlp.up_proj")
    assert all(2 in p.shape for p in inner.parameters() if p.requires_grad and p.dim() == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_a_plain_model_that_computes_the_same(llama: Any, kind: str) -> None:
    model = copy.deepcopy(llama)
    Adapters(kinds=(kind,)).bind(model, IDS).apply(model, {"adapter:attention": 4})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tuned = logits(model)
    assert (tuned - logits(llama)).abs().max() > 0.05
    plain = merged(model)
    assert type(plain) is type(llama)
    assert {n: p.shape for n, p in plain.state_dict().items()} == {
        n: p.shape for n, p in llama.state_dict().items()
    }
    assert torch.allclose(logits(plain), tuned, atol=1e-4)


def test_a_prefix_stands_beside_adapters_and_both_learn(llama: Any) -> None:
    bound = Adapters(("attention", "prefix"), prefix=8).bind(llama, IDS)
    choices = {"adapter:attention": 5, "adapter:prefix": 1}
    model = bound.adapted(copy.deepcopy(llama), choices)
    # 4 positions, keys and values of 2 groups of 8 channels, in 2 layers
    rank1 = bound.parameters({"adapter:attention": 5})
    assert learned(model) == bound.parameters(choices) == rank1 + 4 * 2 * 2 * 8 * 2
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    grown = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False
    )
    ids = IDS
    for _ in range(3):  # without a cache of its own tokens
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(grown, ids)
    with pytest.raises(EspalierError, match="adapted"):
        bound.apply(copy.deepcopy(llama), choices)
    with pytest.raises(EspalierError, match="save_pretrained"):
        merged(model)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "vit", "mixtral"])
def test_other_architectures(kind: str) -> None:
    model = tiny(kind)
    bound = Adapters(widest=4).bind(model, IDS)
    choices = {"adapter:attention": 1, "adapter:feed": 2}
    known = {d.name for d in bound.decisions}
    assert ("adapter:feed" in known) == (kind != "mixtral")
    assert bool(bound.ignored) == (kind == "mixtral")
    choices = {k: v for k, v in choices.items() if k in known}
    bound.apply(model, choices)
    assert learned(model) == bound.parameters(choices) > 0


def test_one_layer_as_a_table_of_costs_sees_it(llama: Any) -> None:
    bound = Adapters().bind(llama, IDS)
    path = f"{LAYERS[1]}.mlp.down_proj"
    assert bound.layers()[path] == ("adapter:feed", f"adapter:{LAYERS[1]}")
    made = bound.slice(path, llama.get_submodule(path), {"adapter:feed": 3})
    assert made is not None
    assert learned(made) == 4 * (48 + 32)
    off = {"adapter:feed": 3, f"adapter:{LAYERS[1]}": 1}
    assert bound.slice(path, llama.get_submodule(path), off) is llama.get_submodule(path)


def test_a_family_has_adapters_beside_other_decisions(llama: Any) -> None:
    family = Language(llama, IDS, (Units(steps=2), SubLayers(), WeightBits((4,)), Adapters()))
    original = dict(family.original)
    names = set(family.space.names)
    assert {"adapter:attention", "adapter:model.layers.1"} <= names
    units = next(d for d in family.space.decisions if d.name == f"units:{LAYERS[0]}").options[0]
    built = family.build(
        {
            **original,
            **{
                n: 4
                for n in names
                if n.startswith("bits:") and not n.startswith(f"bits:{LAYERS[1]}")
            },
            f"feed:{LAYERS[1]}": 0,
            f"units:{LAYERS[0]}": units,
            "adapter:feed": 4,
            f"adapter:{LAYERS[0]}": 0,
            f"adapter:{LAYERS[1]}": 0,
        }
    )
    # rank 2 on three maps between 32 channels and the units that are left
    assert learned(built) == 2 * 3 * (32 + units)
    plain = merged(built)
    assert type(plain) is type(llama)
    assert torch.isfinite(logits(plain)).all()
    assert learned(family.model) == sum(p.numel() for p in llama.parameters())


def test_what_there_is_not_is_refused(llama: Any) -> None:
    with pytest.raises(EspalierError, match="feed"):
        Adapters(("fed",))
    with pytest.raises(EspalierError, match="lora"):
        Adapters(kinds=("lorra",))
    with pytest.raises(EspalierError, match="at least 1"):
        Adapters(widest=0)
    with pytest.raises(EspalierError, match="causal"):
        Adapters(("prefix",)).bind(tiny("bert"), IDS)
