"""What leaves is plain: every file loads without Espalier and computes what the network does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.compress import Bits, Pretrained
from espalier.errors import ExportError
from espalier.export import export, to_onnx
from espalier.export import exported as exported_module
from espalier.export.weights import to_safetensors


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():  # statistics that matter
        network.train()(torch.randn(64, 3, 8, 8) * 2 + 1)
    return network


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("export")
    network = small()
    network.to(memory_format=torch.channels_last)
    real = torch.rand(70, 3, 8, 8)
    card = {"normalisation": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}}
    done = export(network, torch.zeros(1, 3, 8, 8), folder, stem="best", inputs=real, card=card)
    assert set(done.files) == {"onnx", "pt2", "safetensors", "card"}
    assert set(done.differences) == {"onnx", "pt2", "safetensors"}
    assert all(gap < 1e-5 for gap in done.differences.values())
    return folder, network


def test_only_whole_files_are_left(written: tuple[Path, nn.Module]) -> None:
    names = sorted(path.name for path in written[0].iterdir())
    assert names == ["best.json", "best.onnx", "best.pt2", "best.safetensors"]


def test_network_is_left_as_it_was(written: tuple[Path, nn.Module]) -> None:
    network = written[1]
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad for p in network.parameters())


def test_card_says_what_goes_in_and_how_to_load(written: tuple[Path, nn.Module]) -> None:
    card = json.loads((written[0] / "best.json").read_text())
    assert card["input"] == {"name": "input", "shape": ["batch", 3, 8, 8], "dtype": "float32"}
    assert card["output"]["shape"] == ["batch", 4]
    assert card["normalisation"]["std"] == [1.0, 2.0, 3.0]
    for form, entry in card["files"].items():
        path = written[0] / entry["file"]
        assert entry["bytes"] == path.stat().st_size
        assert set(entry["difference"]) == {"random", "real"}
        assert len(entry["load"]) == 3, form
        assert path.name in "\n".join(entry["load"])


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
for name in {blocked}:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " could be imported")
import numpy
inputs = numpy.load("inputs.npy")
{before}
{lines}
numpy.save("outputs.npy", numpy.asarray({after}))
"""


@pytest.mark.parametrize(
    ("form", "blocked", "before", "after"),
    [
        ("onnx", {"espalier", "torch", "onnx"}, "", "outputs"),
        (
            "pt2",
            {"espalier"},
            "import torch; inputs = torch.from_numpy(inputs)",
            "outputs.detach()",
        ),
    ],
)
def test_loads_without_espalier(
    written: tuple[Path, nn.Module], form: str, blocked: set[str], before: str, after: str
) -> None:
    """Runs the three lines of the card where Espalier can't be imported."""
    folder, network = written
    lines = json.loads((folder / "best.json").read_text())["files"][form]["load"]
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    np.save(folder / "inputs.npy", x.numpy())
    script = ALONE.format(blocked=blocked, before=before, lines="\n".join(lines), after=after)
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    got = np.load(folder / "outputs.npy")
    for name in ("inputs.npy", "outputs.npy"):
        (folder / name).unlink()
    with torch.no_grad():
        network.eval()
        wanted = network(x).numpy()
        network.train()
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_buffers_that_no_state_holds_are_left_to_the_code(tmp_path: Path) -> None:
    class Placed(nn.Module):
        """Numbers of places are made by the code, as those of transformers' BERT are."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)
            self.register_buffer("places", torch.arange(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = x + self.table(self.places)
            return found

    done = export(Placed(), torch.zeros(1, 4, 3), tmp_path, formats=["safetensors"])
    assert done.differences["safetensors"] == 0
    assert set(load_file(done.files["safetensors"])) == {"table.weight"}


def test_safetensors_hold_exactly_the_state(written: tuple[Path, nn.Module]) -> None:
    folder, network = written
    stored = load_file(folder / "best.safetensors")
    state = network.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)


def test_tied_weights_are_stored_once() -> None:
    network = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60))
    network[2].weight = network[0].weight
    data = to_safetensors(network)
    assert len(data) < 3600 * 4 * 1.2
    assert b'"2.weight":"0.weight"' in data


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).mean(1))


def test_whole_number_inputs_and_tied_weights(tmp_path: Path) -> None:
    example = torch.arange(10).reshape(2, 5)
    done = export(Tied(), example, tmp_path, inputs=torch.randint(0, 11, (9, 5)))
    assert max(done.differences.values()) < 1e-5


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_inputs_that_may_be_indices_are_not_made_up(tmp_path: Path, kind: torch.dtype) -> None:
    """Bytes come as floats, too; the card says what to give."""

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.table(x.long()).mean(1))  # type: ignore[no-any-return]

    example = torch.tensor([[0, 3, 10, 7, 1], [2, 2, 9, 0, 4]]).to(kind)
    family = Pretrained(Bytes().eval(), example, (Bits((8, 32)),))
    assert torch.equal(family.example(3), example[[0, 1, 0]])
    done = export(Bytes().eval(), family.example(2), tmp_path)
    load = json.loads(done.files["card"].read_text())["files"]["onnx"]["load"]
    assert f"a {str(kind).removeprefix('torch.')} numpy array" in load[-1]


def test_a_file_that_does_not_run_is_told_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr("espalier.export.check.open_onnx", broken)
    with pytest.raises(
        ExportError, match=r"the onnx file does not run .* no kernel for this; noth"
    ):
        export(nn.Linear(3, 2).eval(), torch.zeros(1, 3), tmp_path / "new", formats=["onnx"])
    assert not (tmp_path / "new" / "network.onnx").exists()


def test_a_network_of_one_batch_is_exported_with_it(tmp_path: Path) -> None:
    done = export(FixedBatch(), torch.zeros(2, 3, 4), tmp_path, inputs=torch.rand(7, 3, 4))
    card = json.loads(done.files["card"].read_text())
    assert card["dynamic_batch"] is False
    assert card["input"]["shape"] == [2, 3, 4]


def test_onnx_is_one_file_with_a_dynamic_batch_and_no_batch_norm() -> None:
    model = onnx.load_from_string(to_onnx(small(), torch.zeros(1, 3, 8, 8)))
    onnx.checker.check_model(model, full_check=True)
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.input[0].name == "input"
    assert model.graph.output[0].name == "output"
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_files_carry_no_path_of_the_machine(written: tuple[Path, nn.Module]) -> None:
    for path in written[0].iterdir():
        data = path.read_bytes()
        for trace in (b"site-packages", str(Path(torch.__file__).parents[1]).encode(), b"/tests/"):
            assert trace not in data, path.name


def test_means_over_places_become_pools_and_others_stay() -> None:
    """A blocked layout passes through GlobalAveragePool; what is no such mean is not touched."""

    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pooled = x.mean((2, 3), keepdim=True)
            return pooled + x.mean((1, 2), keepdim=True) + x.mean((2, 3))[..., None, None]

    model = onnx.load_from_string(to_onnx(Means(), torch.zeros(1, 3, 8, 8)))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GlobalAveragePool") == 2
    assert kinds.count("ReduceMean") == 1
    session = ort.InferenceSession(model.SerializeToString())
    x = torch.randn(2, 3, 8, 8)
    got = session.run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(got, Means()(x).numpy(), atol=1e-6)


def test_fast_onnx_keeps_modes_and_computes_the_same() -> None:
    network = small().train()
    network[1].eval()
    x = torch.randn(4, 3, 8, 8)
    session = ort.InferenceSession(to_onnx(network, x, fast=True))
    assert network.training
    assert network[0].training
    assert not network[1].training
    got = session.run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, network.eval()(x).numpy(), atol=1e-5)


def test_exporters_are_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    export(small(), torch.zeros(1, 3, 8, 8), tmp_path)
    to_onnx(small(), torch.zeros(1, 3, 8, 8), fast=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
    assert not list(recwarn)


# --- what can't be exported ------------------------------------------------------------------


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 1e9)


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (TwoOutputs(), "must return one tensor, got tuple"),
        (Branching(), "control flow"),
        (NotANumber(), "not finite"),
        (nn.Conv2d(5, 2, 1), "does not run on an example of shape"),
    ],
)
def test_refused_networks_leave_nothing(network: nn.Module, text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=text) as caught:
        export(network, torch.zeros(1, 3, 4, 4), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_says_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Did you mean 'onnx'"):
        export(small(), torch.zeros(1, 3, 8, 8), tmp_path, formats=["onx"])


@pytest.mark.parametrize(
    ("card", "text"),
    [({"files": 1}, "own entries"), ({"x": torch.zeros(1)}, "JSON"), ({"x": float("nan")}, "JSON")],
)
def test_bad_cards(card: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=text):
        export(small(), torch.zeros(1, 3, 8, 8), tmp_path, formats=["safetensors"], card=card)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_refused_and_the_old_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1, 3, 8, 8)
    export(small(), x, tmp_path, formats=["safetensors"])
    before = (tmp_path / "network.safetensors").read_bytes()
    other = to_safetensors(small(seed=1))
    monkeypatch.setattr(exported_module, "to_safetensors", lambda network: other)
    with pytest.raises(ExportError, match="computes something else"):
        export(small(), x, tmp_path, formats=["safetensors"])
    assert (tmp_path / "network.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"can't write to .*choose another folder"):
        export(small(), torch.zeros(1, 3, 8, 8), tmp_path / "file", formats=["safetensors"])
    assert (tmp_path / "file").read_text() == "mine"


FULL = """
import resource, sys, torch
from espalier.errors import ExportError
from espalier.export import export
network = torch.nn.Linear(200, 200)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    export(network, torch.zeros(1, 200), sys.argv[1], formats=sys.argv[2:])
except ExportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are of POSIX")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to let files grow, as a full disk does."""
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "safetensors", "pt2"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("can't write to")
    assert "free some space" in run.stdout
    assert len(run.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
