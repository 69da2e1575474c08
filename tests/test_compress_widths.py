"""Widths: groups of coupled channels, and cut models against the original without those channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress.coupling import proof
from espalier.compress.coupling.groups import Group
from espalier.compress.coupling.labelling import outputs
from espalier.compress.importance import scores
from espalier.compress.widths import BoundWidths, Widths
from espalier.errors import EspalierError


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride)
        self.relu = nn.ReLU()  # runs twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.short(x))


def resnet() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Basic(8, 8, 1), Basic(8, 16, 2), *head)


class Inverted(nn.Module):
    """Depthwise, squeeze and excitation, PReLU; flattened before the classifier."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        wide = 32 * times
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.prelu = nn.PReLU(8)
        self.expand = nn.Conv2d(8, 32, 1)
        self.depthwise = nn.Conv2d(32, wide, 3, 1, 1, groups=32)
        self.norm = nn.BatchNorm2d(wide)
        self.squeeze = nn.Conv2d(wide, 4, 1)
        self.excite = nn.Conv2d(4, wide, 1)
        self.project = nn.Conv2d(wide, 8, 1)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.stem(x))
        y = F.hardswish(self.norm(self.depthwise(F.relu6(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y * gate)).flatten(1))


class Dense(nn.Module):
    """Concatenation, nearest upsampling, transposed convolution, a cut in half and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv = nn.Conv2d(8, 12, 3, 1, 1)
        self.norm = nn.BatchNorm2d(20)
        self.gated = nn.Conv2d(20, 16, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.gelu(self.norm(torch.cat([x, self.conv(F.relu(x))], 1)))
        a, b = self.gated(x).chunk(2, 1)
        x = F.interpolate(a * torch.sigmoid(b), scale_factor=2)
        return self.head(self.up(x).amax((2, 3)))


class Shuffled(nn.Module):
    """Grouped convolution, half of the channels passed by, shuffled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.branch = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 24, 3, 1, 1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.silu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    model = make(*args)
    for m in model.modules():  # norms that do something
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


def silenced(
    model: nn.Module, groups: Mapping[str, Group], kept: Mapping[str, Tensor]
) -> nn.Module:
    """The original with zeros where weights read channels that go: what cut models must equal."""
    network = copy.deepcopy(model)
    tensors = dict(network.named_parameters())
    for name, units in kept.items():
        gone = [u for u in range(groups[name].units) if u not in units.tolist()]
        assert any(m.consumed for m in groups[name].members)
        for m in groups[name].members:
            if m.consumed:
                rows = m.rows[gone].flatten()
                tensors[f"{m.path}.{m.tensor}".strip(".")].data.index_fill_(m.dim, rows, 0)
    return network


def check(model: nn.Module, x: Tensor, **settings: object) -> BoundWidths:
    """Random widths of all groups with an exact reference: cut, and silenced, compute the same."""
    bound = Widths(**settings).bind(model, x)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        choices = {
            d.name: d.options[int(torch.randint(d.count, (), generator=rng))]
            for d in bound.decisions
            if not bound.groups[d.name.removeprefix("width:")].averaged
        }
        small = copy.deepcopy(model)
        bound.apply(small, choices)
        want = outputs(silenced(model, bound.groups, bound.kept(choices))(x))
        for a, b in zip(outputs(small(x)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    return bound


CNNS = {
    resnet: {"0": 8, "1.conv1": 8, "2.conv1": 16, "2.conv2": 16},
    Inverted: {"stem": 8, "expand": 32, "squeeze": 4},
    Dense: {"stem": 8, "conv": 12, "gated": 8, "up": 12},
    Shuffled: {"stem": 2, "grouped": 6},
}


@pytest.mark.parametrize("make", CNNS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_cnns_compute_what_the_original_does_without_the_channels(make: type[nn.Module]) -> None:
    bound = check(seeded(make), torch.randn(2, 3, 8, 8))
    assert {n: g.units for n, g in bound.groups.items()} == CNNS[make]


class SelfAttention(nn.Module):
    """As in timm: one layer for queries, keys and values; the width of the input in a reshape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (self.q_norm(q) * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Biased(nn.Module):
    """As LeViT's: a bias for each of four heads, which are as many as the channels of each key; a
    condition keeps it from being traced."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.val_attn_dim = heads, 4, 8, 8 * heads
        self.qkv, self.proj = nn.Linear(width, 16 * heads), nn.Linear(8 * heads, width)
        self.bias = nn.Parameter(torch.randn(heads, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).view(b, n, self.num_heads, -1)
        q, k, v = parts.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) + self.bias[:, :, None]
        y = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.val_attn_dim if x.norm() >= 0 else 0))


class GroupedQueries(nn.Module):
    """Four heads of queries on two of keys and values, with rotary embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        angles = torch.arange(4.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x[..., :2], x[..., 2:]
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.rotated(self.q(x).view(b, n, self.heads, 4).transpose(1, 2))
        k, v = self.kv(x).view(b, n, 2, -1, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, self.rotated(k), v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class OneKey(GroupedQueries):
    """All heads of queries on one of keys and values, copied by expanding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.kv = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.rotated(self.q(x).view(b, n, self.heads, 4).transpose(1, 2))
        k, v = (t[:, None].expand(b, self.heads, n, 4) for t in self.kv(x).split(4, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Patches, a class token, positions, attention, a gated feed-forward layer."""

    def __init__(self, attention: type[nn.Module], width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 4, width))
        self.attention = attention(width, 4)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48)
        self.down = nn.Linear(24, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)[:, :3]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.attention(self.norm(x))
        gate, y = self.up(self.norm(x)).chunk(2, -1)
        return self.head((x + self.down(F.silu(gate) * y))[:, 0])


HEADS = {
    SelfAttention: ("attention.qkv", 4),
    Biased: ("attention.qkv", 4),
    GroupedQueries: ("attention.q", 2),
    OneKey: ("attention.q", 4),
}


@pytest.mark.parametrize("attention", HEADS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_heads_go_whole_and_with_their_keys_and_values(attention: type[nn.Module]) -> None:
    name, units = HEADS[attention]
    model = seeded(Transformer, attention)
    bound = check(model, torch.randn(3, 3, 8, 8))
    assert {n: g.units for n, g in bound.groups.items()} == {"patch": 16, name: units, "up": 24}
    assert bound.groups[name].heads
    assert bound.groups["patch"].averaged  # a layer norm is over these
    small = copy.deepcopy(model)
    bound.apply(small, {d.name: d.options[0] for d in bound.decisions})
    assert small(torch.randn(5, 3, 8, 8)).shape == (5, 10)  # any batch
    assert Widths(heads=False).bind(model, torch.randn(1, 3, 8, 8)).groups.keys() == {"patch", "up"}


@torch.no_grad()
def test_torchs_attention_gets_heads_of_its_own_number() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).eval()
    x, mask = torch.randn(2, 6, 5), torch.rand(6, 6) < 0.3
    mask.fill_diagonal_(False)
    bound = check(model, x)
    assert {n: g.units for n, g in bound.groups.items()} == {
        "0": 16,
        "1.self_attn": 4,
        "1.linear1": 32,
    }
    small = copy.deepcopy(model)
    choices = {"width:1.self_attn": 1}
    bound.apply(small, choices)
    want = silenced(model, bound.groups, bound.kept(choices))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    h = model[0](x)
    torch.testing.assert_close(
        small[1](h, mask, padding), want[1].train()(h, mask, padding), rtol=1e-4, atol=1e-5
    )
    made, weights = small[1].self_attn(h, h, h, attn_mask=mask, average_attn_weights=False)
    assert made.shape == (2, 6, 16)
    assert weights.shape == (2, 1, 6, 6)


@torch.no_grad()
def test_a_users_transformers_models_lose_heads_and_channels() -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    llama = library.LlamaForCausalLM(
        library.LlamaConfig(
            **sizes,
            vocab_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    bound = check(llama, torch.arange(12).view(2, 6))
    layer = "model.layers.0"
    assert {n: (g.units, g.heads) for n, g in bound.groups.items()} == {
        "model.embed_tokens": (16, False),
        f"{layer}.self_attn.q_proj": (2, True),
        f"{layer}.mlp.gate_proj": (24, False),
    }
    members = {m.path: m.rows.shape for m in bound.groups[f"{layer}.self_attn.q_proj"].members}
    assert members == {
        f"{layer}.self_attn.q_proj": (2, 8),  # two heads of queries on each of keys and values
        f"{layer}.self_attn.k_proj": (2, 4),
        f"{layer}.self_attn.v_proj": (2, 4),
        f"{layer}.self_attn.o_proj": (2, 8),
    }
    vit = library.ViTForImageClassification(
        library.ViTConfig(**sizes, num_attention_heads=4, image_size=8, patch_size=4)
    ).eval()
    bound = check(vit, torch.randn(2, 3, 8, 8))
    assert sum(g.heads for g in bound.groups.values()) == 1


@torch.no_grad()
def test_norms_over_channels_are_cut_with_them() -> None:
    torch.manual_seed(0)
    norm, last = nn.LayerNorm(12), nn.Linear(12, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Linear(4, 12), norm, nn.GELU(), last)
    x = torch.randn(5, 4)
    bound = Widths().bind(model, x)
    (group,) = bound.groups.values()
    assert group.averaged
    small = copy.deepcopy(model)
    bound.apply(small, {"width:0": 5})
    kept = bound.order["0"][:5].sort().values
    hidden = F.layer_norm(model[0](x)[:, kept], (5,), norm.weight[kept], norm.bias[kept])
    want = F.linear(F.gelu(hidden), last.weight[:, kept], last.bias)
    torch.testing.assert_close(small(x), want)


@torch.no_grad()
def test_norms_without_weights_follow() -> None:
    class Own(nn.Module):  # as in the original ConvNeXt
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.rand(width)),
                nn.Parameter(torch.rand(width)),
            )
            self.normalized_shape = (width,)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)

    bare = nn.LayerNorm(8, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(4, 8), bare, nn.Linear(8, 8), Own(8), nn.Linear(8, 3))
    bound = Widths().bind(model, torch.randn(2, 4))
    assert list(bound.groups) == ["0", "2"]
    small, choices = copy.deepcopy(model), {"width:0": 3, "width:2": 5}
    bound.apply(small, choices)
    assert (small[1].normalized_shape, small[3].normalized_shape) == ((3,), (5,))
    alone = bound.slice("1", bare, choices)
    assert isinstance(alone, nn.LayerNorm)
    assert alone.normalized_shape == (3,)
    assert bare.normalized_shape == (8,)
    assert small(torch.randn(6, 4)).shape == (6, 3)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, in copying
def test_an_exported_program_is_cut_like_the_model_it_came_from() -> None:
    model, x = seeded(Transformer, SelfAttention), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,)).module()
    bound, again = Widths().bind(program, x), Widths().bind(model, x)
    assert {n: g.units for n, g in bound.groups.items()} == {
        n: g.units for n, g in again.groups.items()
    }
    choices = {d.name: d.options[1] for d in bound.decisions}
    one, two = copy.deepcopy(program), copy.deepcopy(model)
    bound.apply(one, choices)
    again.apply(two, choices)
    torch.testing.assert_close(one(x), two(x))


@torch.no_grad()
def test_groups_of_a_norm_and_of_a_convolution_lose_alike() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 24, 1, groups=3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 4, 3))
    bound = Widths().bind(model, torch.randn(2, 2, 2, 2))
    assert {n: g.units for n, g in bound.groups.items()} == {"0": 4, "2": 8}
    small = copy.deepcopy(model)
    bound.apply(small, {"width:0": 3, "width:2": 2})
    assert (small[0].out_channels, small[1].num_channels, small[1].num_groups) == (9, 9, 3)
    assert (small[2].in_channels, small[2].out_channels, small[4].in_features) == (9, 6, 24)
    rows = {m.path: m.rows for m in bound.groups["0"].members}["0"]
    assert rows.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert small(torch.randn(4, 2, 2, 2)).shape == (4, 3)


def test_groups_are_those_of_torch_pruning() -> None:
    pruning = pytest.importorskip("torch_pruning")
    # with one output an input: torch-pruning takes a depthwise convolution of two as of one
    for model in (seeded(resnet), seeded(Inverted, 1)):
        x = torch.randn(1, 3, 8, 8)
        bound = Widths().bind(model, x)
        graph = pruning.DependencyGraph().build_dependency(model, x, verbose=False)
        names = {module: path for path, module in model.named_modules()}
        for group in bound.groups.values():
            producer = model.get_submodule(group.producer.path)
            found = graph.get_pruning_group(producer, pruning.prune_conv_out_channels, [1])
            wanted = {
                (names[dep.target.module], tuple(sorted(rows)))
                for dep, rows in found
                if dep.target.module in names
            }
            assert {
                (m.path, tuple(m.rows[1].sort().values.tolist())) for m in group.members
            } == wanted


@torch.no_grad()
def test_what_can_not_be_cut_is_left_alone_and_said() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.d = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).sort(-1).values).softmax(-1)
            z = self.d(y)
            return self.c(y) + z[:, :3] * z.view(len(z), 3, 2)[:, :, 0]

    bound = Widths().bind(Sorted(), torch.randn(2, 4))
    reasons = {i.layer: i.reason for i in bound.ignored}
    assert not bound.decisions
    assert "sort" in reasons["a"]
    assert "softmax" in reasons["b"]
    assert "output" in reasons["c"]
    assert {i.kind for i in bound.ignored} == {"width"}

    class Hard(nn.Module):  # a size written into code that can't be traced
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.reshape(-1, 8 if x.norm() >= 0 else x.shape[1], 4).mean(-1))

    bound = Widths().bind(Hard(), torch.randn(2, 3, 2, 2))
    assert not bound.groups
    assert any(i.layer == "a" and i.reason.startswith("a cut model") for i in bound.ignored)


def test_one_group_at_fault_is_found_by_halves_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reshaped(nn.Module):  # to a size written into code that can't be traced
        def __init__(self, fixed: bool) -> None:
            super().__init__()
            self.fixed, self.a, self.b = fixed, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.reshape(-1, 8 if self.fixed and x.norm() >= 0 else x.shape[1]))

    tried, fault = [], proof._fault
    monkeypatch.setattr(proof, "_fault", lambda *given: tried.append(given) or fault(*given))
    blocks = [Reshaped(fixed=i == 9) for i in range(16)]
    bound = Widths().bind(nn.Sequential(*blocks, nn.Linear(8, 3)), torch.randn(2, 8))
    assert len(bound.groups) == 31
    assert [i.layer for i in bound.ignored if i.reason.startswith("a cut model")] == ["9.a"]
    assert len(tried) < 20


@torch.no_grad()
def test_padded_shortcuts_tie_the_stages() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c((self.b(F.relu(x)) + F.pad(x, (0, 0, 0, 0, 2, 2))).mean((2, 3)))

    bound = check(seeded(Padded), torch.randn(2, 3, 4, 4))
    (group,) = bound.groups.values()
    rows = {(m.path, m.tensor, m.dim): m.rows.flatten().tolist() for m in group.members}
    assert rows["b", "weight", 0] == [2, 3, 4, 5]  # what stands on padding stays
    assert rows["a", "weight", 0] == [0, 1, 2, 3]


@torch.no_grad()
def test_shared_weights_stay_shared_and_the_original_stays_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x)
            return self.out(y + F.relu(self.mid(y)))

    model = Tied().train()
    before = copy.deepcopy(model.state_dict())
    bound = Widths().bind(model, torch.arange(8).view(2, 4))
    small = copy.deepcopy(model)
    bound.apply(small, {"width:table": 2})
    assert small.out.weight is small.table.weight
    assert small.table.weight.shape == (9, 2)
    assert small.table.embedding_dim == 2
    assert small(torch.arange(8).view(2, 4)).shape == (2, 4, 9)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("make", [Inverted, Dense, Transformer], ids=lambda f: f.__name__)
def test_one_layer_alone_is_as_apply_leaves_it(make: type[nn.Module]) -> None:
    model = seeded(make, *([SelfAttention] if make is Transformer else []))
    bound = Widths().bind(model, torch.randn(2, 3, 8, 8))
    choices = {d.name: d.options[d.count // 2 - 1] for d in bound.decisions}
    small = copy.deepcopy(model)
    bound.apply(small, choices)
    leaves = [p for p, m in model.named_modules() if p and not list(m.children())]
    assert leaves
    for path in leaves:
        layer = model.get_submodule(path)
        alone = bound.slice(path, layer, choices)
        there = small.get_submodule(path)
        assert alone is not None
        assert alone.extra_repr() == there.extra_repr()
        for key, value in there.state_dict().items():
            assert torch.equal(alone.state_dict()[key], value)


def shapes(model: nn.Module, x: Tensor) -> dict[str, list[tuple[object, object]]]:
    found: dict[str, list[tuple[object, object]]] = {}
    for path, module in model.named_modules():
        if path and not list(module.children()):
            module.register_forward_hook(
                lambda m, i, o, path=path: found.setdefault(path, []).append((i[0].shape, o.shape))
            )
    model(x)
    return found


@torch.no_grad()
@pytest.mark.parametrize("make", [resnet, Inverted], ids=lambda f: f.__name__)
def test_layers_names_the_decisions_of_each_shape(make: type[nn.Module]) -> None:
    model, x = seeded(make), torch.randn(2, 3, 8, 8)
    bound = Widths().bind(model, x)
    whole = shapes(copy.deepcopy(model), x)
    told = bound.layers()
    for d in bound.decisions:
        small = copy.deepcopy(model)
        bound.apply(small, {d.name: d.options[0]})
        changed = {path for path, shape in shapes(small, x).items() if shape != whole[path]}
        assert changed == {path for path in whole if d.name in told.get(path, ())}


def test_options_keep_to_multiples_and_end_with_all() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 20), nn.Linear(20, 3))
    x = torch.randn(2, 4)

    def options(**settings: object) -> list[tuple[object, ...]]:
        bound = Widths(**settings).bind(model, x)  # type: ignore[arg-type]
        return [tuple(d.options) for d in bound.decisions]

    assert options() == [(8, 16, 24, 32, 40, 48, 56, 64), (4, 8, 12, 16, 20)]
    assert options(multiple=16) == [(16, 32, 48, 64), (16, 20)]
    assert options(multiple=1, steps=3, least=0.5) == [(32, 48, 64), (10, 15, 20)]
    bound = Widths(multiple=32).bind(model, x)
    assert [i.layer for i in bound.ignored if "multiple of 32" in i.reason] == ["2"]


def test_scores_decide_which_units_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    given = torch.tensor([3.0, 9.0, 1.0, 7.0, 7.0, 0.0])
    bound = Widths(scores={"0": given}).bind(model, x)
    assert bound.order["0"].tolist() == [1, 3, 4, 0, 2, 5]
    assert bound.kept({"width:0": 3})["0"].tolist() == [1, 3, 4]
    again = bound.with_scores({"0": -given})
    assert again.kept({"width:0": 2})["0"].tolist() == [2, 5]
    assert bound.order["0"].tolist() == [1, 3, 4, 0, 2, 5]
    small = copy.deepcopy(model)
    again.apply(small, {"width:0": 2})
    assert torch.equal(small[0].weight, model[0].weight[[2, 5]])
    assert torch.equal(small[2].weight, model[2].weight[:, [2, 5]])
    with pytest.raises(EspalierError, match="one a unit"):
        bound.with_scores({"0": given[:3]})
    with pytest.raises(EspalierError, match="unknown group 'x'"):
        bound.with_scores({"x": given})
    with pytest.raises(EspalierError, match="keeps 1 to 6 units, got 7"):
        bound.kept({"width:0": 7})
    with pytest.raises(EspalierError, match="unknown group 'x'"):
        Widths(scores={"x": given}).bind(model, x)
    left_alone = bound.ignored[0].layer
    assert (
        Widths(scores={left_alone: given[:3]})
        .bind(model, x)
        .order["0"]
        .equal(Widths().bind(model, x).order["0"])
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"importance": "tailor"}, "Did you mean 'taylor'"),
        ({"least": 0.0}, "least is a share"),
        ({"steps": 1}, "at least 2"),
        ({"multiple": 0}, "from 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(EspalierError, match=text):
        Widths(**settings)  # type: ignore[arg-type]


def test_a_model_that_does_not_run_is_said_in_one_line() -> None:
    with pytest.raises(EspalierError, match=r"does not run on an example of shape \(2, 5\)") as e:
        Widths().bind(nn.Linear(4, 3), torch.randn(2, 5))
    assert "\n" not in str(e.value)


def test_taylor_is_the_slope_of_the_loss_as_a_unit_fades() -> None:
    model = seeded(resnet).double()
    x, y = torch.randn(6, 3, 8, 8).double(), torch.arange(6)
    bound = Widths().bind(model, x)
    found = scores(model, bound.groups, "taylor", [(x, y)])
    for name, unit in (("0", 3), ("2.conv1", 5)):
        losses = []
        for share in (1 + 1e-5, 1 - 1e-5):
            other = copy.deepcopy(model)
            for m in bound.groups[name].members:
                tensor = getattr(other.get_submodule(m.path), m.tensor)
                if isinstance(tensor, nn.Parameter):
                    tensor.data.index_copy_(
                        m.dim, m.rows[unit], tensor.data.index_select(m.dim, m.rows[unit]) * share
                    )
            losses.append(F.cross_entropy(other(x), y).item())
        assert float(found[name][unit]) == pytest.approx(
            abs(losses[0] - losses[1]) / 2e-5, rel=1e-3
        )
    twice = scores(model, bound.groups, "taylor", [(x, y), (x, y)])
    torch.testing.assert_close(twice["0"], found["0"])
    assert all(p.grad is None for p in model.parameters())


def test_other_importances() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(4, 2, 2, 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        model[0].weight.copy_(torch.tensor([[3.0, 0], [0, 1], [0, 0]])[..., None, None])
        model[3].weight.fill_(1.0)
    groups = Widths(importance="bn").bind(model, x).groups
    assert scores(model, groups, "bn")["0"].tolist() == [0.5, 2.0, 1.0]
    assert Widths(importance="bn").bind(model, x).order["0"].tolist() == [1, 2, 0]
    magnitude = scores(model, groups, "magnitude")["0"]
    assert magnitude.tolist() == pytest.approx([(9 / 2 + 1) ** 0.5, (1 / 2 + 1) ** 0.5, 1.0])
    inputs = model.eval()[:3](x)
    norms = inputs.view(4, 3, 4).pow(2).sum(0).sqrt()  # of each input of the linear layer
    found = scores(model, groups, "activation", [(x, torch.zeros(4))])["0"]
    torch.testing.assert_close(found, norms.mean(1))
    with pytest.raises(EspalierError, match="needs data"):
        scores(model, groups, "taylor")
    with pytest.raises(EspalierError, match="at least one batch"):
        scores(model, groups, "activation", [])
