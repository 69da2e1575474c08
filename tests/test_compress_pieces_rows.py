"""Pieces whose input is more than one row for each of the network's, and more than their own width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress import Bits, Pretrained, Sparsity, Widths
from espalier.compress.pieces import units
from espalier.compress.sparsity import StoredBytes, stored_bytes
from espalier.costs import Counts, OnnxRuntime, count
from espalier.costs.context import Stopwatch
from espalier.costs.pieces import pieces_of
from espalier.costs.turn import Turn
from espalier.export import to_onnx


class Tokens(nn.Module):
    """Tokens folded into the batch before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return self.b(F.relu(self.a(x.reshape(b * n, c)))).view(b, n, 5)


class Windowed(nn.Module):
    """Attention called on (windows * batch, places, channels), with what tells the windows apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        windows = len(mask)
        scores = scores.view(b // windows, windows, 4, n, n) + mask[:, None]
        return self.proj((scores.view(b, 4, n, n).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """A block of a network of windows, as Swin's."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.attn = nn.Conv2d(3, width, 1), Windowed(width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("mask", torch.zeros(16, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        cut = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.attn(cut, self.mask)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head((x + y).mean((1, 2)))


class Frames(nn.Module):
    """A network of images on each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.d(F.relu(self.c(x.flatten(0, 1)))))
        return self.head(y.mean((2, 3)).view(*x.shape[:2], -1).mean(1))


class Turned(nn.Module):
    """Tokens first, the batch behind, as torch's own transformers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.transpose(0, 1)))).mean(0)


FOLDED = {
    "tokens": (Tokens, (6, 8), (Widths(multiple=4),)),
    "windows": (Windows, (3, 8, 8), (Widths(multiple=4, least=0.5),)),
    "frames": (Frames, (5, 3, 8, 8), (Widths(multiple=1),)),
    "turned": (Turned, (6, 8), (Widths(multiple=4),)),
}


def family_of(name: str) -> Pretrained:
    make, shape, cuts = FOLDED[name]
    torch.manual_seed(0)
    return Pretrained(make().eval(), torch.randn(2, *shape), cuts)


def shapes_of(family: Pretrained) -> dict[str, tuple[int, ...]]:
    return {u.name: family.unit(u.name, family.original)[1] for u in family.units()}


def check_counts(family: Pretrained) -> None:
    """The pieces' counts against those of built networks; whole networks are not looked up."""
    rows = [family.space.corner(False), family.space.corner(True)]
    codes = np.concatenate([*rows, family.space.sample(3, np.random.default_rng(0))])
    got = Counts(family).estimate_codes(codes)
    built = [count(family.build(c), family.example()) for c in family.space.decode(codes)]
    for metric in ("macs", "params", "activation_bytes"):
        assert got[metric].tolist() == [getattr(c, metric) for c in built], metric
    assert type(pieces_of(family)).__name__ == "_Units"


@pytest.mark.parametrize("name", sorted(FOLDED))
def test_what_is_folded_into_the_batch_counts_as_often_as_it_runs(name: str) -> None:
    check_counts(family_of(name))


def test_a_piece_takes_all_the_rows_of_one_input() -> None:
    assert shapes_of(family_of("tokens")) == {"a": (6, 8), "b": (6, 16)}
    assert shapes_of(family_of("windows"))["attn"] == (16, 4, 16)
    # the head's input has the batch alone in front
    assert shapes_of(family_of("frames")) == {"c": (5, 3, 8, 8), "d": (5, 8, 8, 8), "head": (8,)}


def test_pieces_of_many_rows_run_alone_in_onnx_runtime() -> None:
    family = family_of("windows")
    runtime = OnnxRuntime(seconds=0.001, precision=1, batch=3)
    for unit in family.units():
        module, shape = family.unit(unit.name, family.original)
        x = torch.randn(3, *shape)
        assert runtime.quick(to_onnx(module, x, fast=True), x).median_ms > 0


class Mixer(nn.Module):
    """Layers over tokens: how many channels there are is no size of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.along, self.back = nn.Linear(6, 12), nn.Linear(12, 6)
        self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.back(F.gelu(self.along(self.norm(x).transpose(1, 2))))
        return self.head(F.relu(self.mlp(x + y.transpose(1, 2))))


class Alone(nn.Module):
    """Each channel a signal of its own: channels are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.along = nn.Linear(8, 8), nn.Linear(6, 12)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(1, 2)
        y = F.relu(self.along(x.reshape(-1, 6)))
        return self.head(y.view(*x.shape[:2], 12).mean(2))


@pytest.mark.parametrize("make", [Mixer, Alone])
def test_channels_beside_a_layers_own_are_those_that_are_left(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    family = Pretrained(make().eval(), torch.randn(2, 6, 8), (Widths(multiple=2),))
    widths = [{**family.original, "width:first": width} for width in (8, 4, 2)]
    assert [family.unit("along", c)[1] for c in widths] == [(8, 6), (4, 6), (2, 6)]
    check_counts(family)


def test_a_chain_of_layers_is_looked_at_and_no_model_is_kept_for_that() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1))
    family = Pretrained(chain.eval(), torch.randn(2, 3, 4, 4), (Widths(multiple=4),))
    family.units()
    assert set(family._units._made) == {"width:0", "width:2"}
    assert not family._units._runs


@pytest.mark.parametrize(
    ("name", "piece", "shape"),
    [
        ("tokens", "a", (2 * 6, 8)),
        ("windows", "attn", (2 * 16, 4, 16)),
        ("frames", "d", (2 * 5, 8, 8, 8)),
        ("turned", "a", (6, 2, 8)),
    ],
)
def test_pieces_are_timed_on_what_they_take_in_the_network(
    name: str, piece: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, ...]] = []

    def note(watch: Stopwatch, model: bytes, x: Tensor, least: float = 0.0) -> float:
        timed.append(tuple(x.shape))
        return 1.0

    monkeypatch.setattr(Stopwatch, "_time", note)
    family = family_of(name)
    pieces = pieces_of(family)
    parts = pieces.parts(family.space.corner(True))
    made = {p.unit: p for part in parts for p in part.pieces}
    Stopwatch(OnnxRuntime(batch=2)).piece(*pieces.make(made[piece]))
    assert timed[0] == shape


class Pooled(nn.Module):
    """Attention of one probe over all places, as in the heads of image encoders."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.probe = first, nn.Parameter(torch.randn(1, 1, 16))
        self.stem = nn.Linear(8, 16)
        self.pool = nn.MultiheadAttention(16, 4, batch_first=first)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        probe = self.probe.expand(len(x), 1, 16)
        if not self.first:
            x, probe = x.transpose(0, 1), probe.transpose(0, 1)
        x = self.pool(probe, x, x)[0]
        return self.head(x.flatten(0, 1))


@pytest.mark.parametrize("first", [True, False])
def test_keys_have_as_many_rows_as_queries(first: bool) -> None:
    torch.manual_seed(0)
    family = Pretrained(Pooled(first).eval(), torch.randn(2, 6, 8), (Widths(multiple=4),))
    pieces = pieces_of(family)
    parts = pieces.parts(family.space.corner(True))
    made = {p.unit: p for part in parts for p in part.pieces}
    watch = Stopwatch(OnnxRuntime(batch=4, seconds=0.01, precision=0.5))
    assert watch.piece(*pieces.make(made["pool"])) > 0


def test_few_copies_of_a_large_model_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Pooled(True).eval(), torch.randn(2, 6, 8)
    whole = Counts(Pretrained(model, x, (Widths(multiple=2),)))
    monkeypatch.setattr(units, "_ROOM", 1.0)
    family = Pretrained(model, x, (Widths(multiple=2),))
    few = Counts(family)
    rows = family.space.enumerate()
    assert (few.estimate_codes(rows)["bytes"] == whole.estimate_codes(rows)["bytes"]).all()
    assert len(family._units._runs) <= 2


def test_numbers_turn_on_all_frames() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 5, 3, 8, 8)
    cuts = (Widths(multiple=4), Bits())
    family = Pretrained(Frames().eval(), example, cuts, calibration=example)
    candidate = {**family.original, "bits:c": 8}
    found = [family.unit(u.name, candidate) for u in family.units() if " to " in u.name]
    (turn, shape) = next(f for f in found if f is not None)
    assert isinstance(turn.module, Turn)
    assert shape == (5, 8, 8, 8)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(F.relu(self.a(x)))))


class Tied(nn.Module):
    """Two layers of one weight in a module that is one piece, as it multiplies on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.b(x).transpose(-2, -1)


@pytest.mark.parametrize("make", [Twice, Tied])
def test_zeros_of_a_weight_are_left_out_once(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    cuts = (Sparsity(patterns=(), shares=(0.25,)),)
    family = Pretrained(make().eval(), torch.randn(2, 8, 8), cuts)
    for name in family.space.names:
        candidate = family.space.candidate({**family.original, name: 0.25})
        network = family.build(candidate)
        dense = count(network, family.example()).bytes
        weights = [p for p in network.parameters() if p.dim() > 1]
        saved = sum(4 * p.numel() - stored_bytes(p) for p in weights)
        assert StoredBytes(family).estimate([candidate])["stored_bytes"][0] == dense - saved


class Levels(nn.Module):
    """One convolution for all levels with a norm for each, as in the heads of detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(x.mean((2, 3)))


def test_a_norm_behind_a_shared_layer_holds_its_own_weights() -> None:
    torch.manual_seed(0)
    check_counts(Pretrained(Levels().eval(), torch.randn(2, 3, 8, 8), (Widths(multiple=2),)))
