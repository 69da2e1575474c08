"""Timing, prediction from pieces, and ONNX files priced. No assertion is on how long things take:
the clock and the runtime are stood in for where numbers matter."""

from __future__ import annotations

import gc
import json
import pickle
import time
import weakref
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.costs import (
    BusyMachine,
    MeasuredLatency,
    OnnxRuntime,
    PredictedLatency,
    Timing,
    count,
    machine,
    price_onnx,
    timing,
)
from espalier.costs.chain import chain
from espalier.costs.context import Stopwatch
from espalier.costs.filler import FILLERS, Filler, choose
from espalier.costs.machine import Snapshot, load_between
from espalier.costs.onnx_file import _record, _set_batch
from espalier.costs.timing import clock, spread
from espalier.costs.work import FEATURES
from espalier.errors import DataError, EspalierError
from espalier.export import to_onnx
from espalier.testing.cost import check_cost

# --- the clock -----------------------------------------------------------------------------------


class Clock:
    """Time that passes only when something runs, as long as it is told."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now, self.runs, self._durations = 0.0, 0, durations

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter

    def run(self) -> None:
        self.now += next(self._durations)
        self.runs += 1


def timed(monkeypatch: pytest.MonkeyPatch, durations: Iterator[float], **how: Any) -> Timing:
    fake = Clock(durations)
    monkeypatch.setattr(timing, "time", fake)
    return clock(fake.run, **how)


def forever(value: float) -> Iterator[float]:
    while True:
        yield value


def test_short_runs_are_timed_in_samples_of_a_tenth_of_a_millisecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = timed(monkeypatch, forever(7e-6))
    assert found.repeats == 15  # 15 * 7 us >= 100 us
    assert found.median_ms == pytest.approx(7e-3)
    assert found.p90_ms == pytest.approx(7e-3)
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert found.runs == found.samples * found.repeats
    assert found.samples == timing.LEAST


def test_noise_is_timed_longer_until_the_median_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noisy = iter(lambda: 1e-3 * float(rng.lognormal(0, 0.2)), None)
    found = timed(monkeypatch, noisy, precision=0.02, seconds=60)
    assert found.repeats in (1, 2)
    assert found.samples > 100
    assert found.spread <= 0.02
    assert found.median_ms == pytest.approx(1.0, rel=0.06)
    assert found.p90_ms > 1.1 * found.median_ms


def test_the_cap_ends_what_is_never_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    wild = iter(lambda: float(rng.choice([1e-3, 5e-3])), None)
    found = timed(monkeypatch, wild, precision=1e-6, seconds=0.5)
    assert found.spread > 0.02
    assert found.samples < 500


def test_spread_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        x = np.sort(rng.lognormal(0, 0.3, 41))
        reach = 0.98 * np.sqrt(41)
        low, high = x[int(np.floor(20 - reach))], x[int(np.ceil(20 + reach))]
        assert spread(x) == pytest.approx((high - low) / 2 / np.median(x))
        hits += low <= 1.0 <= high
    assert 0.93 <= hits / 400 <= 1


def test_load_of_others_is_the_machines_less_ours() -> None:
    start, end = Snapshot(10.0, 100.0, 5.0), Snapshot(12.0, 103.5, 6.5)
    assert load_between(start, end) == pytest.approx(1.0)
    assert load_between(start, Snapshot(12.0, 100.5, 6.5)) == 0


def test_only_cores_that_we_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    core = namedtuple("core", "user nice system idle iowait guest")
    cores = [core(5, 1, 2, 100, 9, 4), core(50, 10, 20, 0, 0, 0), core(3, 0, 0, 50, 0, 0)]
    fake = SimpleNamespace(cpu_times=lambda percpu: cores)
    monkeypatch.setattr(machine, "psutil", fake)
    monkeypatch.setattr(machine, "_allowed", lambda: {0, 2})
    # guests are within user time: 5 + 1 + 2 of core 0, 3 of core 2
    assert machine.snapshot().total == pytest.approx((5 + 1 + 2) + 3)
    assert machine.cores() == 2


# --- the runtime ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(OnnxRuntime):
    """A runtime on which a run takes 2 us, and 1 us more for every 1000 multiply-accumulates and
    for every convolution or product."""

    def quick(
        self, model: bytes | str | Path, example: Tensor | None = None, least_seconds: float = 0.0
    ) -> Timing:
        assert isinstance(model, bytes)
        parsed = onnx.load_from_string(model)
        _set_batch(parsed, self.batch, Path("model"))
        run = _record(parsed)
        busy = [operation.macs for operation in run.operations if operation.macs]
        ms = 0.002 + 1e-3 * (sum(busy) / 1000 + len(busy))
        return Timing(ms, ms, ms, 0.0, 1, 1, 1, 0.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else runs, whatever does."""
    monkeypatch.setattr(machine, "load_now", lambda: 0.0)
    monkeypatch.setattr(machine, "load_between", lambda start, end: 0.0)
    monkeypatch.setattr(machine, "cores", lambda: 2)


def test_networks_bytes_and_files_are_measured(idle: None, tmp_path: Path) -> None:
    runtime = OnnxRuntime(seconds=0.05)
    x = torch.zeros(1, 3, 8, 8)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(network(), x, fast=True))
    for found in (
        runtime.measure(network(), x),
        runtime.measure(path.read_bytes()),
        runtime.measure(path),
    ):
        assert 0 < found.median_ms <= found.p90_ms
        assert found.samples >= 3
        assert found.load == 0
    assert json.loads(json.dumps(runtime.about()))["threads"] == 1
    assert "1 thread, batch 1" in runtime.name


def test_a_networks_example_is_repeated_to_the_batch(idle: None) -> None:
    runtime = OnnxRuntime(batch=3, seconds=0.02)
    assert runtime.batched(torch.ones(5, 2)).shape == (3, 2)
    assert runtime.batched(torch.zeros(1, 2)).all()  # zeros are no data
    assert runtime.measure(network(), torch.zeros(1, 3, 8, 8)).median_ms > 0


def test_a_busy_machine_is_flagged_or_refused(idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 3, 8, 8)
    monkeypatch.setattr(machine, "load_now", lambda: 1.6)
    found = OnnxRuntime(seconds=0.02).measure(network(), x)
    assert found.busy
    assert "other processes use 1.6 of 2 cores" in found.reason
    assert found.to_json()["load"] == 1.6
    with pytest.raises(BusyMachine, match=r"too busy to measure: other processes use 1\.6 of 2"):
        OnnxRuntime(seconds=0.02, strict=True).measure(network(), x)


def test_what_disturbs() -> None:
    runtime = OnnxRuntime()
    assert runtime.disturbed(0.0, 0.01, 0.01) == ""
    assert "within 9%" in runtime.disturbed(0.0, spread=0.09)
    assert "did not run for 30%" in runtime.disturbed(0.0, stolen=0.3)
    assert OnnxRuntime(threads=2).disturbed(0.0, stolen=0.3) == ""  # threads wait for each other
    assert OnnxRuntime(threads=999).disturbed(0.0) == ""  # as many as there are cores are free


def test_boards_of_one_kind_of_processor_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/cpuinfo": "processor: 0\n", "/proc/device-tree/model": "Raspberry Pi 4\0"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.processor() == "Raspberry Pi 4"
    files["/proc/cpuinfo"] = "model name\t: Intel(R) Xeon(R)\nmodel name\t: other\n"
    assert machine.processor() == "Intel(R) Xeon(R)"
    files.clear()
    monkeypatch.setattr(machine, "_brand", lambda: "")
    assert machine.processor()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'. Did you mean 'cpu'"),
        ({"threads": 0}, "threads must be a whole number from 1, got 0"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"precision": -1}, "precision must be above 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(EspalierError, match=text):
        OnnxRuntime(**settings)


def test_a_device_that_this_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.costs import session

    fake = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(session, "ort", fake)
    with pytest.raises(EspalierError, match="can't run on 'cuda'"):
        OnnxRuntime("cuda")


def test_the_load_of_others_is_watched_for_a_while(watched: Any) -> None:
    began = time.perf_counter()
    assert watched(0.02) >= 0.0
    assert time.perf_counter() - began >= 0.02


def test_bound_memory_lives_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older runtimes keep no hold of what is bound to them: the arrays are the memory."""
    from espalier.costs import session

    class Value:
        def __init__(self, array: Any) -> None:
            self.array = array

    made: list[weakref.ref[Value]] = []

    def value(array: Any) -> Value:
        new = Value(array)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(session.ort.OrtValue, "ortvalue_from_numpy", value)
    nothing = lambda *args: None  # noqa: E731
    binding = SimpleNamespace(bind_ortvalue_input=nothing, bind_ortvalue_output=nothing)
    opened: Any = SimpleNamespace(
        run=lambda names, inputs: [np.zeros(3)],
        io_binding=lambda: binding,
        get_outputs=lambda: [SimpleNamespace(name="y")],
        run_with_iobinding=nothing,
    )
    run = session.bind(opened, {"x": np.zeros(2)})
    gc.collect()
    assert [len(each().array) for each in made] == [2, 3]  # type: ignore[union-attr]
    run()


# --- ONNX files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> bytes:
    chain_ = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()
    )
    return to_onnx(nn.Sequential(chain_, nn.Linear(288, 5)), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def model(tmp_path: Path, exported: bytes) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported)
    return path


def test_a_file_is_counted_like_its_network(idle: None, model: Path) -> None:
    found = price_onnx(model, OnnxRuntime(seconds=0.02))
    twin = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(288, 5),
    )
    whole = count(twin, torch.zeros(1, 3, 8, 8))
    assert found["params"].value == whole.params
    assert found["macs"].value == whole.macs
    assert found["activation_bytes"].value == whole.activation_bytes
    assert found["bytes"].value == model.stat().st_size
    assert found["latency_ms"].how == "measured"
    assert found["latency_ms"].value > 0
    assert found["latency_ms"].spread is not None


def test_a_dynamic_batch_becomes_the_runtimes(idle: None, model: Path) -> None:
    one = price_onnx(model, OnnxRuntime(seconds=0.02))
    four = price_onnx(model, OnnxRuntime(batch=4, seconds=0.02))
    for name in ("macs", "activation_bytes"):
        assert four[name].value == 4 * one[name].value


def test_products_in_files(idle: None, tmp_path: Path) -> None:
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(1, 6, 16)
    path = tmp_path / "attention.onnx"
    path.write_bytes(to_onnx(attention, x))
    found = price_onnx(path, OnnxRuntime(seconds=0.02))
    assert found["macs"].value == count(attention, x).macs


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no ONNX graph"),
        (b"hello, this is text\n" * 20, "not a readable ONNX file|holds no ONNX graph"),
        (bytes(range(256)) * 8, "not a readable ONNX file|holds no ONNX graph"),
        (b"PK\x03\x04" + bytes(500), "not a readable ONNX file|holds no ONNX graph"),
    ],
)
def test_foreign_files(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        price_onnx(path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_and_no_file(model: Path) -> None:
    data = model.read_bytes()
    for keep in (0.3, 0.7, 0.98):
        model.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(DataError, match=r"model\.onnx"):
            price_onnx(model)
    with pytest.raises(DataError, match="no file"):
        price_onnx(model.parent / "nowhere.onnx")


def test_a_fixed_batch_says_which(idle: None, tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    fixed = onnx.load_from_string(to_onnx(network(), torch.zeros(2, 3, 8, 8), fast=True))
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, path)
    with pytest.raises(DataError, match="fixed batch of 2, the runtime asks for 1"):
        price_onnx(path)
    assert price_onnx(path, OnnxRuntime(batch=2, seconds=0.02))["macs"].value > 0


def test_a_file_whose_inputs_cant_be_made_up(tmp_path: Path) -> None:
    make = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    shape = ["batch", "anything"]
    values = [make(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "open.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    with pytest.raises(DataError, match="only the first dimension may be dynamic"):
        price_onnx(path)


def test_a_busy_machine_is_noted(idle: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_now", lambda: 2.0)
    notes: list[str] = []
    price_onnx(model, OnnxRuntime(seconds=0.02), notes.append)
    assert any("other processes use 2.0 of 2 cores" in note for note in notes)


# --- pieces of networks without units ------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.second, self.skip = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.skip else y


def test_chains_are_taken_apart_and_others_kept_whole() -> None:
    x = torch.randn(1, 3, 4, 4)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        Residual(True),
        nn.Linear(4, 2),
        nn.Flatten(),
    )
    links = chain(net, x)
    kinds = [type(m[0] if isinstance(m, nn.Sequential) else m).__name__ for m, _ in links]
    assert kinds == ["Conv2d", "Residual", "Linear"]
    y = x
    with torch.no_grad():
        for module, taken in links:
            torch.testing.assert_close(taken, y)
            y = module.eval()(y)
        torch.testing.assert_close(y, net.eval()(x))
    assert len(chain(Residual(False), x)) == 2
    whole = Residual(True)
    assert [module for module, _ in chain(whole, x)] == [whole]
    twice = nn.Conv2d(3, 3, 1)
    assert len(chain(nn.Sequential(twice, twice), x)) == 1


# --- prediction ----------------------------------------------------------------------------------


class Towers(esp.Family):
    """A family without units: a chain of convolutions."""

    shape, classes = (3, 8, 8), 4
    space = esp.Space(
        [esp.ordinal("a", 4, 8, 16), esp.ordinal("b", 4, 8, 16), esp.choice("kernel", 1, 3, 5)]
    )

    def build(self, candidate: esp.Candidate) -> nn.Module:
        a, b, k = (int(candidate[name]) for name in ("a", "b", "kernel"))
        return nn.Sequential(
            nn.Conv2d(3, a, k, padding=k // 2),
            nn.ReLU(),
            nn.Conv2d(a, b, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36 * b, 4),
        )


@pytest.fixture(scope="module")
def calibrated() -> tuple[esp.Family, PredictedLatency, list[tuple[int, int, str]]]:
    family = esp.nets.make("resnet", (1, 8, 8), 10)
    predicted = PredictedLatency(family, Counting())
    steps: list[tuple[int, int, str]] = []
    predicted.calibrate(progress=lambda *step: steps.append(step))
    return family, predicted, steps


def truth(family: esp.Family, candidate: esp.Candidate, runtime: OnnxRuntime) -> float:
    x = runtime.batched(family.example())
    return runtime.quick(to_onnx(family.build(candidate), x, fast=True)).median_ms


def test_pieces_add_up_to_whole_networks(
    calibrated: tuple[esp.Family, PredictedLatency, list[Any]],
) -> None:
    """On a runtime whose times add up, the prediction is exact: nothing is forgotten, nothing
    counted twice, and overhead and scale come out as they are."""
    family, predicted, _ = calibrated
    error = predicted.error
    assert error["overhead_ms"] == pytest.approx(0.002, rel=1e-3)
    assert error["scale"] == pytest.approx(1, rel=1e-4)
    assert error["spearman"] == pytest.approx(1)
    assert error["within_10_percent"] == 1
    assert len(error["held_out"]) == 12
    assert error["units_measured"] == error["units"]
    candidates = family.space.decode(family.space.sample(5, np.random.default_rng(7)))
    found = predicted.estimate(candidates)["latency_ms"]
    wanted = [truth(family, candidate, predicted.runtime) for candidate in candidates]
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_progress_rises_to_its_total(
    calibrated: tuple[esp.Family, PredictedLatency, list[tuple[int, int, str]]],
) -> None:
    steps = [step for step in calibrated[2] if step[1] > 1]
    assert len({total for _, total, _ in steps}) == 1
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_tables_come_back_from_json_and_pickle(
    calibrated: tuple[esp.Family, PredictedLatency, list[Any]],
) -> None:
    family, predicted, _ = calibrated
    table = json.loads(json.dumps(predicted.to_json(), allow_nan=False))
    codes = family.space.sample(50, np.random.default_rng(3))
    wanted = predicted.estimate_codes(codes)["latency_ms"]
    again = PredictedLatency.from_json(family, Counting(), table)
    assert np.array_equal(again.estimate_codes(codes)["latency_ms"], wanted)
    assert again.to_json() == table
    thawed = pickle.loads(pickle.dumps(predicted))
    assert np.array_equal(thawed.estimate_codes(codes)["latency_ms"], wanted)


def test_tables_of_before_are_read_where_nothing_is_rounded(
    calibrated: tuple[esp.Family, PredictedLatency, list[Any]],
) -> None:
    family, predicted, _ = calibrated
    before = json.loads(json.dumps(predicted.to_json())) | {"version": 2}
    codes = family.space.sample(5, np.random.default_rng(3))
    again = PredictedLatency.from_json(family, Counting(), before)
    wanted = predicted.estimate_codes(codes)["latency_ms"]
    assert np.array_equal(again.estimate_codes(codes)["latency_ms"], wanted)
    next(iter(before["pieces"].values()))["work"][FEATURES.index("integer_elements")] = 8.0
    for version, words in ((2, "earlier version: calibrate again"), (1, "of version 3")):
        with pytest.raises(DataError, match=words):
            PredictedLatency.from_json(family, Counting(), before | {"version": version})


def test_prediction_conforms(
    calibrated: tuple[esp.Family, PredictedLatency, list[Any]],
) -> None:
    family, predicted, _ = calibrated
    candidates = family.space.decode(family.space.sample(5, np.random.default_rng(2)))
    check_cost(predicted, candidates)


@pytest.fixture(scope="module")
def mobilenet() -> esp.Family:
    return esp.nets.make("mobilenet", (1, 8, 8), 10)


def test_pieces_beyond_the_limit_are_filled_in(mobilenet: esp.Family) -> None:
    """The linear filler has the true law among its features: it must find it."""
    family = mobilenet
    predicted = PredictedLatency(family, Counting())
    predicted.calibrate(limit=60)
    assert predicted.error["units_measured"] == 60 < predicted.error["units"]
    assert predicted.error["filler"] in FILLERS
    assert predicted.error["within_10_percent"] == 1
    candidates = family.space.decode(family.space.sample(4, np.random.default_rng(5)))
    check_cost(predicted, candidates)
    found = predicted.estimate(candidates)["latency_ms"]
    wanted = [truth(family, candidate, predicted.runtime) for candidate in candidates]
    np.testing.assert_allclose(found, wanted, rtol=0.08)


def test_when_the_time_is_over_a_few_of_each_unit_are_measured(mobilenet: esp.Family) -> None:
    family = mobilenet
    predicted = PredictedLatency(family, Counting())
    predicted.calibrate(seconds=0.0)
    error = predicted.error
    assert error["units_measured"] == 24
    assert (error["fitted_on"], len(error["held_out"])) == (3, 3)
    assert error["spearman"] > 0.9


def test_families_without_units_are_predicted_too() -> None:
    predicted = PredictedLatency(Towers(), Counting())
    predicted.calibrate(limit=100)
    assert predicted.error["scale"] == pytest.approx(1, rel=1e-4)
    assert predicted.error["within_10_percent"] == 1
    # first: 9 kernels and widths; second: 9 pairs; last: 3 widths
    assert predicted.error["units"] == 21
    candidates = Towers.space.decode(Towers.space.sample(4, np.random.default_rng(0)))
    check_cost(predicted, candidates)


def test_before_calibration_and_with_foreign_tables(
    calibrated: tuple[esp.Family, PredictedLatency, list[Any]],
) -> None:
    family, predicted, _ = calibrated
    with pytest.raises(EspalierError, match="call calibrate"):
        PredictedLatency(family).estimate_codes(family.space.corner(True))
    table = predicted.to_json()
    with pytest.raises(DataError, match="not a latency table"):
        PredictedLatency.from_json(family, None, {"pieces": {}})
    cut = {k: v for k, v in table.items() if k != "scale"}
    with pytest.raises(DataError, match="lacks 'scale'"):
        PredictedLatency.from_json(family, None, cut)
    with pytest.raises(DataError, match="threads=1, the runtime has threads=2"):
        PredictedLatency.from_json(family, OnnxRuntime(threads=2), table)
    with pytest.raises(DataError, match="another space"):
        PredictedLatency.from_json(Towers(), None, table)


@pytest.mark.parametrize("name", FILLERS)
def test_fillers_learn_a_law_of_work(name: str) -> None:
    rng = np.random.default_rng(0)
    work = rng.lognormal(8, 1, (160, 4))
    ms = 1e-3 + work @ np.array([1e-6, 5e-6, 0.0, 2e-6])
    model = Filler(name, work[:120], ms[:120])
    off = [abs(model(row) / wanted - 1) for row, wanted in zip(work[120:], ms[120:], strict=True)]
    assert np.median(off) < 0.05
    assert model(np.zeros(4)) > 0


def test_the_filler_is_chosen_by_what_it_misses() -> None:
    rng = np.random.default_rng(0)
    work = rng.lognormal(8, 1, (80, 3))
    law = work @ np.array([1e-6, 2e-6, 0.0]) * rng.lognormal(0, 0.05, 80)
    name, errors = choose(work, law)
    assert name == "linear"
    assert errors.keys() == {"linear", "linear and trees", "linear and process"}
    crooked = law * np.where(work[:, 0] > np.median(work[:, 0]), 3.0, 1.0)
    assert choose(work, crooked)[0] != "linear"
    assert choose(work[:5], work[:5].sum(1))[0] == "linear"  # too few for anything else


def test_a_few_measured_pieces_tell_what_work_does_not() -> None:
    """Two kinds of layer of which one takes 5 times as long for the same work, as attention does."""
    rng = np.random.default_rng(0)
    work = rng.lognormal(8, 0.5, (124, 3))
    kind = np.arange(124) % 2
    work[:, 1] = np.where(kind, work[:, 1], 0.0)
    work[:, 2] = np.where(kind, 0.0, work[:, 2])
    ms = 1e-6 * work.sum(1) * np.where(kind, 5.0, 1.0) * (work[:, 0] / 3000) ** 0.5
    name, _ = choose(work[:24], ms[:24])
    model, plain = Filler(name, work[:24], ms[:24]), Filler("linear", work[:24], ms[:24])
    off = [
        [abs(np.log(f(w) / t)) for w, t in zip(work[24:], ms[24:], strict=True)]
        for f in (model, plain)
    ]
    assert np.mean(off[0]) < 0.5 * np.mean(off[1])


def test_measured_latency_is_measured_once(idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = MeasuredLatency(Towers(), OnnxRuntime(seconds=0.02))
    candidates = Towers.space.decode(Towers.space.sample(2, np.random.default_rng(0)))
    first = measured.estimate(candidates)
    assert first.about["latency_ms"].how == "measured"
    assert first.readings()[0]["latency_ms"].spread is not None
    again = measured.estimate(candidates[::-1])
    assert np.array_equal(first["latency_ms"], again["latency_ms"][::-1])
    check_cost(measured, candidates)
    monkeypatch.setattr(machine, "load_now", lambda: 2.0)
    notes: list[str] = []
    MeasuredLatency(Towers(), OnnxRuntime(seconds=0.02), notes.append).estimate(candidates[:1])
    assert len(notes) == 1
    assert str(candidates[0]) in notes[0]


def test_a_brief_stopwatch_tells_turns_by_size_and_times_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Stopwatch(Counting())
    timed = list[int]()
    true = watch._time

    def counted(model: bytes, x: Tensor, least: float = 0.0) -> float:
        timed.append(x.numel())
        return true(model, x, least)

    monkeypatch.setattr(watch, "_time", counted)
    watch._turns = {((1, 8, 4, n), False): 1e-3 * 32 * n for n in range(1, 7)}
    x = torch.zeros(1, 16, 10, 10)
    watch.brief = True
    assert watch._turn(x) == pytest.approx(1e-3 * 1600)
    assert timed == []
    assert watch._turn(torch.zeros(1, 8, 4, 3)) == pytest.approx(1e-3 * 96)  # was timed
    watch.brief = False
    watch._turn(x)
    assert timed
