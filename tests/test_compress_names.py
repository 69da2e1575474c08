"""Models that hold one module under two names, as attributes and in a list: both names are cut."""

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Bits, Depth, Pretrained, Widths
from espalier.compress.coupling.proof import without
from espalier.costs import Counts, count
from espalier.export import to_onnx

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.relu(layer(y))
        return x + y


class Named(nn.Module):
    """Attributes for reading, a sequence of the same modules for running."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = Block(), Block()
        self.blocks = nn.Sequential(self.block1, self.block2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attentions = nn.ModuleList([self.attention])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        for attention in self.attentions:
            x = x + attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> Named:
    torch.manual_seed(0)
    return Named().eval()


def test_widths_and_heads_are_cut_under_all_names(model: Named) -> None:
    family = Pretrained(model, X, (Widths(multiple=1),))
    assert {"width:block1.a", "width:attention"} <= set(family.space.names)
    (cut,) = family.cuts
    small = family.build(family.space.decode(family.space.corner(False))[0])
    choices = family.space.decode(family.space.corner(False))[0]
    with torch.no_grad():
        wanted = without(family.model, dict(cut.groups), cut.kept(choices))(X)
        assert torch.allclose(small(X), wanted, atol=1e-5)
    kinds = {type(m).__module__ for m in small.modules()}
    assert not any(kind.startswith("espalier") for kind in kinds)


def test_a_block_left_out_is_left_out_under_all_names(model: Named) -> None:
    family = Pretrained(model, X, (Depth(),))
    without_first = {**family.original, "depth:block1": 0}
    small = family.build(without_first)
    with torch.no_grad():
        x = model.block2(torch.relu(model.stem(X))).flatten(2).transpose(1, 2)
        x = x + model.attention(x, x, x)[0]
        assert torch.allclose(small(X), model.head(x.mean(1)), atol=1e-5)
    counted = Counts(family).estimate([family.space.candidate(without_first)])["params"][0]
    assert counted == count(small, family.example()).params < count(model, X).params


def test_bits_are_of_the_layer_whatever_its_name(model: Named) -> None:
    family = Pretrained(model, X, (Bits((2,)),), calibration=X)
    for name in family.space.names:
        network = family.build({**family.original, name: 2})
        with torch.no_grad():
            rounded = network(X)
        assert not torch.allclose(rounded, family.model(X), atol=1e-6), name
    network = family.build({**family.original, "bits:block1.a": 2})
    session = ort.InferenceSession(to_onnx(network, X))
    (got,) = session.run(None, {"input": X.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(got), network(X), atol=1e-4)
