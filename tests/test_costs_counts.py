"""Counts are exact: by hand, against exported files, and table against whole network."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import espalier as esp
from espalier.costs import Count, Counts, count, layers
from espalier.costs.count import weight_bytes
from espalier.costs.distinct import distinct
from espalier.costs.pieces import _signature, pieces_of
from espalier.costs.record import record
from espalier.errors import ExportError
from espalier.export import to_onnx
from espalier.export.weights import to_safetensors
from espalier.testing.cost import check_cost


class Inverted(nn.Module):
    """An inverted residual: 16 to 64 to 16 channels."""

    def __init__(self, channels: int = 16, inner: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (b, heads, length, width)
        return F.scaled_dot_product_attention(x, x, x)


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


HEADS = (2, 4, 10, 8)  # batch 2: counts are of one


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(8, 16, (3, 5), stride=2, groups=4), (1, 8, 9, 9), 4 * 3 * 16 * 2 * 15),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (1, 6, 9, 9), 25 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 8 * 6 * 12),
        (nn.Linear(7, 5), (3, 7), 35),
        (nn.Linear(7, 5, bias=False), (1, 4, 7), 4 * 35),
        (Scaled(), HEADS, 2 * 4 * 10 * 10 * 8),
        (ByHand(), HEADS, 2 * 4 * 10 * 10 * 8),
        (
            nn.MultiheadAttention(8, 2, batch_first=True),
            None,
            5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8,
        ),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
    ],
)
def test_macs_by_hand(module: nn.Module, shape: tuple[int, ...] | None, macs: int) -> None:
    if shape is None:

        class Itself(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = module

            def forward(self, x: Tensor) -> Tensor:
                return self.attention(x, x, x)[0]

        module, shape = Itself(), (1, 5, 8)
    assert count(module, torch.randn(shape)).macs == macs


def test_counts_of_an_inverted_residual_by_hand() -> None:
    found = count(Inverted(), torch.zeros(1, 16, 8, 8))
    kernels = 16 * 64 + 64 * 9 + 64 * 16
    norms = 64 + 64 + 16
    assert found.params == kernels + 2 * norms
    assert found.macs == 64 * kernels
    # params, running mean and variance as float32, the norms' whole counter of 8 bytes
    assert found.bytes == 4 * (kernels + 4 * norms) + 3 * 8
    # the depthwise convolution needs its input, its output and the residual at once
    assert found.activation_bytes == 4 * 64 * (64 + 64 + 16)


class Freed(nn.Module):
    """A wide tensor that is dead before the next wide one is made."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x] * 8).sum(0, keepdim=True)
        return torch.cat([y] * 8).sum(0, keepdim=True)


class Kept(nn.Module):
    """The same, but the first wide tensor is used at the end."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x] * 8)
        y = wide.sum(0, keepdim=True)
        return torch.cat([y] * 8).sum(0, keepdim=True) + wide.sum(0, keepdim=True)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x.view(1, -1).relu())  # both can overwrite what they read
        return y.view(1, 2, -1)


class NotInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() - x  # x is read again: relu needs memory of its own


@pytest.mark.parametrize(
    ("module", "tensors"), [(Freed(), 9), (Kept(), 17), (InPlace(), 1), (NotInPlace(), 2)]
)
def test_peak_follows_the_life_of_tensors(module: nn.Module, tensors: int) -> None:
    x = torch.randn(1, 250)
    assert count(module, x).activation_bytes == tensors * 1000


def test_weights_are_no_activations_and_tied_ones_count_once() -> None:
    network = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    network[1].weight = network[0].weight
    assert count(network, torch.zeros(1, 50)) == Count(2500, 5000, 400, 10_000)


def test_bytes_are_the_payload_of_the_safetensors_file() -> None:
    for network in (Inverted(), nn.Linear(5, 3), nn.Sequential(nn.Embedding(5, 3), nn.GRU(3, 4))):
        data = to_safetensors(network)
        header = struct.unpack("<Q", data[:8])[0]
        assert weight_bytes(network) == len(data) - 8 - header
    half = nn.Linear(5, 3).half()
    assert weight_bytes(half) == weight_bytes(nn.Linear(5, 3))


def test_bytes_are_within_a_few_percent_of_the_onnx_file() -> None:
    network = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    model = to_onnx(network, torch.zeros(1, 16, 8, 8))
    stored = sum(len(t.raw_data) for t in onnx.load_from_string(model).graph.initializer)
    assert weight_bytes(network) == stored
    assert weight_bytes(network) < len(model) < 1.05 * weight_bytes(network)


def test_counting_changes_nothing() -> None:
    network = Inverted().train()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    generator = torch.get_rng_state()
    count(network, torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert network.training
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_what_does_not_run_is_one_line() -> None:
    with pytest.raises(ExportError, match=r"Conv2d does not run on an input of shape \(1, 5"):
        count(nn.Conv2d(3, 3, 1), torch.zeros(1, 5, 4, 4))


# --- layers ------------------------------------------------------------------------------------


def test_layers_in_order_with_shapes() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        Inverted(),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 4),
    )
    x = torch.zeros(2, 3, 16, 16)
    rows = layers(network, x)
    kinds = "conv conv norm activation depthwise norm activation conv norm add resize pool linear"
    assert [row["kind"] for row in rows] == kinds.split()
    first, add, last = rows[0], rows[9], rows[-1]
    assert (first["name"], first["kernel"], first["stride"], first["groups"]) == ("0", 3, 2, 1)
    assert (first["in_shape"], first["out_shape"]) == ([3, 16, 16], [16, 8, 8])
    assert add["name"] == "1.body.add"
    assert (last["in_shape"], last["out_shape"]) == ([16], [4])
    whole = count(network, x)
    assert sum(row["params"] for row in rows) == whole.params
    assert sum(row["macs"] for row in rows) == whole.macs


def test_a_module_called_twice_has_its_parameters_once() -> None:
    conv = nn.Conv2d(4, 4, 1)
    rows = layers(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 4, 3, 3))
    assert [row["params"] for row in rows] == [20, 0, 0]
    assert [row["macs"] for row in rows] == [144, 0, 144]


def test_extracted_supernets_have_layers_too() -> None:
    family = esp.nets.make("resnet", (1, 8, 8), 10)
    network = family.build(family.uniform(0.5))
    rows = layers(network, family.example())
    assert {"conv", "linear", "add", "pool"} <= {row["kind"] for row in rows}
    assert sum(row["macs"] for row in rows) == count(network, family.example()).macs


# --- families ------------------------------------------------------------------------------------


class Plain(esp.Family):
    """Whole networks only, with conditions and a real decision."""

    shape, classes = (2, 6, 6), 3
    space = esp.Space(
        [
            esp.ordinal("width", 4, 8),
            esp.integer("depth", 1, 3),
            esp.choice("kernel", 1, 3, when={"depth": (2, 3)}),
            esp.real("dropout", 0.0, 0.5),
        ]
    )

    def build(self, candidate: esp.Candidate) -> nn.Module:
        blocks, channels = [], 2
        for _ in range(int(candidate["depth"])):
            kernel = int(candidate.get("kernel", 3))
            blocks += [nn.Conv2d(channels, int(candidate["width"]), kernel, padding=kernel // 2)]
            blocks += [nn.ReLU()]
            channels = int(candidate["width"])
        drop = nn.Dropout(float(candidate["dropout"]))
        return nn.Sequential(*blocks, nn.Flatten(), drop, nn.Linear(channels * 36, 3))


class Unit:
    def __init__(self, name: str, *decisions: str) -> None:
        self.name, self.decisions = name, decisions


class Gated(esp.Family):
    """Units without decisions of their own, switched by a depth that only the head claims."""

    shape, classes = (2, 6, 6), 3
    space = esp.Space([esp.integer("depth", 0, 3), esp.choice("bias", False, True)])
    wrong = 0

    def block(self, i: int) -> nn.Module:
        return nn.Conv2d(2 + i, 3 + i, 3, padding=1)

    def head(self, candidate: esp.Candidate) -> nn.Module:
        width = 2 + int(candidate["depth"])
        linear = nn.Linear(36 * width + self.wrong, 3, bias=bool(candidate["bias"]))
        return nn.Sequential(nn.Flatten(), linear)

    def build(self, candidate: esp.Candidate) -> nn.Module:
        blocks = [self.block(i) for i in range(int(candidate["depth"]))]
        wrong, self.wrong = self.wrong, 0
        network = nn.Sequential(*blocks, self.head(candidate))
        self.wrong = wrong
        return network

    def units(self) -> list[Unit]:
        return [Unit("0"), Unit("1"), Unit("2"), Unit("head", "depth", "bias")]

    def unit(self, name: str, candidate: esp.Candidate) -> tuple[nn.Module, tuple[int, ...]] | None:
        if name == "head":
            width = 2 + int(candidate["depth"])
            return self.head(candidate), (width, 6, 6) if not self.wrong else (width, 6, 7)
        i = int(name)
        return (self.block(i), (2 + i, 6, 6)) if i < candidate["depth"] else None


class Lying(Gated):
    """Units that are not those of the network."""

    def unit(self, name: str, candidate: esp.Candidate) -> tuple[nn.Module, tuple[int, ...]] | None:
        found = super().unit(name, candidate)
        return (nn.Identity(), found[1]) if found and name == "1" else found


class Words(esp.Family):
    """Inputs are whole numbers: indices of words."""

    shape, classes = (5,), 2
    space = esp.Space([esp.ordinal("width", 4, 8)])

    def example(self, batch: int = 1) -> Tensor:
        return torch.arange(5).repeat(batch, 1)

    def build(self, candidate: esp.Candidate) -> nn.Module:
        width = int(candidate["width"])
        return nn.Sequential(nn.Embedding(5, width), nn.Flatten(), nn.Linear(5 * width, 2))

    def units(self) -> list[Unit]:
        return [Unit("table", "width"), Unit("head", "width")]

    def unit(self, name: str, candidate: esp.Candidate) -> tuple[nn.Module, tuple[int, ...]]:
        network = self.build(candidate)
        width = int(candidate["width"])
        return (network[0], (5,)) if name == "table" else (network[1:], (5, width))


class Alike(Words):
    """A layer behind the words takes as many numbers as there are words: not whole ones."""

    def build(self, candidate: esp.Candidate) -> nn.Module:
        table = nn.Embedding(5, int(candidate["width"]))
        head = [nn.Flatten(), nn.Linear(5 * int(candidate["width"]), 5), nn.Tanh(), nn.Linear(5, 2)]
        return nn.Sequential(table, *head)

    def units(self) -> list[Unit]:
        return [*super().units(), Unit("end")]

    def unit(self, name: str, candidate: esp.Candidate) -> tuple[nn.Module, tuple[int, ...]]:
        network = self.build(candidate)
        if name == "end":
            return network[3:], (5,)
        width = int(candidate["width"])
        return (network[0], (5,)) if name == "table" else (network[1:3], (5, width))


def test_a_table_of_few_rows_is_given_numbers_of_these() -> None:
    words = Words()  # whose own example goes to 4
    pieces = pieces_of(words)
    assert pieces.input((5,), nn.Sequential(nn.Embedding(2, 4))).tolist() == [[0, 1, 0, 1, 0]]
    assert pieces.input((5,), nn.Tanh()).is_floating_point()


FAMILIES: dict[str, Callable[[], esp.Family]] = {
    "mobilenet of several resolutions": lambda: esp.nets.make("mobilenet", (3, 16, 16), 7),
    "resnet": lambda: esp.nets.make("resnet", (3, 16, 16), 10),
    "plain": Plain,
    "gated": Gated,
    "lying": Lying,
    "words": Words,
    "words and as many numbers": Alike,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_equal_whole_networks(name: str) -> None:
    family = FAMILIES[name]()
    space = family.space
    codes = np.concatenate(
        [space.corner(False), space.corner(True), space.sample(10, np.random.default_rng(0))]
    )
    found = Counts(family).estimate_codes(codes)
    for i, candidate in enumerate(space.decode(codes)):
        whole = count(family.build(candidate), family.example())
        for metric in ("params", "macs", "bytes", "activation_bytes"):
            assert found[metric][i] == getattr(whole, metric), (metric, candidate)


def test_hidden_switches_are_found_and_false_units_given_up() -> None:
    assert type(pieces_of(Gated())).__name__ == "_Units"
    assert type(pieces_of(Lying())).__name__ == "_Networks"


@pytest.mark.parametrize("name", ["resnet", "plain", "gated", "words"])
def test_counts_conform(name: str) -> None:
    family = FAMILIES[name]()
    candidates = family.space.decode(family.space.sample(6, np.random.default_rng(1)))
    check_cost(Counts(family), candidates)


def test_distinct_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    for high, columns in ((3, [0, 2]), (3000, [0, 1, 2, 3, 4, 5, 6]), (2, []), (3, [5])):
        codes = rng.integers(0, high, (400, 7)).astype(np.int16)
        for rows in (codes, codes.astype(float), codes[:0]):
            first, kind = distinct(rows, columns)
            assert np.array_equal(rows[first[kind]][:, columns], rows[:, columns])
            assert len(first) == len(np.unique(rows[:, columns], axis=0)[: len(rows)])


def test_traced_pieces_are_known_by_code_layers_and_what_they_borrow() -> None:
    """Weights of a second call are no state of a piece, but decide what it computes."""

    def traced(width: int, slope: float = 0.0) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        made = graph.call_function(F.linear, (x, graph.get_attr("weight")))
        graph.output(graph.call_function(F.leaky_relu, (made, slope)))
        root = nn.Module()
        root.weight = nn.Parameter(torch.zeros(width, 4))
        module = fx.GraphModule(root, graph)
        del module.weight
        module.register_buffer("weight", torch.zeros(width, 4), persistent=False)
        return module

    x = torch.zeros(1, 4)
    one, same, wider, other = (
        _signature(m, x) for m in (traced(8), traced(8), traced(16), traced(8, 0.1))
    )
    assert one is not None
    assert one == same
    assert len({one, wider, other}) == 3
    foreign = traced(8)
    foreign.graph.find_nodes(op="call_function", target=F.linear)[0].target = record
    assert _signature(foreign, x) is None  # who knows what it does
