"""Where layers of floats meet layers of integers: places found, priced, timed over their like."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.compress import Bits, Depth, Pretrained, Widths
from espalier.costs import Counts, OnnxRuntime, PredictedLatency
from espalier.costs.context import Stopwatch
from espalier.costs.pieces import pieces_of
from espalier.costs.turn import Turn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.two(functional.relu(self.one(x))))


class Net(nn.Module):
    """A stem, two residual blocks, two heads on one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.stem(x)))
        return self.linear((self.left(x) + self.right(x)).mean((2, 3)))


PLACES = {
    "stem to blocks.0.one",
    "blocks.0.one to blocks.0.two",
    "blocks.0.two with stem",
    "blocks.0.two to blocks.1.one",
    "blocks.1.one to blocks.1.two",
    "blocks.1.two with blocks.0.two",
    "blocks.1.two to left",
    "right with left",
}


@pytest.fixture(scope="module")
def family() -> Pretrained:
    torch.manual_seed(0)
    cuts = (Widths(multiple=8, steps=2), Depth(), Bits())
    return Pretrained(Net(), torch.randn(2, 3, 6, 6), cuts, calibration=torch.randn(8, 3, 6, 6))


def turns(family: Pretrained, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Place to shape of those that a candidate has; `changes`: layer to bits, `depth_i` to 0."""
    chosen = dict(family.original)
    for name, value in changes.items():
        kind, _, place = name.partition("_")
        if kind == "depth":
            chosen[f"depth:blocks.{place}"] = value
        else:
            chosen[name] = value
    candidate = family.space.candidate(
        {k: v for k, v in chosen.items() if not _left_out(k, chosen)}
    )
    made = {u.name: family.unit(u.name, candidate) for u in family.units()}
    return {n: m[1] for n, m in made.items() if m is not None and isinstance(m[0], Turn)}


def _left_out(name: str, chosen: dict[str, Any]) -> bool:
    return any(chosen.get(f"depth:blocks.{i}") == 0 and f":blocks.{i}." in name for i in range(2))


def test_there_is_a_place_between_any_two_convolutions_that_hand_on(family: Pretrained) -> None:
    units = {u.name: u.decisions for u in family.units()}
    assert {n for n in units if " to " in n or " with " in n} == PLACES
    assert set(units["stem to blocks.0.one"]) == {
        "width:stem", "depth:blocks.0", "bits:stem", "bits:blocks.0.one",
    }  # fmt: skip
    # two readers of one tensor, which may come from the block before
    assert {n for n in units["blocks.1.two to left"] if n.startswith("bits:")} == {
        "bits:blocks.1.two", "bits:blocks.0.two", "bits:left", "bits:right",
    }  # fmt: skip


def test_numbers_turn_where_kinds_meet_and_only_there(family: Pretrained) -> None:
    bits = [n for n in family.space.names if n.startswith("bits:")]
    assert turns(family) == {}
    assert turns(family, **dict.fromkeys(bits, 8)) == {}
    shape = (16, 6, 6)
    assert turns(family, **{"bits:blocks.0.one": 8}) == {
        "stem to blocks.0.one": shape,
        "blocks.0.one to blocks.0.two": shape,
    }
    # of two readers one is enough; what both give is added
    assert turns(family, **{"bits:right": 8}) == {
        "blocks.1.two to left": shape,
        "right with left": (8, 6, 6),
    }
    thin = turns(family, **{"bits:stem": 8, "width:stem": 8})
    assert thin == {"stem to blocks.0.one": (8, 6, 6), "blocks.0.two with stem": (8, 6, 6)}


def test_behind_a_block_that_is_left_out_the_one_before_it_counts(family: Pretrained) -> None:
    mixed = {"bits:blocks.0.two": 8, "bits:blocks.0.one": 8, "bits:stem": 8}
    assert set(turns(family, **mixed)) == {
        "blocks.0.two to blocks.1.one",
        "blocks.1.two with blocks.0.two",
    }
    assert set(turns(family, **mixed, depth_1=0)) == {"blocks.1.two to left"}
    assert turns(family, **{"bits:stem": 8}, depth_0=0) == {
        "blocks.0.two to blocks.1.one": (16, 6, 6)
    }


def test_turns_count_nothing_but_time(family: Pretrained) -> None:
    rows = family.space.sample(12, np.random.default_rng(0))
    counts = Counts(family).estimate_codes(rows)
    for candidate, params in zip(family.space.decode(rows), counts["params"], strict=True):
        assert params == sum(p.numel() for p in family.build(candidate).parameters())
    assert len(pieces_of(family).scopes()) == len(family.units())
    assert np.isfinite(counts["bytes"]).all()
    weights = Pretrained(Net(), torch.randn(2, 3, 6, 6), (Bits(weights_only=True),))
    assert not any(" to " in u.name for u in weights.units())  # activations stay float


def test_a_turn_is_timed_over_two_layers_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    price = {"Conv": 1.0, "QuantizeLinear": 0.5, "DequantizeLinear": 0.25}

    def priced(watch: Stopwatch, model: bytes, x: Tensor, least: float = 0.0) -> float:
        graph = onnx.load_from_string(model).graph
        weights = {t.name for t in graph.initializer}
        nodes = [n for n in graph.node if n.input and n.input[0] not in weights]
        return sum(price.get(n.op_type, 0.0) for n in nodes)

    monkeypatch.setattr(Stopwatch, "_time", priced)
    watch = Stopwatch(OnnxRuntime(seconds=0.01))
    # from floats to integers and back again a tensor is turned once each way
    assert watch.piece(Turn(), torch.randn(1, 16, 6, 6)) == pytest.approx((0.5 + 0.25) / 2)
    assert watch.piece(Turn(), torch.randn(1, 16)) == pytest.approx(1e-4)  # nothing is blocked


@pytest.mark.usefixtures("quick_tables")
def test_the_table_knows_that_mixed_kinds_take_longer(family: Pretrained) -> None:
    """As measured: where kinds alternate turns take time, where all are of one kind none."""
    table = PredictedLatency(family, OnnxRuntime(seconds=0.01))
    table.calibrate(seed=0, limit=400)
    space = family.space
    bits = [n for n in space.names if n.startswith("bits:")]
    rows = space.encode(
        [
            space.candidate({**family.original, **dict(zip(bits, kinds, strict=True))})
            for kinds in ([32] * 8, [8] * 8, [8, 32] * 4)
        ]
    )
    terms = table.terms("latency_ms")
    turned = np.zeros(3)
    for part in terms.pieces.parts(rows):
        if part.pieces and isinstance(terms.pieces.make(part.pieces[0])[0], Turn):
            turned += part.values(np.array([terms.of(p) for p in part.pieces]))
    assert turned[0] == turned[1] == 0 < turned[2]
