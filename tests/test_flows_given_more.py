"""Models that a user may give to shrink: norms of a perceptron, attention as a file, transformers'."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import espalier as esp
from espalier.cli import app
from espalier.errors import DataError, EspalierError
from espalier.export.quiet import quiet
from espalier.flows.files import from_file
from shrink_toys import task

pytest.importorskip("ortools")

ROWS = 5  # another batch than any file is exported with


class Perceptron(nn.Sequential):
    """Fully connected layers with a norm of vectors."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip


class Heads(nn.Module):
    """Self-attention with reshapes to heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, n, 16))
        return out


class Vision(nn.Module):
    """A transformer of 1 block on patches, with a token for the class."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 17, 16))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(16) for _ in range(3))
        self.att = Heads() if own else nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.place
        y = self.norm1(x)
        x = x + (self.att(y) if isinstance(self.att, Heads) else self.att(y, y, y)[0])
        x = x + self.mlp(self.norm2(x))
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


@cache
def model(name: str) -> nn.Module:
    """A model with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    made = {"mlp": Perceptron, "own": lambda: Vision(True), "torch": lambda: Vision(False)}[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.out_proj.bias)  # the exporter leaves out zeros
    return made.eval()


def saved(folder: Path, name: str, how: str, batch: int = 2) -> Path:
    """The model as a file: "pt2" or "onnx" (torch's exporter) or "traced" (its older one)."""
    path = folder / f"{name}.{'pt2' if how == 'pt2' else 'onnx'}"
    x, free = torch.randn(abs(batch), 1, 8, 8), ({0: torch.export.Dim("batch")},)
    dynamic = free if batch > 0 else None  # a negative batch is a fixed one
    with quiet():
        if how == "pt2":
            torch.export.save(torch.export.export(model(name), (x,), dynamic_shapes=dynamic), path)
        elif how == "onnx":
            torch.onnx.export(
                model(name), (x,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False
            )
        else:
            axes = {"x": {0: "batch"}} if dynamic else None
            torch.onnx.export(
                model(name), (x,), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes
            )
    return path


def shrunk(given: Any, out: Path, **within: str) -> esp.Shrunk:
    return esp.shrink(
        given, task(), within=within, solver="allocate", repair=False, baselines=False,
        decisions=(esp.compress.Widths(multiple=1, steps=4),), budget="10 trials",
        on=esp.costs.OnnxRuntime(seconds=0.01, precision=1), seed=1, out=out,
    )  # fmt: skip


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def same(one: nn.Module, two: nn.Module) -> None:
    x = torch.randn(ROWS, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("how", "batch"), [("pt2", 2), ("pt2", -2), ("traced", 2)])
def test_a_perceptron_with_norms_is_shrunk_from_a_file(
    tmp_path: Path, how: str, batch: int
) -> None:
    path = saved(tmp_path, "mlp", how, batch)
    read = from_file(path)
    assert [type(m) for m in read.modules()].count(nn.BatchNorm1d) == 2
    same(read, model("mlp"))
    found = shrunk(path, tmp_path / "run", params="60%")
    assert params(found.network()) <= 0.6 * params(model("mlp"))
    assert found.network()(torch.randn(ROWS, 1, 8, 8)).shape == (ROWS, 10)


def test_weights_beside_an_onnx_file_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far").mkdir()
    path = saved(tmp_path, "mlp", "onnx")
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0
    )
    assert (tmp_path / "w.data").is_file()
    monkeypatch.chdir(tmp_path / "far")
    same(from_file(path), model("mlp"))
    same(from_file(Path(os.path.relpath(path))), model("mlp"))
    (tmp_path / "w.data").unlink()
    with pytest.raises(DataError, match=r"keeps its weights in 'w\.data'.*same folder") as caught:
        from_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["own", "torch"])
@pytest.mark.parametrize("how", ["onnx", "traced"])
def test_attention_is_read_from_an_onnx_file(tmp_path: Path, name: str, how: str) -> None:
    read = from_file(saved(tmp_path, name, how))
    same(read, model(name))
    kinds = [type(m) for m in read.modules()]
    assert kinds.count(nn.LayerNorm) == 3
    # a product and the bias that is added to it are one layer
    linear = [m for m in read.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == (7 if name == "own" else 5)
    assert all(m.bias is not None for m in linear)
    names = {n for n, m in read.named_modules() if isinstance(m, nn.Linear)}
    assert {"mlp.0", "mlp.2", "head"} <= names


def test_attention_is_shrunk_from_an_onnx_file(tmp_path: Path) -> None:
    path = saved(tmp_path, "own", "onnx")
    found = shrunk(path, tmp_path / "run", macs="70%")
    costs = found.original.metrics["macs"].value, found.best.metrics["macs"].value
    assert costs[1] <= 0.7 * costs[0]
    assert found.network()(torch.randn(ROWS, 1, 8, 8)).shape == (ROWS, 10)


@pytest.mark.parametrize(("name", "how"), [("torch", "pt2"), ("torch", "onnx")])
def test_a_fixed_batch_says_how_to_export(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    path = saved(tmp_path, name, how, batch=-1)
    with pytest.raises(EspalierError, match=r"batch of 1 only.*torch\.export\.Dim") as caught:
        shrunk(path, tmp_path / "run", params="70%")
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


def test_rows_that_a_fixed_batch_mixes_up_are_not_taken(tmp_path: Path) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(10, -1).mean(1).expand(2, 10)  # runs on 2 rows, of one image or more

    with quiet():
        program = torch.export.export(Mixing(), (torch.randn(2, 1, 8, 10),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(EspalierError, match="batch of 2 only"):
        esp.shrink(
            tmp_path / "m.pt2", task(), within={"params": "70%"}, out=tmp_path / "run",
            example=torch.randn(2, 1, 8, 10),
        )  # fmt: skip


def test_an_operator_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Hardmax", ["x"], ["y"])
    sides = [[value(n, onnx.TensorProto.FLOAT, [2, 3])] for n in "xy"]
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", *sides))
    made.ir_version = 10
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(DataError, match=r"'Hardmax' can't be read.*LayerNormalization") as caught:
        from_file(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_the_guide_names_every_operator_that_is_read() -> None:
    from espalier.flows.onnx_operators import OPERATORS

    page = (Path(__file__).parent.parent / "docs/howto/shrink.md").read_text()
    assert f"`{', '.join(OPERATORS)}`" in " ".join(page.split())


def test_a_model_of_transformers_is_taken_by_its_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=32, num_labels=10,
    )  # fmt: skip
    original = transformers.ViTForImageClassification(config).eval()
    found = shrunk(original, tmp_path / "run", params="70%")
    network, x = found.network(), torch.randn(ROWS, 1, 8, 8)
    assert params(network) <= 0.7 * params(original)
    assert found.to_json()["title"].startswith("vitforimageclassification made smaller")
    assert "espalier" not in {type(m).__module__.split(".")[0] for m in network.modules()}
    logits = network(x)
    assert type(logits) is Tensor
    assert logits.shape == (ROWS, 10)
    with torch.no_grad():
        assert torch.equal(found.network(found.original)(x), original(x).logits)
    runs = esp.export.to_onnx(network, x)
    session = onnxruntime.InferenceSession(runs)
    out = session.run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), logits.detach(), rtol=1e-3, atol=1e-4)


# --- a user's own file that fails --------------------------------------------------------------

FAILING = """
import torch


def raising():
    return torch.zeros(2) @ torch.zeros(3)


def sized(shape, classes):
    raise ValueError(f"no sizes for {classes}\\nand more")


def wanting(depth):
    return None
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["failing.py:raising", "RuntimeError: "]),
        ("sized", ["failing.py:sized", "ValueError: no sizes for 10"]),
        ("wanting", ["failing.py:wanting", "TypeError: ", "shape and classes"]),
    ],
)
def test_a_function_that_raises_is_one_line(tmp_path: Path, name: str, words: list[str]) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    refused(tmp_path / "failing.py", name, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", ["broken.py", "ZeroDivisionError: division by zero"]),
        ("def make(:", ["broken.py", "SyntaxError: "]),
        ("import no_such_package_at_all", ["broken.py", "ModuleNotFoundError: "]),
    ],
)
def test_a_file_that_raises_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "broken.py").write_text(text)
    refused(tmp_path / "broken.py", "make", words)


def refused(path: Path, name: str, words: list[str]) -> None:
    given = ["shrink", f"{path}:{name}", "--task", "digits", "--max", "bytes=50%", "--quiet"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_a_program_exported_while_it_trained_evaluates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.Dropout2d(0.5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(288, 4),
    ).train()
    x = torch.randn(2, 1, 8, 8)
    batch = torch.export.Dim("b")
    torch.export.save(
        torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2"
    )
    read = from_file(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.allclose(read(x), model.eval()(x), atol=1e-6)
        read.train()
        assert not torch.equal(read(x), read(x))
