"""Taking parts out of transformers: each against the whole model with these parts silenced by hooks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import KINDS, Experts, Feed, anatomy
from espalier.compress.language.shape import surgery
from espalier.compress.language.shape.hidden import norm_scales, norms
from espalier.errors import EspalierError
from espalier.testing.language import MIXTURES, tiny

LAYERS = 3
DECODERS = [kind for kind in KINDS if kind not in ("bert", "vit")]
Hook = Callable[..., Any]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: tiny(kind, layers=LAYERS) for kind in KINDS}


def _inputs(kind: str) -> Tensor:
    make = torch.Generator().manual_seed(1)
    if kind == "vit":
        return torch.randn(2, 3, 16, 16, generator=make)
    return torch.randint(0, 64, (2, 19), generator=make)  # longer than Gemma 2's window of 16


@contextmanager
def _hooked(model: Any, after: dict[str, Hook], before: dict[str, Hook] | None = None) -> Any:
    handles = [
        model.get_submodule(p).register_forward_hook(h, with_kwargs=True) for p, h in after.items()
    ]
    handles += [
        model.get_submodule(p).register_forward_pre_hook(h) for p, h in (before or {}).items()
    ]
    yield
    for handle in handles:
        handle.remove()


def _zero(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return torch.zeros_like(out)


def _first(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _without(gone: Tensor) -> Hook:
    def hook(module: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., gone] = 0
        return (x, *args[1:])

    return hook


@torch.no_grad()
def _same(
    model: Any,
    change: Callable[[Any], None],
    after: Any = None,
    before: Any = None,
    original: Any = None,
    atol: float = 2e-5,
) -> Any:
    """The changed copy computes what the whole model with hooks does, and in steps with a cache; not
    what the original does."""
    x, cut = _inputs(model.config.model_type), copy.deepcopy(model)
    change(cut)
    got = cut(x).logits
    with _hooked(model, after or {}, before):
        wanted = model(x).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=atol)
    assert not torch.allclose(got, _whole(original or model, x), atol=1e-2)
    if anatomy(cut).decoder:
        _steps(cut, x, got)
    return cut


_seen: dict[int, tuple[Any, Tensor]] = {}


def _whole(model: Any, x: Tensor) -> Tensor:
    if id(model) not in _seen:
        _seen[id(model)] = model, model(x).logits
    return _seen[id(model)][1]


def _steps(model: Any, x: Tensor, logits: Tensor) -> None:
    first = model(x[:, :17], use_cache=True)
    cache, found = first.past_key_values, [first.logits]
    for i in range(17, x.shape[1]):
        found.append(model(x[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), logits, rtol=1e-4, atol=1e-4)


def _end(model: Any, layer: int, part: str) -> str:
    at = anatomy(model).layers[layer]
    if part == "attention":
        return at.attention.out.path  # type: ignore[union-attr]
    return at.feed.down.path if isinstance(at.feed, Feed) else at.feed.path  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_sublayer_adds_nothing(models: Any, kind: str) -> None:
    model = models[kind]
    for layer, part in ((0, "attention"), (1, "feed")):
        cut = _same(
            model,
            lambda m, at=layer, part=part: surgery.drop(m, at, part),
            {_end(model, layer, part): _zero},
        )
        assert getattr(anatomy(cut).layers[layer], part) is None
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", DECODERS)
def test_attentions_that_are_left_share_a_cache(models: Any, kind: str) -> None:
    model = models[kind]

    def change(m: Any) -> None:
        surgery.drop(m, 0, "attention")
        surgery.drop(m, 1, "attention")
        surgery.drop(m, 1, "attention")  # is gone already

    cut = _same(model, change, {_end(model, i, "attention"): _zero for i in (0, 1)})
    made = cut(_inputs(kind), use_cache=True).past_key_values
    assert [layer.keys is not None for layer in made.layers[:1]] == [True]
    tokens = [
        cut.generate(
            _inputs(kind), max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0
        )
        for use in (True, False)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_block_hands_on_its_input(models: Any, kind: str) -> None:
    model = models[kind]
    path = anatomy(model).layers[1].path
    cut = _same(model, lambda m: surgery.drop_blocks(m, [1]), {path: _first})
    assert len(anatomy(cut).layers) == cut.config.num_hidden_layers == LAYERS - 1
    twin = copy.deepcopy(model)
    surgery.empty_blocks(twin, [1])
    assert surgery.empty(twin) == [1]
    assert torch.equal(twin(_inputs(kind)).logits, cut(_inputs(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_with_their_group(models: Any, kind: str) -> None:
    model = models[kind]
    attention = anatomy(model).layers[1].attention
    assert attention is not None
    each = attention.heads // attention.groups * attention.head
    after: dict[str, Hook] = {}
    if kind == "olmoe":  # its norms over all heads see fewer of them: the rule is written out again
        for name, weights, kept in (
            ("q_norm", attention.query, range(each, 2 * each)),
            ("k_norm", attention.key, range(attention.head, 2 * attention.head)),
        ):
            after[f"{attention.path}.{name}"] = _norm_of_some(list(kept), weights.read(model))
    gone = [i for i in range(attention.heads * attention.head) if not each <= i < 2 * each]
    cut = _same(
        model,
        lambda m: surgery.keep_heads(m, 1, [1]),
        after,
        {attention.out.path: _without(torch.tensor(gone))},
    )
    left = anatomy(cut).layers[1].attention
    assert left is not None
    assert (left.groups, left.head) == (1, attention.head)
    assert left.heads == attention.heads // attention.groups


def _norm_of_some(kept: list[int], rows: Tensor) -> Hook:
    size = rows.detach().square().sum(1)

    def hook(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        x = args[0]
        small = x[..., kept].square().mean(-1, keepdim=True) + module.variance_epsilon
        scale = math.sqrt(float(size[kept].mean() / size.mean()))
        found = torch.zeros_like(x)
        found[..., kept] = scale * module.weight[kept] * x[..., kept] / small.sqrt()
        return found

    return hook


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_go_were_zero(models: Any, kind: str) -> None:
    model = models[kind]
    kept = [*range(2, 16), 40, 47]
    gone = torch.tensor([i for i in range(48) if i not in kept])
    feed = anatomy(model).layers[0].feed
    if isinstance(feed, Feed):
        before = {feed.down.path: _without(gone)}
        cut = _same(model, lambda m: surgery.keep_units(m, 0, kept), before=before)
        assert anatomy(cut).layers[0].feed.width == 16  # type: ignore[union-attr]
        return
    assert isinstance(feed, Experts)
    rows = [[(i + 3 * e) % 48 for i in kept] for e in range(feed.count)]
    whole = copy.deepcopy(model)
    stacked: Any = whole.get_submodule(f"{feed.path}.experts")
    with torch.no_grad():
        for e, own in enumerate(rows):
            stacked.down_proj[e][:, [i for i in range(48) if i not in own]] = 0
    cut = _same(whole, lambda m: surgery.keep_units(m, 0, torch.tensor(rows)), original=model)
    assert anatomy(cut).layers[0].feed.width == 16  # type: ignore[union-attr]
    with pytest.raises(EspalierError, match="multiple of 4"):
        surgery.keep_units(copy.deepcopy(model), 0, range(17))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_channels_go_everywhere(models: Any, kind: str) -> None:
    model = models[kind]
    kept = [*range(1, 20), 22, 25, 26, 30, 31]
    scales = {path: 0.5 + 0.1 * i for i, (path, _) in enumerate(norms(model, anatomy(model)))}
    after = {path: _narrow(kept, scale) for path, scale in scales.items()}
    if kind == "bert":
        after["cls.predictions.transform.dense"] = _some(kept)
    cut = _same(model, lambda m: surgery.keep_hidden(m, kept, scales), after)
    found = anatomy(cut)
    assert found.width == cut.config.hidden_size == 24
    assert found.tied == anatomy(model).tied
    assert not any(
        32 in p.shape for n, p in cut.named_parameters() if "norm" in n and "q_" not in n
    )


def _narrow(kept: list[int], scale: float) -> Hook:
    """A norm that sees some channels only, times a scale; the others come out as zero."""

    def hook(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        x = args[0][..., kept].double()
        found = torch.zeros_like(out)
        if isinstance(module, nn.LayerNorm):
            y = nn.functional.layer_norm(x, (len(kept),), eps=module.eps)
            y = scale * y * module.weight[kept] + module.bias[kept]
        else:
            gemma = "Gemma" in type(module).__name__
            eps = module.eps if gemma else module.variance_epsilon
            weight = module.weight[kept] + (1 if gemma else 0)
            y = scale * weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        found[..., kept] = y.to(out.dtype)
        return found

    return hook


def _some(kept: list[int]) -> Hook:
    def hook(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        found = torch.zeros_like(out)
        found[..., kept] = out[..., kept]
        return found

    return hook


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2_moe"])
def test_without_scales_hidden_channels_go_as_if_they_were_zero(models: Any, kind: str) -> None:
    model, kept = models[kind], list(range(4, 28))
    gone = torch.tensor([i for i in range(32) if i not in kept])
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if name.endswith(("embed_tokens.weight", "experts.gate_up_proj")):
                p[..., gone] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p[gone] = 0
            elif name.endswith("experts.down_proj"):
                p[:, gone] = 0
    # but for the norms' small constant, which the same factor does not reach
    _same(whole, lambda m: surgery.keep_hidden(m, kept), original=model, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norm_scales_are_least_squares(models: Any, kind: str) -> None:
    model, x, kept = models[kind], _inputs(kind), [0, 3, 4, 9, 11, 30]
    path = anatomy(model).layers[1].path + (".ln_2" if kind == "gpt2" else ".input_layernorm")
    seen: list[Tensor] = []
    after = {path: lambda module, args, kwargs, out: seen.append(args[0])}
    with torch.no_grad(), _hooked(model, after):
        model(x)
    h = seen[0].double()
    if kind == "gpt2":
        full, less = (nn.functional.layer_norm(v, v.shape[-1:]) for v in (h, h[..., kept]))
    else:
        full, less = (nn.functional.rms_norm(v, v.shape[-1:]) for v in (h, h[..., kept]))
    wanted = torch.linalg.lstsq(less.reshape(-1, 1), full[..., kept].reshape(-1, 1)).solution
    assert norm_scales(model, kept, x)[path] == pytest.approx(float(wanted), rel=1e-4)


def _routed(count: int, kept: list[int], k: int) -> Hook:
    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        logits = args[0].reshape(-1, module.hidden_dim) @ module.weight.T
        mask = torch.full((count,), -torch.inf)
        mask[kept] = 0
        share, index = torch.softmax(logits + mask, -1).topk(k)
        if getattr(module, "norm_topk_prob", True):
            share = share / share.sum(-1, keepdim=True)
        return logits, share, index

    return hook


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_go_from_the_router_too(models: Any, kind: str) -> None:
    model = models[kind]
    feed = anatomy(model).layers[1].feed
    assert isinstance(feed, Experts)
    cut = _same(
        model,
        lambda m: surgery.keep_experts(m, 1, [3, 1, 0]),
        {feed.router: _routed(4, [0, 1, 3], 2)},
    )
    now = anatomy(cut).layers[1].feed
    assert isinstance(now, Experts)
    assert (now.count, now.active) == (3, 2)
    cut = _same(model, lambda m: surgery.keep_experts(m, 1, [2]), {feed.router: _routed(4, [2], 1)})
    assert anatomy(cut).layers[1].feed.active == 1  # type: ignore[union-attr]
    _same(model, lambda m: surgery.set_active(m, 1, 1), {feed.router: _routed(4, [0, 1, 2, 3], 1)})


def _variant(name: str) -> Any:
    if name == "opt350":  # norms behind the sums, a table of its own width
        config = tiny("opt").config
        config.do_layer_norm_before, config.word_embed_proj_dim = False, 16
        from transformers import OPTForCausalLM

        model = OPTForCausalLM(config).eval()
        for i, p in enumerate(model.parameters()):
            p.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
        return model
    settings: dict[str, Any] = {
        "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "qwen2_moe": {"mlp_only_layers": [1]},
        "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    }[name]
    return tiny(name, layers=3, **settings)


@pytest.mark.parametrize("name", ["opt350", "qwen2", "qwen2_moe", "llama"])
def test_variants_of_architectures(name: str) -> None:
    model = _variant(name)
    _same(model, lambda m: surgery.drop(m, 0, "attention"), {_end(model, 0, "attention"): _zero})
    _same(model, lambda m: surgery.drop(m, 1, "feed"), {_end(model, 1, "feed"): _zero})
    kept = [*range(3, 25), 30, 31]
    after = {path: _narrow(kept, 1.2) for path, _ in norms(model, anatomy(model))}
    gone = torch.tensor([i for i in range(32) if i not in kept])
    # old OPT's first layer reads what no norm has seen
    first = {anatomy(model).layers[0].path: _without(gone)} if name == "opt350" else None
    scales = dict.fromkeys(after, 1.2)
    cut = _same(model, lambda m: surgery.keep_hidden(m, kept, scales), after, first)
    assert anatomy(cut).tied == anatomy(model).tied


def test_several_changes_of_one_model(models: Any) -> None:
    cut = copy.deepcopy(models["gemma2"])
    surgery.keep_hidden(cut, range(24))
    surgery.keep_heads(cut, 0, [0])
    surgery.keep_units(cut, 2, range(10))
    surgery.drop_blocks(cut, [1])
    surgery.drop(cut, 1, "feed")
    assert cut.config.layer_types == ["sliding_attention", "sliding_attention"]
    x = _inputs("gemma2")
    with torch.no_grad():
        _steps(cut, x, cut(x).logits)


def test_gpt2_that_divides_by_the_layer_still_does() -> None:
    model = tiny("gpt2", layers=3, scale_attn_by_inverse_layer_idx=True)
    path = anatomy(model).layers[0].path
    cut = _same(model, lambda m: surgery.drop_blocks(m, [0]), {path: _first})
    made = type(cut)(cut.config).eval()  # what a folder with this configuration would give
    made.load_state_dict(cut.state_dict())
    torch.testing.assert_close(made(_inputs("gpt2")).logits, cut(_inputs("gpt2")).logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: surgery.drop(m, 3, "attention"), "layers are 0 to 2, got 3"),
        (lambda m: surgery.drop(m, 0, "ffn"), "unknown part"),
        (lambda m: surgery.drop_blocks(m, [0, 1, 2]), "one of 3 blocks must stay"),
        (
            lambda m: surgery.keep_heads(m, 0, [2]),
            "groups of heads to keep are one or more of 0 to 1",
        ),
        (lambda m: surgery.keep_units(m, 0, []), "units to keep are one or more of 0 to 47"),
        (lambda m: surgery.keep_hidden(m, [32]), "0 to 31"),
        (lambda m: surgery.keep_experts(m, 0, [0]), "no mixture of experts"),
    ],
)
def test_what_there_is_not_is_refused(models: Any, change: Any, says: str) -> None:
    with pytest.raises(EspalierError, match=says):
        change(copy.deepcopy(models["llama"]))


def test_nothing_is_kept_of_what_was_dropped(models: Any) -> None:
    gone = copy.deepcopy(models["llama"])
    surgery.drop(gone, 0, "attention")
    with pytest.raises(EspalierError, match="it was dropped"):
        surgery.keep_heads(gone, 0, [0])
