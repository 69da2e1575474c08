"""Transformers as families: their decisions, what each does to the model, and what orders the parts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import KINDS, Experts, Feed, anatomy
from espalier.compress.language.experts.decisions import ActiveExperts
from espalier.compress.language.experts.decisions import Experts as ExpertCounts
from espalier.compress.language.family import Language
from espalier.compress.language.files.configuration import expressible
from espalier.compress.language.importance import scores
from espalier.compress.language.repair import compensating
from espalier.compress.language.repair.compensating import DAMP
from espalier.compress.language.shape import surgery
from espalier.compress.language.shape.channels import hidden_scores
from espalier.compress.language.shape.structure import Blocks, Heads, Hidden, SubLayers, Units
from espalier.compress.language.weights.bits import WeightBits
from espalier.costs.language import LanguageCounts
from espalier.errors import EspalierError
from espalier.problem import Limit
from espalier.solvers.allocate import Factor, Program, profile
from espalier.testing.language import MIXTURES, tiny

L = "model.layers"
EVERY = (
    SubLayers(),
    Blocks(),
    Heads(windows=2, compensate=False),
    Units(steps=3, windows=3, compensate=False),
    Hidden(steps=2),
)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(windows: Tensor) -> Language:
    return Language(tiny("llama", layers=3), windows, EVERY)


def _images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


@pytest.mark.parametrize("kind", KINDS)
def test_any_mix_of_decisions_runs_on_every_architecture(kind: str, windows: Tensor) -> None:
    x = _images() if kind == "vit" else windows
    model = tiny(kind)
    family = Language(model, x, (*EVERY, ExpertCounts((2, 3)), ActiveExperts()))
    assert torch.equal(_logits(family.build(family.original), x), _logits(model, x))
    counts = LanguageCounts(family)
    codes = family.space.sample(3, np.random.default_rng(0))
    for candidate, told in zip(
        family.space.decode(codes), counts.estimate_codes(codes)["params"], strict=True
    ):
        built = family.build(candidate)
        assert _logits(built, x).isfinite().all()
        assert sum(p.numel() for p in built.parameters()) == told


def test_each_decision_is_its_surgery(llama: Language, windows: Tensor) -> None:
    order = {cut.kind: cut.order for cut in llama.cuts if hasattr(cut, "kind")}  # type: ignore[attr-defined]
    model = llama.model
    heads, units = order["heads"][f"{L}.1"], order["units"][f"{L}.2"]
    changes: dict[tuple[str, Any], Any] = {
        (f"attention:{L}.1", 0): lambda m: surgery.drop(m, 1, "attention"),
        (f"feed:{L}.0", 0): lambda m: surgery.drop(m, 0, "feed"),
        (f"block:{L}.2", 0): lambda m: surgery.drop_blocks(m, [2]),
        (f"heads:{L}.1", 1): lambda m: surgery.keep_heads(m, 1, heads[-1:]),
        (f"units:{L}.2", 16): lambda m: surgery.keep_units(m, 2, units[-16:]),
    }
    for (name, option), change in changes.items():
        twin = copy.deepcopy(model)
        change(twin)
        built = llama.build(_with(llama, {name: option}))
        assert torch.equal(_logits(built, windows), _logits(twin, windows))


def _with(family: Language, choices: dict[str, Any]) -> dict[str, Any]:
    """The original with some choices, and what these make inactive left out, or active begun."""
    row = dict(family.original) | choices
    for decision in family.space.decisions:
        on = all(row.get(parent) in allowed for parent, allowed in decision.when.items())
        if not on:
            row.pop(decision.name, None)
        elif decision.name not in row:
            row[decision.name] = decision.options[-1]
    return row


def test_a_window_slides_from_the_least_important(llama: Language, windows: Tensor) -> None:
    cut: Any = next(c for c in llama.cuts if getattr(c, "kind", "") == "units")
    order = cut.order[f"{L}.0"]
    name, where = f"units:{L}.0", f"window:{L}.0.units"
    for start, begin in ((0.0, 0), (0.5, 16), (1.0, 32)):
        built: Any = llama.build(_with(llama, {name: 16, where: start}))
        wanted = order[begin : begin + 16].sort().values
        rows = llama.model.get_submodule(f"{L}.0.mlp.up_proj").weight[wanted]  # type: ignore[index]
        assert torch.equal(built.model.layers[0].mlp.up_proj.weight, rows)
    assert where not in llama.original  # nothing slides where nothing goes


def test_what_is_left_out_has_no_decisions(llama: Language) -> None:
    without = llama.space.candidate(_with(llama, {f"block:{L}.1": 0}))
    assert not [name for name in without if name.endswith(".1") and not name.startswith("block")]
    without = llama.space.candidate(_with(llama, {f"feed:{L}.1": 0}))
    assert f"units:{L}.1" not in without
    assert f"heads:{L}.1" in without
    blocks = {f"block:{L}.{i}": 0 for i in range(3)}
    with pytest.raises(EspalierError):  # one block stays
        llama.build(_with(llama, blocks))


def test_blocks_whose_sublayers_both_go_are_gone(llama: Language, windows: Tensor) -> None:
    built: Any = llama.build(_with(llama, {f"attention:{L}.0": 0, f"feed:{L}.0": 0}))
    assert len(built.model.layers) == built.config.num_hidden_layers == 2
    twin = llama.build(_with(llama, {f"block:{L}.0": 0}))
    assert torch.equal(_logits(built, windows), _logits(twin, windows))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("vit", "bert")])
def test_grouped_candidates_are_of_one_shape(kind: str, windows: Tensor) -> None:
    cuts = (*EVERY, ExpertCounts((2, 3)), ActiveExperts())
    family = Language(tiny(kind), windows, cuts, grouped=True)
    assert "units:every" in family.space
    assert ("experts:every" in family.space) == (kind in MIXTURES)
    assert "sublayer" in [row.kind for row in family.ignored]
    codes = family.space.sample(1, np.random.default_rng(1))
    for candidate in [family.original, *family.space.decode(codes)]:
        built = family.build(candidate)
        assert expressible(built) is None
        feeds = {layer.feed.width for layer in anatomy(built).layers if layer.feed}
        assert feeds == {candidate["units:every"]}


def test_grouped_leaves_models_of_several_shapes_alone(windows: Tensor) -> None:
    model = tiny("llama", layers=3)
    surgery.keep_units(model, 1, range(24))
    family = Language(model, windows, (Blocks(), Heads(), Units(widths=(8, 16))), grouped=True)
    assert "units:every" not in family.space
    assert [r.reason for r in family.ignored if r.kind == "units"] == [
        "layers differ in shape already"
    ]
    free = Language(model, windows, (Units(widths=(8, 16, 32)),))
    assert free.space[f"units:{L}.1"].options == (8, 16, 24)
    assert free.space[f"units:{L}.0"].options == (8, 16, 32, 48)
    with pytest.raises(EspalierError, match="nothing of 'model' can be decided"):
        Language(model, windows, (SubLayers(),), grouped=True)


def test_shapes_and_bits_in_one_candidate(windows: Tensor) -> None:
    family = Language(tiny("llama"), windows, (WeightBits((4, 8)), Units(), Blocks()))
    assert [name.partition(":")[0] for name in family.space.names[:2]] == ["block", "block"]
    choices = {f"block:{L}.0": 0, f"units:{L}.1": 16, f"bits:{L}.1.down": 4}
    built: Any = family.build(_with(family, choices))
    down = built.model.layers[0].mlp.down_proj.weight
    assert down.shape == (32, 16)
    assert all(len(row.unique()) <= 16 for row in down)
    assert f"bits:{L}.0.down" not in family.space.candidate(_with(family, choices))


def test_profile_and_program_take_the_family(windows: Tensor) -> None:
    family = Language(tiny("llama"), windows, (SubLayers(), Heads(), Units(steps=3)))
    before = _logits(family.model, windows).log_softmax(-1)

    def harm(candidates: Any) -> Any:
        after = [_logits(family.build(c), windows).log_softmax(-1) for c in candidates]
        return np.array([float((before.exp() * (before - a)).sum(-1).mean()) for a in after])

    found = profile(family, harm)
    assert len(found.factors) == len(family.space)
    assert all(np.all(f.values >= 0) for f in found.smoothed(family.space).factors)
    tables = LanguageCounts(family).tables("params")
    costs = {"params": [Factor(t.decisions, t.values, name=t.name) for t in tables]}
    whole = sum(p.numel() for p in family.model.parameters())
    limit = Limit("params", 0.7 * whole)
    program = Program(family.space, found.smoothed(family.space).factors, costs, [limit])
    answer = program.solve()
    built = family.build(answer.candidate)
    assert sum(p.numel() for p in built.parameters()) == answer.costs["params"] <= limit.bound


# --- what orders the parts -----------------------------------------------------------------------


def _seen(model: Any, path: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: found.append(args[0].detach().flatten(0, -2).double())
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_what_the_sublayer_loses(kind: str, windows: Tensor) -> None:
    model = tiny(kind)
    layer = anatomy(model).layers[1]
    assert layer.attention is not None
    assert isinstance(layer.feed, Feed)
    inner = _seen(model, layer.feed.down.path, windows)
    down = layer.feed.down.read(model).detach().double()
    lost = [(inner[:, j : j + 1] @ down[:, j : j + 1].T).square().sum(1).mean() for j in range(48)]
    heads, units = scores(model, windows, "activation")
    torch.testing.assert_close(units[layer.path], torch.stack(lost))
    x, w = _seen(model, layer.attention.out.path, windows), layer.attention.out.read(model).double()
    lost = [x[:, j].square().mean() * w[:, j].square().sum() for j in range(32)]
    wanted = torch.stack(lost).view(layer.attention.groups, -1).sum(1)
    torch.testing.assert_close(heads[layer.path], wanted.detach())
    spread = inner.var(0, correction=0) * down.square().sum(0)
    torch.testing.assert_close(scores(model, windows, "fluctuation")[1][layer.path], spread)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_taylor_is_the_slope_of_a_gate(kind: str, windows: Tensor) -> None:
    model = tiny(kind)
    layer = anatomy(model).layers[0]
    at = layer.feed
    assert at is not None
    gate = torch.ones(48, requires_grad=True)
    own: Any = copy.deepcopy(model)
    if isinstance(at, Experts):
        stacked = own.get_submodule(f"{at.path}.experts")
        down = stacked.down_proj.detach()
        del stacked._parameters["down_proj"]
        stacked.down_proj = torch.cat([down[:1] * gate, down[1:]])
    else:
        own.get_submodule(at.down.path).register_forward_pre_hook(lambda m, a: (a[0] * gate,))
    logits = own(windows).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    found = scores(model, windows, "taylor")[1][layer.path]
    wanted = gate.grad.abs().double()  # type: ignore[union-attr]
    torch.testing.assert_close(found[0] if found.dim() > 1 else found, wanted, rtol=1e-3, atol=1e-8)
    assert not any(p.grad is not None for p in model.parameters())
    with pytest.raises(EspalierError, match="take 'activation'"):
        scores(tiny("vit"), _images(), "taylor")


def test_units_of_experts_count_for_their_tokens(windows: Tensor) -> None:
    model = tiny("mixtral")
    feed = anatomy(model).layers[0].feed
    assert isinstance(feed, Experts)
    found = scores(model, windows, "activation")[1][f"{L}.0"]
    assert found.shape == (feed.count, 48)
    # the output of one expert's unit alone, through the mixture itself
    own: Any = copy.deepcopy(model).get_submodule(feed.path)
    x = _seen(model, feed.path, windows).float()
    with torch.no_grad():
        keep = own.experts.down_proj[2, :, 7].clone()
        own.experts.down_proj.zero_()
        own.experts.down_proj[2, :, 7] = keep
        lost = own(x[None]).double().square().sum(-1).mean()
    torch.testing.assert_close(found[2, 7], lost, rtol=1e-4, atol=1e-9)


def test_hidden_channels_are_scored_where_they_are_read(windows: Tensor) -> None:
    model: Any = tiny("llama", layers=1)
    attention, feed = f"{L}.0.self_attn.", f"{L}.0.mlp."
    wanted = torch.zeros(32, dtype=torch.float64)
    for paths in (
        [attention + name for name in ("q_proj", "k_proj", "v_proj")],
        [feed + "up_proj", feed + "gate_proj"],
        ["lm_head"],
    ):
        weight = torch.cat([model.get_submodule(path).weight.detach().double() for path in paths])
        own = _seen(model, paths[0], windows).square().sum(0) * weight.square().sum(0)
        wanted += own / own.sum()
    torch.testing.assert_close(hidden_scores(model, windows), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_readers_of_hidden_channels_take_over(kind: str, windows: Tensor) -> None:
    model = tiny(kind)
    layer = anatomy(model).layers[1]
    feed = layer.feed
    path = feed.up.path if isinstance(feed, Feed) else feed.router  # type: ignore[union-attr]
    free, plain = (
        Language(model, windows, (Hidden(widths=(24,), compensate=on),)) for on in (True, False)
    )
    kept = free.cuts[0].order[-24:].sort().values  # type: ignore[attr-defined]
    x = _seen(model, path, windows)
    new, old = (_read(f.build({"hidden:model": 24}), path) for f in (free, plain))
    whole = _read(model, path)
    biased = getattr(model.get_submodule(path), "bias", None) is not None
    centre = x - x.mean(0) if biased else x
    goal = centre @ whole.T

    def loss(weight: Tensor) -> float:
        return float((goal - centre[:, kept] @ weight.T).square().sum())

    assert torch.equal(old, whole[:, kept])
    best = loss(torch.linalg.lstsq(centre[:, kept], goal).solution.T)
    assert best <= loss(new) < best + 0.2 * (loss(old) - best)


def _read(model: Any, path: str) -> Tensor:
    module = model.get_submodule(path)
    weight: Tensor = module.weight.detach().double()
    return weight.T if hasattr(module, "nf") else weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("importance", ["activation", "compensated"])
def test_what_stays_takes_over_by_least_squares(
    kind: str, importance: Any, windows: Tensor
) -> None:
    model = tiny(kind)
    parts = anatomy(model)
    family = Language(model, windows, (Units(widths=(40,), importance=importance),))
    name = f"units:{parts.layers[1].path}"
    built = family.build(_with(family, {name: 40}))
    layer, now = parts.layers[1], anatomy(built).layers[1]
    kept = family.cuts[0].kept(layer.path, {name: 40})  # type: ignore[attr-defined]
    if isinstance(layer.feed, Experts):
        x, old, new, bias = _expert_inputs(model, layer.feed, 2, windows), None, None, None
        old, new = (
            m.get_submodule(f"{layer.feed.path}.experts").down_proj[2].detach().double()  # type: ignore[index]
            for m in (model, built)
        )
        kept = kept[2]
    else:
        assert isinstance(layer.feed, Feed)
        assert isinstance(now.feed, Feed)
        x = _seen(model, layer.feed.down.path, windows)
        old, new = (
            f.down.read(m).detach().double() for f, m in ((layer.feed, model), (now.feed, built))
        )
        bias = now.feed.down.bias(built)
    goal = x @ old.T
    if bias is not None:
        goal = goal + layer.feed.down.bias(model).detach().double()  # type: ignore[union-attr]
    # a ridge around the weights as they were, in rows of their own; a constant beside the inputs
    gram = x - x.mean(0) if bias is not None else x
    ridge = (DAMP * gram.square().sum(0).mean()).sqrt() * torch.eye(40, dtype=torch.float64)
    rows, aims = torch.cat([x[:, kept], ridge]), torch.cat([goal, ridge @ old[:, kept].T])
    if bias is not None:
        rows = torch.cat([rows, torch.cat([torch.ones(len(x)), torch.zeros(40)])[:, None]], 1)
    wanted = torch.linalg.lstsq(rows, aims).solution.T
    torch.testing.assert_close(new, wanted[:, :40], rtol=1e-3, atol=1e-4)
    if bias is not None:
        torch.testing.assert_close(bias.detach().double(), wanted[:, 40], rtol=1e-3, atol=1e-4)


def _expert_inputs(model: Any, at: Experts, expert: int, windows: Tensor) -> Tensor:
    found: list[Tensor] = []

    def look(module: Any, args: Any) -> None:
        x, chosen, share = args
        rows, places = torch.where(chosen == expert)
        gate, up = (x[rows] @ module.gate_up_proj[expert].T).chunk(2, -1)
        found.append((module.act_fn(gate) * up * share[rows, places, None]).double())

    handle = model.get_submodule(f"{at.path}.experts").register_forward_pre_hook(look)
    with torch.no_grad():
        model(windows)
    handle.remove()
    return found[0]


def test_heads_that_stay_take_over(windows: Tensor) -> None:
    model = tiny("llama")
    family = Language(model, windows, (Heads(),))
    name = f"heads:{L}.0"
    kept = int(family.cuts[0].kept(f"{L}.0", {name: 1}))  # type: ignore[attr-defined]
    x = _seen(model, f"{L}.0.self_attn.o_proj", windows)
    old, new = (
        m.get_submodule(f"{L}.0.self_attn.o_proj").weight.detach().double()  # type: ignore[union-attr, operator]
        for m in (model, family.build(_with(family, {name: 1})))
    )
    own = slice(16 * kept, 16 * kept + 16)  # two query heads of 8 channels
    goal = x @ old.T

    def loss(weight: Tensor) -> float:
        return float((goal - x[:, own] @ weight.T).square().sum())

    best = loss(torch.linalg.lstsq(x[:, own], goal).solution.T)
    assert best <= loss(new) < 1.05 * best < loss(old[:, own])


def test_parts_go_in_the_order_of_their_compensated_loss(windows: Tensor) -> None:
    model = tiny("llama", width=8)
    feed = anatomy(model).layers[0].feed
    assert isinstance(feed, Feed)
    cut = Units(steps=2, multiple=1, importance="compensated")
    bound = cut.bind(model, windows)
    x, down = _seen(model, feed.down.path, windows), feed.down.read(model).detach().double()
    ridge = (DAMP * x.square().sum(0).mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    x = torch.cat([x, ridge])
    left, order = list(range(8)), []
    while len(left) > 1:
        losses = []
        for j in left:
            own = x[:, [i for i in left if i != j]]
            fit = torch.linalg.lstsq(own, x @ down.T).solution
            losses.append(float((x @ down.T - own @ fit).square().sum()))
        order.append(left.pop(int(np.argmin(losses))))
    assert bound.order[f"{L}.0"].tolist() == [*order, *left]


def test_what_is_too_wide_goes_without_compensation(
    windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensating, "SHARE", 1e-9)
    model = tiny("llama")
    family = Language(model, windows, (Heads(), Units(), Hidden()))
    plain = (
        Heads(compensate=False),
        Units(importance="activation", compensate=False),
        Hidden(compensate=False),
    )
    twin = Language(model, windows, plain)
    for cut in family.cuts:
        assert "too wide to compensate" in cut.note  # type: ignore[attr-defined]
    choices = {"hidden:model": 16, f"heads:{L}.0": 1, f"units:{L}.1": 8}
    built = [f.build(_with(f, choices)) for f in (family, twin)]
    assert torch.equal(*(_logits(b, windows) for b in built))


def test_a_family_travels_between_processes(llama: Language, windows: Tensor) -> None:
    twin = pickle.loads(pickle.dumps(llama))
    assert twin.space == llama.space
    candidate = llama.space.decode(llama.space.sample(1, np.random.default_rng(3)))[0]
    assert torch.equal(*(_logits(f.build(candidate), windows) for f in (llama, twin)))


def test_explain_tells_every_decision(llama: Language) -> None:
    rows = {row.get("decision"): row for row in llama.explain()}
    assert set(rows) - {None} == set(llama.space.names)
    row = rows[f"heads:{L}.2"]
    assert row["layers"][-1] == f"{L}.2.self_attn.o_proj"
    assert (row["kind"], row["options"], row["original"]) == ("heads", [1, 2], 2)


def test_explain_tells_notes_of_layers_of_one_shape_too() -> None:
    ids = torch.zeros(1, 8, dtype=torch.long)
    family = Language(tiny("llama"), ids, (WeightBits(options=(3,)),), grouped=True)
    assert {row["note"] for row in family.explain()} == {
        "3 bits are counted as packed; ONNX Runtime's kernels have 4 and 8"
    }


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Heads(importance="size"), "unknown importance 'size'"),  # type: ignore[arg-type]
        (lambda: Units(windows=0), "windows are 1"),
        (lambda: Units(steps=1), "steps are 2 widths or more"),
        (lambda: SubLayers(parts=("mlp",)), "unknown part of a layer"),
        (lambda: Blocks(only=[9]).bind(tiny("llama"), torch.zeros(1, 4).long()), "got 9"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, says: str) -> None:
    with pytest.raises(EspalierError, match=says):
        make()
