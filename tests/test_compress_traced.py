"""Models whose forwards write sizes of their layers into code: traced, cut, and still themselves."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.compress import Pretrained, Widths
from espalier.compress.coupling.fast_paths import in_steps, without_nesting
from espalier.compress.coupling.proof import without
from espalier.compress.coupling.tracing import traced
from espalier.export import to_onnx
from espalier.testing.plain import check_plain

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module, x: Tensor, *inputs: Tensor, **kept: int) -> nn.Module:
    """The model with some groups cut (`__` for a dot); checked against the original with zeros."""
    family = Pretrained(model, x, (Widths(multiple=1),))
    choices = {f"width:{name.replace('__', '.')}": count for name, count in kept.items()}
    (bound,) = family.cuts
    assert not any(bound.groups[name.removeprefix("width:")].averaged for name in choices)
    network = family.build({**family.original, **choices})
    wanted = without(family.model, dict(bound.groups), bound.kept(choices))
    with torch.no_grad():
        for given in (x, *inputs):
            torch.testing.assert_close(network(given), wanted(given), rtol=1e-4, atol=1e-5)
    return network


def filed(network: nn.Module) -> nn.Module:
    """The network from a file that needs nothing of this package."""
    file = io.BytesIO()
    torch.save(network, file)
    assert b"espalier" not in file.getvalue()
    file.seek(0)
    read: nn.Module = torch.load(file, weights_only=False)
    return read


class Tutorial(nn.Module):
    """PyTorch's tutorial on CIFAR-10: the size that is flattened stands in the model's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Parted(nn.Module):
    """The same in two parts; only the model itself knows what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 5), pool, nn.Conv2d(6, 16, 5), pool)
        self.classifier = nn.Sequential(nn.Linear(400, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, 16 * 5 * 5))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Tutorial, ["conv1", "conv2", "fc1", "fc2"]),
        (Parted, ["features.0", "features.2", "classifier.0"]),
    ],
)
def test_a_flattened_size_in_the_models_own_forward_follows(
    make: type[nn.Module], names: list[str]
) -> None:
    torch.manual_seed(0)
    model = make()
    family = Pretrained(model, IMAGES, (Widths(multiple=1),))
    assert family.space.names == tuple(f"width:{n}" for n in names)
    assert len(family.ignored) == 1  # the output
    network = cut(model, IMAGES, IMAGES[:1], **{names[1].replace(".", "__"): 4})
    assert list(network.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(network).train()
    twin(IMAGES).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    whole = sum(4 * p.numel() for p in family.model.parameters())
    assert len(to_onnx(network, IMAGES)) < whole  # bytes of the weights alone


def test_where_no_size_is_written_the_model_keeps_its_class() -> None:
    torch.manual_seed(0)
    model = Tutorial()
    assert type(cut(model, IMAGES, conv1=3, fc1=12)) is Tutorial
    assert type(cut(model, IMAGES, conv1=3, conv2=4, fc1=12)) is not Tutorial
    assert type(model) is Tutorial


class Named(nn.Module):
    """A block that writes its inner width into code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).reshape(x.shape[0], -1, 12))


class Around(nn.Module):
    """Such a block within a model that writes a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 8), Named()
        self.conv, self.out = nn.Conv1d(8, 6, 1), nn.Linear(6 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(self.block(self.stem(x)).transpose(1, 2)).reshape(-1, 6 * 5))


@pytest.mark.parametrize(
    ("kept", "paths"),
    [
        ({"stem": 4}, []),
        ({"block__up": 4}, ["block"]),
        ({"conv": 2}, [""]),
        ({"stem": 4, "block__up": 4, "conv": 2}, ["", "block"]),
    ],
)
def test_only_what_holds_a_size_that_changes_is_traced(
    kept: dict[str, int], paths: list[str]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    network = cut(Around(), x, x[:1], **kept)
    graphs = [p for p, m in network.named_modules() if isinstance(m, fx.GraphModule)]
    assert graphs == paths


class Masked(nn.Module):
    """nanoGPT's attention: its mask is a buffer, of which it takes what the input's length asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = (F.softmax(scores, -1) @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.c_proj(y)


class Language(nn.Module):
    """A block of nanoGPT between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
        self.place = nn.Parameter(torch.randn(1, 32, 16))
        self.norm, self.attention = nn.LayerNorm(16), Masked(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.place[:, : x.shape[1]]
        return self.out(x + self.attention(self.norm(x)))


def test_attention_with_its_mask_in_a_buffer_loses_width_and_heads() -> None:
    torch.manual_seed(0)
    x, longer = torch.randn(2, 6, 8), torch.randn(3, 9, 8)
    model = Language()
    family = Pretrained(model, x, (Widths(multiple=1),))
    # neither rows of the mask nor places, that a longer input reads
    assert family.space.names == ("width:stem", "width:attention.c_attn")
    network = cut(model, x, longer, attention__c_attn=3)
    assert list(network.state_dict()) == list(model.state_dict())
    check_plain(network)
    for twin in (filed(network), copy.deepcopy(network)):
        assert torch.equal(twin(longer), network(longer))
        assert list(twin.state_dict()) == list(model.state_dict())
    assert to_onnx(network, x)
    assert family.build({**family.original, "width:stem": 8})(longer).shape == (3, 9, 5)


class Dropped(nn.Module):
    """Dropouts as timm and users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.p = nn.Linear(8, 8), 0.5

    def forward(self, x: Tensor) -> Tensor:
        q = self.inner(x).unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=self.p if self.training else 0.0)
        return F.dropout(y.transpose(1, 2).flatten(2), self.p, self.training)


class Normed(nn.Module):
    """A norm as a function, whose statistics are buffers; and another scale while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        return x * (0.5 if self.training else 2) + (1 - self.training)


@pytest.mark.parametrize("make", [Dropped, Normed])
def test_what_is_traced_trains_as_it_is_written(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = make().eval(), torch.randn(3, 6, 8)
    graph = traced(copy.deepcopy(block))
    for twin in (graph, filed(graph), copy.deepcopy(graph), traced(copy.deepcopy(block).train())):
        own = copy.deepcopy(block)
        for training in (True, False, True):
            own.train(training)
            twin.train(training)
            torch.manual_seed(1)
            wanted = own(x)
            torch.manual_seed(1)
            assert torch.equal(twin(x), wanted)
        assert twin.state_dict().keys() == own.state_dict().keys()
        assert all(torch.equal(v, own.state_dict()[k]) for k, v in twin.state_dict().items())
    assert to_onnx(graph.eval(), x)
    assert not any(module.training for module in block.modules())


class Noisy(nn.Module):
    """While it trains it does more; its weights are numbers of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return x * sum(self.times.tolist()) + self.times.sum()


def test_what_does_more_while_it_trains_is_traced_as_it_evaluates() -> None:
    block, x = Noisy().eval(), torch.randn(2, 3)
    state, before = torch.get_rng_state(), dict(vars(block))
    graph = traced(block)
    assert torch.equal(graph(x), block(x))
    assert torch.equal(graph.train()(x), block(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(block) == before


class Parts(nn.Module):
    """A block that can be traced, and then not be cut: its width stands where no size is followed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.broadcast_to(self.up(x), (x.shape[0], 5, 12)))


def test_what_fails_while_it_is_looked_at_is_not_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Parts(), nn.Linear(8, 3))
    bound = Widths(multiple=1).bind(model, torch.randn(2, 5, 4))
    assert "1.up" in {i.layer for i in bound.ignored}
    assert capfd.readouterr().err == ""


class Classifier(nn.Module):
    """torch's encoder as it is made by default, over padded sentences."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.table, self.encoder = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2)
        self.out, self.masked = nn.Linear(16, 5), masked

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        y = self.encoder(self.table(x), src_key_padding_mask=padding)
        y = y.masked_fill(padding[..., None], 0) if self.masked else y
        return self.out(y.sum(1))


PADDED = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_over_padded_inputs_are_cut_where_nothing_reads_the_padding() -> None:
    torch.manual_seed(0)
    model = Classifier(masked=True).eval()
    with torch.no_grad():
        wanted = model(PADDED)
        without_nesting(model, PADDED)
        torch.testing.assert_close(model(PADDED), wanted)
    layers = ("encoder.layers.0", "encoder.layers.1")
    names = {"table"} | {f"{p}.{n}" for p in layers for n in ("self_attn", "linear1")}
    assert Widths(multiple=1).bind(model, PADDED).groups.keys() == names
    network = cut(model, PADDED, PADDED[1:], encoder__layers__1__self_attn=2)
    assert to_onnx(network, PADDED)

    reads = Classifier(masked=False).eval()
    without_nesting(reads, PADDED)
    assert reads.encoder.use_nested_tensor
    without_nesting(reads, PADDED.float())  # what it does not take
    assert reads.encoder.use_nested_tensor


@torch.no_grad()
def test_an_encoder_layer_in_steps_calls_what_stands_in_its_layers_places() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    wanted = layer(x)
    layer.linear1 = nn.Sequential(layer.linear1)
    with pytest.raises(AttributeError):
        layer(x)
    in_steps(layer)
    torch.testing.assert_close(layer(x), wanted)
