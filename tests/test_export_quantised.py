"""Integers in ONNX compute what fake quantisation computes, in the runtime's integer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from espalier.compress.ranges import calibrate
from espalier.costs import OnnxRuntime
from espalier.costs.count import count
from espalier.costs.onnx_file import price_onnx
from espalier.errors import EspalierError, ExportError
from espalier.export import export, to_onnx
from espalier.export.quantisers import (
    Quantised,
    Quantiser,
    fake_quantize,
    quantised,
    round_output,
    unquantised,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def ran(model: bytes, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": x.numpy()})[0])


def kernels(model: bytes, folder: Path) -> list[str]:
    """The operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


class Residual(nn.Module):
    """Convolutions with a batch-norm, a shortcut, and a pool before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.rest = nn.Identity()
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.rest(functional.relu(self.norm(self.conv(x)) + x))
        return self.linear(x.mean((2, 3)))


def integer_conv(layer: Quantised, x: Tensor) -> np.ndarray:
    """The layer by hand: whole numbers, one multiplication at the end."""
    quantiser = layer.input_quantiser
    assert isinstance(quantiser, Quantiser)
    s, z = float(quantiser.scale), int(quantiser.zero_point)
    whole = np.clip(np.round(x.numpy().astype(np.float32) * np.float32(1 / s)) + z, 0, 255) - z
    scales = layer.weight_scale.numpy().astype(np.float64)
    most = 2 ** (layer.bits - 1) - 1
    flat = layer.weight.detach().flatten(1).numpy()
    weight = np.clip(np.round(flat / scales[:, None].astype(np.float32)), -most, most)
    patches = functional.unfold(
        torch.from_numpy(whole), layer.kernel_size, 1, layer.padding
    ).numpy()
    out = np.einsum("oi,bip->bop", weight.astype(np.int64), patches.astype(np.int64))
    out = out * (s * scales)[:, None] + layer.bias.detach().numpy()[:, None]
    return out.reshape(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("bits", [3, 8])
def test_a_layer_computes_what_whole_numbers_compute(bits: int) -> None:
    plain = nn.Conv2d(3, 8, 3, padding=1)
    layer = quantised(plain, bits)
    x = torch.randn(4, 3, 6, 6)
    calibrate(layer, x)
    np.testing.assert_allclose(layer(x).detach(), integer_conv(layer, x), atol=2e-5)
    back = unquantised(layer)
    assert type(back) is nn.Conv2d
    assert torch.equal(back(x), plain(x))
    assert set(back.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_of_integers_runs_as_integers(fast: bool, tmp_path: Path) -> None:
    network = Residual().eval()
    nn.init.uniform_(network.norm.weight, -1.5, 1.5)  # folded into the weights, signs too
    nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    nn.init.normal_(network.norm.running_mean)
    x = torch.randn(32, 3, 8, 8)
    float_outputs = network(x).detach()
    for name in ("stem", "conv", "linear"):
        setattr(network, name, quantised(getattr(network, name), 8))
    for name in ("act", "norm", "rest"):
        round_output(getattr(network, name))
    calibrate(network, x)
    model = to_onnx(network, x[:1], fast=fast)
    onnx.checker.check_model(onnx.load_from_string(model))
    wanted = network(x).detach()
    spread = float(wanted.abs().max())
    assert np.abs(ran(model, x) - wanted.numpy()).max() < 0.02 * spread
    assert (wanted - float_outputs).abs().max() < 0.1 * spread
    found = kernels(model, tmp_path)
    assert found.count("QLinearConv") == 2
    assert "QGemm" in found
    assert "Conv" not in found
    weights = {t.name: t.data_type for t in onnx.load_from_string(model).graph.initializer}
    assert weights["stem.weight_quantised"] == onnx.TensorProto.INT8
    assert onnx.TensorProto.UINT8 in weights.values()
    assert not any(name.startswith("espalier") for name in weights)


def test_tensors_between_layers_are_converted_once(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    for i in (0, 2, 6):
        network[i] = quantised(network[i], 8)
    round_output(network[3])
    x = torch.randn(16, 3, 8, 8)
    calibrate(network, x)
    found = kernels(to_onnx(network, x[:1], fast=True), tmp_path)
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") == 0
    assert "QLinearGlobalAveragePool" in found


@pytest.mark.parametrize(("bits", "width"), [(2, 4), (4, 4), (8, 8)])
def test_weights_alone_are_packed(bits: int, width: int) -> None:
    linear = nn.Linear(70, 33)
    layer = quantised(linear, bits, block=32)
    x = torch.randn(5, 7, 70)
    rounded = layer.rounded_weight().detach().numpy()
    for outputs in np.split(rounded, 33):
        for start in range(0, 70, 32):
            block = outputs[0, start : start + 32]
            assert len(np.unique(block)) <= 2**bits - 1
    by_hand = x.numpy() @ rounded.T + linear.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach(), by_hand, atol=1e-5)
    model = to_onnx(nn.Sequential(layer), x, fast=True)
    np.testing.assert_allclose(ran(model, x), by_hand, atol=1e-5)
    graph = onnx.load_from_string(model).graph
    packed = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == 2]
    assert [array.shape for array in packed] == [(33, 3, 32 * width // 8)]


def test_bytes_are_those_of_the_file() -> None:
    network = nn.Sequential(nn.Conv2d(48, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    x = torch.randn(2, 48, 7, 7)
    for i in (0, 2):
        network[i] = quantised(network[i], 8)
    calibrate(network, x)
    counted, file = count(network, x).bytes, len(to_onnx(network, x, fast=True))
    weights = 9 * (48 * 64 + 64 * 64)
    assert counted == weights + 2 * (4 * 64 + 4 * 64)  # scales and biases
    assert counted < file < 1.07 * counted
    network[0] = quantised(unquantised(network[0]), 4)
    assert count(network, x).bytes == counted - 9 * 48 * 64 // 2
    packed = nn.Sequential(quantised(nn.Linear(256, 256), 4, block=32))
    counted = count(packed, torch.randn(1, 256)).bytes
    assert counted == 256 * 256 // 2 + 4 * 256 * 8 + 4 * 256
    assert counted < len(to_onnx(packed, torch.randn(1, 256), fast=True)) < 1.03 * counted


def test_a_file_of_integers_is_priced_like_its_network(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    before = count(network, torch.zeros(1, 3, 8, 8))
    network[0], network[3] = quantised(network[0], 8), quantised(network[3], 8)
    calibrate(network, x)
    path = tmp_path / "whole.onnx"
    path.write_bytes(to_onnx(network, x[:1], fast=True))
    found = price_onnx(path, OnnxRuntime(seconds=0.01))
    assert found["params"].value == before.params
    assert found["macs"].value == before.macs
    assert found["activation_bytes"].value == before.activation_bytes
    packed = nn.Sequential(quantised(nn.Linear(64, 5), 4, block=32))
    path.write_bytes(to_onnx(packed, torch.randn(1, 64), fast=True))
    assert price_onnx(path, OnnxRuntime(seconds=0.01))["params"].value == 64 * 5 + 5


def test_counts_see_one_layer_and_no_quantisers() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    before = count(plain, x)
    plain[0] = quantised(plain[0], 8)
    after = count(plain, x)
    assert (after.params, after.macs) == (before.params, before.macs)
    assert after.activation_bytes == before.activation_bytes


def test_gradients_pass_inside_the_range_only() -> None:
    quantiser = Quantiser()
    quantiser.set_range(-1.0, 2.0)
    x = torch.tensor([-3.0, -0.5, 0.3, 1.9, 4.0], requires_grad=True)
    quantiser(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    layer = quantised(nn.Linear(4, 3), 4)
    layer(torch.randn(2, 4)).square().sum().backward()
    assert float(layer.weight.grad.abs().sum()) > 0
    quantiser.set_range(0.5, 2.0)  # zero is a level in any case
    assert float(quantiser(torch.zeros(1))) == 0.0


@pytest.mark.parametrize(("zero", "scale"), [(0, 0.05), (128, 0.031), (255, 0.0123456)])
def test_rounding_is_that_of_torch_to_the_bit(zero: int, scale: float) -> None:
    torch.manual_seed(0)
    step, at = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    edges = (torch.arange(-600, 600) / 2.0 - zero) * step  # halves are rounded to even
    flat = torch.cat([3 * torch.randn(2016), edges])
    one = flat.reshape(2, 4, 6, 67).to(memory_format=torch.channels_last).requires_grad_()
    two = one.detach().clone().requires_grad_()
    wanted = torch.fake_quantize_per_tensor_affine(one, step, at, 0, 255)
    found = fake_quantize(two, step, at, 255)
    assert torch.equal(found, wanted)
    grad = torch.randn_like(one)
    wanted.backward(grad)
    found.backward(grad)
    assert torch.equal(two.grad, one.grad)


def test_files_of_integers_are_compared_and_wrong_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(64, 12)
    network[0], network[2] = quantised(network[0], 8), quantised(network[2], 8)
    calibrate(network, x)
    made = export(network, x[:1], tmp_path, inputs=x, formats=("onnx", "pt2"))
    assert made.differences["onnx"] < 0.02
    assert made.differences["pt2"] < 1e-5
    got = ran(made.files["onnx"].read_bytes(), x[:7])
    np.testing.assert_allclose(got, network(x[:7]).detach(), atol=0.02)
    before = made.files["onnx"].read_bytes()
    monkeypatch.setattr("espalier.export.check.INTEGERS", 0.0)
    with pytest.raises(ExportError, match="computes something else"):
        export(network, x[:1], tmp_path, formats=("onnx",))
    assert made.files["onnx"].read_bytes() == before


def test_only_plain_layers_are_quantised() -> None:
    with pytest.raises(EspalierError, match="got ConvTranspose2d"):
        quantised(nn.ConvTranspose2d(3, 3, 3), 8)
    with pytest.raises(EspalierError, match="weights alone of linear layers"):
        quantised(nn.Conv2d(3, 3, 3), 4, block=32)
