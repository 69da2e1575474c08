"""Experts as decisions: who is used, who stays, what merging does to a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from espalier.errors import EspalierError

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.experts.decisions import ActiveExperts, Experts
from espalier.compress.language.experts.merging import absorbed, chosen, merge_experts
from espalier.compress.language.experts.refit import refit_in_turn
from espalier.compress.language.experts.routing import routing
from espalier.compress.language.family import Language
from espalier.compress.language.shape.structure import Blocks
from espalier.compress.language.shape.surgery import keep_experts
from espalier.compress.language.weights.bits import WeightBits
from espalier.compress.language.weights.rounding import repack
from espalier.compress.language.weights.sparse import SparseWeights
from espalier.testing.language import tiny

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def ids(n: int = 4, t: int = 20) -> Tensor:
    return torch.randint(0, 64, (n, t), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids(), use_cache=False).logits
        return found


def sizes(model: torch.nn.Module, name: str) -> list[int]:
    return [getattr(layer.feed, name) for layer in anatomy(model).layers]


def test_routing_is_what_a_plain_loop_counts() -> None:
    model = tiny("mixtral")
    found = routing(model, ids(), batch=2)["model.layers.0"]
    mixture = model.model.layers[0].mlp
    seen: list[Tensor] = []
    handle = mixture.gate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    x = seen[0].reshape(-1, 32)
    hits, soft, size = [0.0] * 4, [0.0] * 4, [0.0] * 4
    with torch.no_grad():
        for token in x:
            p = (mixture.gate.weight @ token).softmax(0)
            best = p.topk(2)
            for n in range(4):
                soft[n] += float(p[n])
            for n, gate in zip(best.indices.tolist(), best.values / best.values.sum(), strict=True):
                a, b = (mixture.experts.gate_up_proj[n] @ token).chunk(2)
                out = mixture.experts.down_proj[n] @ (torch.nn.functional.silu(a) * b)
                hits[n] += 1
                size[n] += float(gate * out.norm())
    assert found.frequency.tolist() == pytest.approx([h / len(x) for h in hits])
    assert found.soft.tolist() == pytest.approx([s / len(x) for s in soft], rel=1e-4)
    assert found.reap.tolist() == pytest.approx(
        [s / max(h, 1) for s, h in zip(size, hits, strict=True)], rel=1e-4
    )
    assert found.alike.diagonal().tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("kind", MIXTURES)
def test_fewer_experts_are_the_model_whose_router_never_takes_the_others(kind: str) -> None:
    model = tiny(kind)
    bound = Experts(options=(3,), refit=False).bind(model, ids())
    assert [d.options for d in bound.decisions] == [(3, 4)] * 2
    twin = copy.deepcopy(model)
    bound.apply(twin, {bound.decisions[0].name: 3, bound.decisions[1].name: 4})
    assert sizes(twin, "count") == [3, 4]
    worst = int(bound.order("model.layers.0")[-1])
    masked = copy.deepcopy(model)
    router = masked.model.layers[0].mlp.gate

    def never(module: torch.nn.Module, args: tuple[Tensor], output: object) -> tuple[Tensor, ...]:
        scores = args[0].reshape(-1, 32) @ router.weight.T
        scores[:, worst] = -float("inf")
        gates, index = scores.softmax(-1).topk(router.top_k)
        if getattr(router, "norm_topk_prob", True):
            gates = gates / gates.sum(-1, keepdim=True)
        return scores, gates, index

    router.register_forward_hook(never)
    assert torch.allclose(logits(twin), logits(masked), atol=1e-4)


def test_one_hot_rows_prune_and_a_permutation_changes_nothing() -> None:
    model = tiny("qwen3_moe")
    turned, pruned, kept = (copy.deepcopy(model) for _ in range(3))
    order = chosen(torch.tensor([2, 0, 3, 1]), 4)
    merge_experts(turned, 0, order, order)
    assert torch.allclose(logits(turned), logits(model), atol=1e-4)
    some = chosen(torch.tensor([0, 2]), 4)
    merge_experts(pruned, 1, some, some)
    keep_experts(kept, 1, [0, 2])
    assert torch.equal(logits(pruned), logits(kept))
    assert not torch.allclose(logits(pruned), logits(model), atol=1e-3)
    for one in (pruned, kept):
        assert one.generate(ids()[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_merged_experts_are_sums_of_weights() -> None:
    model = tiny("olmoe")
    mix, router = torch.rand(2, 4), torch.rand(2, 4)
    old = copy.deepcopy(model.model.layers[0].mlp)
    merge_experts(model, 0, mix, router)
    new = model.model.layers[0].mlp
    for name in ("gate_up_proj", "down_proj"):
        before, after = getattr(old.experts, name), getattr(new.experts, name)
        expected = sum(mix[1, j] * before[j] for j in range(4))
        assert torch.allclose(after[1], expected, atol=1e-6)
    assert torch.allclose(new.gate.weight, router @ old.gate.weight, atol=1e-6)


def test_equal_experts_are_merged_at_no_loss() -> None:
    model = tiny("mixtral", active=1)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack[3] = stack[1]
    bound = Experts(options=(3,), merge=True, order="frequency", refit=False).bind(model, ids())
    alike = bound.routing["model.layers.0"].alike
    assert float(alike[1, 3]) == pytest.approx(1.0)
    mix = absorbed(torch.tensor([0, 1, 2]), alike, torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert mix[1].tolist() == pytest.approx([0, 0.75, 0, 0.25])
    twin = copy.deepcopy(model)
    bound.apply(twin, {d.name: 3 for d in bound.decisions[:1]})
    merged = twin.model.layers[0].mlp.experts.down_proj
    kept = bound.order("model.layers.0")[:3].tolist()
    both = [n for n in kept if n in (1, 3)]
    assert torch.allclose(merged[sorted(kept).index(both[0])], experts.down_proj[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_what_stays_is_fitted_to_what_the_layer_gave(kind: str) -> None:
    model = tiny(kind)
    windows = torch.randint(0, 64, (32, 32), generator=torch.Generator().manual_seed(1))
    pruned, fitted = copy.deepcopy(model), copy.deepcopy(model)
    kept = [0, 2]
    keep_experts(pruned, 0, kept)
    errors = refit_in_turn(fitted, windows, {0: lambda: keep_experts(fitted, 0, kept)}, damp=0.01)
    inputs: list[Tensor] = []
    block = model.model.layers[0].mlp
    handle = block.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(windows)
        handle.remove()
        wanted = block(inputs[0])
        off = [
            float(
                (m.model.layers[0].mlp(inputs[0]) - wanted).square().sum() / wanted.square().sum()
            )
            for m in (pruned, fitted)
        ]
    assert errors[0] == pytest.approx(tuple(off), rel=1e-3)
    assert off[1] < 0.9 * off[0]
    old, new = (m.model.layers[0].mlp.experts for m in (pruned, fitted))
    assert torch.equal(old.gate_up_proj, new.gate_up_proj)
    # the optimum, by autograd: the slope of error and ridge together vanishes there
    router = fitted.model.layers[0].mlp.gate
    x = inputs[0].reshape(-1, 32)
    _, gates, index = router(x)
    units = torch.zeros(len(x), 2, 48)
    for n in range(2):
        a, b = (x @ new.gate_up_proj[n].T).chunk(2, -1)
        units[:, n] = torch.nn.functional.silu(a) * b * (gates * (index == n)).sum(-1, keepdim=True)
    moved = new.down_proj.detach().clone().double().requires_grad_()
    flat = units.detach().double()
    wide = torch.einsum("rnw,now->ro", flat, moved - new.down_proj.detach().double())
    rest = fitted.model.layers[0].mlp(inputs[0]).detach().reshape(-1, 32).double() + wide
    ridge = 0.01 * flat.square().sum(0).mean() * (moved - old.down_proj.detach()).square().sum()
    goal = wanted.reshape(-1, 32).double()
    ((rest - goal).square().sum() + ridge).backward()
    with torch.no_grad():
        missing = goal - pruned.model.layers[0].mlp(inputs[0]).reshape(-1, 32)
    start = 2 * (flat.flatten(1).T @ missing).abs().max()  # the slope before
    assert moved.grad is not None
    assert float(moved.grad.abs().max()) < 1e-3 * float(start)


def test_a_token_gets_fewer_experts() -> None:
    model = tiny("mixtral", active=3)
    bound = ActiveExperts().bind(model, ids())
    assert [d.options for d in bound.decisions] == [(1, 2, 3)] * 2
    before = logits(model)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    choices = {bound.decisions[1].name: 1, bound.decisions[0].name: 3}
    bound.apply(fitted, choices)
    ActiveExperts(refit=False).bind(model, ids()).apply(plain, choices)
    bound.apply(model, choices)
    assert sizes(model, "active") == [3, 1]
    off = [float((logits(m) - before).square().sum()) for m in (fitted, plain)]
    assert off[0] < off[1]
    small = Experts(options=(2,)).bind(model, ids())
    small.apply(model, {small.decisions[0].name: 2})
    bound.apply(model, {bound.decisions[0].name: 3})
    assert sizes(model, "active") == [2, 1]


def test_pieces_for_tables_of_costs_have_the_chosen_number() -> None:
    model = tiny("mixtral")
    bound = Experts(options=(2,)).bind(model, ids())
    choices = {d.name: 2 for d in bound.decisions}
    assert len(bound.layers()) == 4
    for path in bound.layers():
        module = model.get_submodule(path)
        piece = bound.slice(path, module, choices)
        assert piece is not None
        assert {p.shape[0] for p in piece.parameters()} == {2}
        assert {p.shape[0] for p in module.parameters()} == {4}


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(EspalierError, match="reap"):
        Experts(order="reep")
    with pytest.raises(EspalierError, match="from 1, got 0"):
        Experts(options=(0,))
    with pytest.raises(EspalierError, match="no mixture"):
        merge_experts(tiny("llama"), 0, torch.eye(4), torch.eye(4))
    with pytest.raises(EspalierError, match="no mixture"):
        routing(tiny("llama"), ids())
    with pytest.raises(EspalierError, match=r"\(new experts, 4\)"):
        merge_experts(tiny("mixtral"), 0, torch.eye(3), torch.eye(3))
    with pytest.raises(EspalierError, match="mix makes 4"):
        merge_experts(tiny("mixtral"), 0, torch.eye(4), torch.eye(4)[:2])
    bound = Experts().bind(tiny("llama"), ids())
    assert not bound.decisions
    assert {i.reason for i in bound.ignored} == {"it has no experts"}


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_bits_and_zeros_are_candidates_of_one_space(grouped: bool) -> None:
    model = tiny("mixtral")
    cuts = (
        WeightBits(options=(4,)),
        Experts(options=(3,)),
        SparseWeights(shares=()),
        ActiveExperts(),
        Blocks(),
    )
    family = Language(model, ids(), cuts, grouped=grouped)
    assert ("experts:every" in {d.name for d in family.space.decisions}) == grouped
    shapes = [d for d in family.space.decisions if not d.name.startswith("block")]
    lowest = {d.name: d.options[0] for d in shapes}
    built: Any = family.build({**family.original, **lowest})
    assert sizes(built, "count") == [3, 3]
    assert sizes(built, "active") == [1, 1]
    stack = built.model.layers[1].mlp.experts.gate_up_proj
    groups = stack.detach().reshape(-1, 4)
    assert ((groups != 0).sum(1) <= 2).all()
    repack(stack, 4)
    assert built(ids()).logits.isfinite().all()
    assert torch.equal(logits(family.build(family.original)), logits(model))
    one: Any = family.build(
        {**family.original, "block:model.layers.0": 0, "bits:model.layers.1.qkv": 4}
    )
    repack(one.model.layers[0].self_attn.q_proj.weight, 4)  # the block behind moved up
