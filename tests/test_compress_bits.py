"""Bits a layer: decisions found, tensors rounded in the right places, bytes and pieces priced."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.compress.bits import Bits
from espalier.compress.pretrained import Pretrained
from espalier.compress.ranges import _sample, best_range, calibrate
from espalier.costs import Counts, OnnxRuntime
from espalier.costs.context import Stopwatch
from espalier.costs.count import count
from espalier.costs.record import record
from espalier.costs.work import FEATURES, features, fingerprint
from espalier.errors import DataError, EspalierError
from espalier.export import to_onnx
from espalier.export.quantisers import Quantised, Quantiser, quantised


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block whose activation is one module, called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """A stem, two blocks, a pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


LAYERS = [
    "stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "linear",
]  # fmt: skip


def net() -> Net:
    """With batch-norms that have seen something."""
    made = Net().train()
    for _ in range(3):
        made(2 * torch.randn(16, 1, 8, 8))
    return made.eval()


def all_at(bits: int, names: list[str] = LAYERS) -> dict[str, int]:
    return {f"bits:{name}": bits for name in names}


def operators(model: bytes, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_every_layer_has_a_decision_that_ends_in_float() -> None:
    bound = Bits((8, 4)).bind(net(), torch.randn(2, 1, 8, 8))
    assert [d.name for d in bound.decisions] == [f"bits:{name}" for name in LAYERS]
    assert all(d.options == (4, 8, 32) for d in bound.decisions)
    assert bound.layers() == {name: (f"bits:{name}",) for name in LAYERS}
    assert bound.simulated == (4,)
    assert "4 bits are simulated" in bound.note
    assert Bits().bind(net(), torch.randn(2, 1, 8, 8)).note == ""
    assert bound.ignored == ()


def test_a_whole_network_of_integers_leaves_them_only_at_its_end(tmp_path: Path) -> None:
    model, x = net(), torch.randn(64, 1, 8, 8)
    bound = Bits(calibration=x).bind(model, x[:1])
    whole = copy.deepcopy(model)
    bound.apply(whole, all_at(8))
    hooked = {n for n, m in whole.named_modules() if isinstance(m, Quantiser)}
    # no activation that runs twice; sums at the block's end, convolutions behind their norm
    assert {n for n in hooked if "output" in n} == {
        "stem.1.output_quantiser",
        *(f"blocks.{i}.{part}output_quantiser" for i in (0, 1) for part in ("", "bn2.")),
    }
    found = operators(to_onnx(whole, x[:1], fast=True), tmp_path)
    assert (found.count("QLinearConv"), found.count("QLinearAdd")) == (5, 2)
    assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (1, 0)
    session = ort.InferenceSession(to_onnx(whole, x[:1], fast=True))
    got = session.run(None, {"input": x.numpy()})[0]
    wanted, exact = whole(x).detach(), model(x).detach()
    assert np.sqrt(np.square(got - wanted.numpy()).mean()) < 0.02 * float(wanted.std())
    assert float((wanted - exact).square().mean().sqrt()) < 0.1 * float(exact.std())


def test_the_model_itself_is_left_and_float_stays_float() -> None:
    model, x = net(), torch.randn(4, 1, 8, 8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    family = Pretrained(model, x, (Bits(),), calibration=x)
    assert torch.equal(family.build(family.original)(x), model(x))
    mixed = family.build({**family.original, "bits:blocks.0.conv2": 8})
    kinds = {n for n, m in mixed.named_modules() if isinstance(m, Quantised)}
    assert kinds == {"blocks.0.conv2"}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(isinstance(m, Quantised) for m in model.modules())


def test_fewer_bits_are_further_off() -> None:
    model, x = net(), torch.randn(64, 1, 8, 8)
    bound = Bits((2, 4, 8), calibration=x).bind(model, x[:1])
    off = []
    for bits in (8, 4, 2):
        cut = copy.deepcopy(model)
        bound.apply(cut, all_at(bits))
        off.append(float((cut(x) - model(x)).detach().square().mean()))
    assert off[0] < off[1] / 10 < off[2] / 10


def test_counts_of_pieces_are_those_of_the_built_network() -> None:
    x = torch.randn(2, 1, 8, 8)
    family = Pretrained(net(), x, (Bits((4, 8)),))
    codes = family.space.sample(6, np.random.default_rng(0))
    table = Counts(family).estimate_codes(codes)
    for i, candidate in enumerate(family.space.decode(codes)):
        found = count(family.build(candidate), x)
        for name in ("params", "macs", "bytes"):
            assert table[name][i] == getattr(found, name)
    float_bytes = count(family.model, x).bytes
    assert table["bytes"].max() < float_bytes


def test_what_is_left_alone_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.twice = nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8, bias=False)
            self.twin = nn.Linear(8, 8, bias=False)
            self.twin.weight = self.tied.weight
            self.up = nn.ConvTranspose1d(4, 4, 1)
            self.around = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x)[0]
            x = self.twin(self.tied(self.twice(self.twice(x))))
            return self.last(self.around(self.up(x)))

    model, x = Odd().eval(), torch.randn(2, 4, 8)
    bound = Bits().bind(model, x)
    assert bound.names == ("last",)
    reasons = {row.layer: row.reason for row in bound.ignored}
    assert "without calling" in reasons["attention.out_proj"]
    assert "more than once" in reasons["twice"]
    assert "shared with twin" in reasons["tied"]
    assert "ConvTranspose1d" in reasons["up"]
    assert "pads by 'circular'" in reasons["around"]
    alone = Bits((4,), weights_only=True).bind(net(), torch.randn(2, 1, 8, 8))
    assert alone.names == ("linear",)
    assert "only packed for linear" in alone.ignored[0].reason


def test_settings_that_mean_nothing_are_refused() -> None:
    for options in ((1,), (16,), (), (True,)):
        with pytest.raises(EspalierError, match="from 2 to 8"):
            Bits(options)
    with pytest.raises(EspalierError, match=r"unknown layer 'stem\.1\.x'.*Did you mean"):
        Bits(layers=["stem.1.x"]).bind(net(), torch.randn(1, 1, 8, 8))
    only = Bits(layers=["linear"]).bind(net(), torch.randn(1, 1, 8, 8))
    assert only.names == ("linear",)


def test_ranges_see_every_place_of_a_tensor() -> None:
    """A stride of the number of columns would see one column alone."""
    x = torch.zeros(1, 32, 64, 32)
    x[..., 1:31] = torch.randn(1, 32, 64, 30)
    x[..., 5] = 40.0
    seen = _sample(x)
    assert (seen == 40.0).mean() == pytest.approx(1 / 32, rel=0.2)
    assert (seen == 0.0).mean() == pytest.approx(2 / 32, rel=0.2)


def test_ranges_lose_least() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=20_000), [-30.0, 25.0]])
    low, high = best_range(values)
    assert low > -30.0 * 0.99

    def lost(bottom: float, top: float) -> float:
        quantiser = Quantiser()
        quantiser.set_range(bottom, top)
        x = torch.from_numpy(values).float()
        return float((quantiser(x) - x).square().mean())

    assert lost(low, high) < lost(-30.0, 25.0)
    shares = np.linspace(0.3, 1.0, 71)
    assert lost(low, high) < 1.02 * min(lost(-30.0 * s, 25.0 * s) for s in shares)
    assert best_range(np.zeros(4)) == (0.0, 1.0)
    layer = quantised(nn.Linear(3, 2), 8)
    calibrate(layer, torch.tensor([[0.0, 2.0, -1.0]]))
    assert float(layer.input_quantiser.scale) == pytest.approx(3 / 255)
    assert int(layer.input_quantiser.zero_point) == 85
    with pytest.raises(DataError, match="not finite"):
        calibrate(layer, torch.tensor([[0.0, float("nan"), 1.0]]))
    with pytest.raises(DataError, match="at least one input"):
        calibrate(layer, torch.zeros(0, 3))


def test_pieces_of_integers_are_other_work() -> None:
    x = torch.randn(1, 16, 8, 8)
    plain = nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), nn.ReLU())
    whole = nn.Sequential(quantised(plain[0], 8), nn.ReLU())
    runs = [record(network, x) for network in (plain, whole)]
    assert fingerprint(runs[0]) != fingerprint(runs[1])
    one, other = (dict(zip(FEATURES, features(run), strict=True)) for run in runs)
    assert one["integer_macs_16"] == other["dense_macs_16"] == 0
    assert one["dense_macs"] == 64 * 9 * 16 * 20
    assert other["integer_macs_16"] == one["dense_macs_16"] == 64 * 9 * 16 * 32
    watch = Stopwatch(OnnxRuntime(seconds=0.01))
    assert watch.piece(whole, x) > 0
    assert watch.piece(nn.Sequential(quantised(nn.Linear(8, 4), 8)), torch.randn(1, 8)) > 0


def test_quantised_networks_train_and_take_new_ranges() -> None:
    model, x = net(), torch.randn(64, 1, 8, 8)
    labels = torch.arange(64) % 10
    family = Pretrained(model, x, (Bits((3,)),), calibration=x)
    cut = family.build(family.space.decode(family.space.corner(False))[0])
    optimiser = torch.optim.SGD(cut.parameters(), lr=0.05)
    start = functional.cross_entropy(cut(x), labels)
    for _ in range(15):
        optimiser.zero_grad()
        functional.cross_entropy(cut(x), labels).backward()
        optimiser.step()
    assert functional.cross_entropy(cut(x), labels) < start
    twin = copy.deepcopy(cut)
    calibrate(twin, 3 * x)
    assert float(twin.stem[0].input_quantiser.scale) > 2 * float(cut.stem[0].input_quantiser.scale)
    assert torch.equal(twin.linear.weight, cut.linear.weight)
    with torch.no_grad():
        twin.linear.weight.mul_(4)  # scales follow
    with torch.inference_mode():
        twin(x)
    twin.load_state_dict(twin.state_dict())  # what was fitted in there can be written to
    torch.testing.assert_close(twin.linear.rounded_weight(), 4 * cut.linear.rounded_weight())
    loaded = family.build(family.space.decode(family.space.corner(False))[0])
    loaded.load_state_dict(twin.state_dict())
    assert torch.equal(loaded(x), twin(x))
