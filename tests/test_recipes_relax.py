"""The recipes of differentiable search run, and the parts that they share count rightly."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier import recipes
from espalier.nets.nb201 import SPACE
from espalier.recipes import rarts, sharpdarts
from espalier.recipes._parts import nb201
from espalier.recipes._parts.nb201 import SCALES, Method, answer, by_chance
from espalier.recipes._parts.nb201_steps import bytes_kept, saved_bytes
from espalier.solvers.relax import FirstOrder, Rarts

NAMES = ("darts", "pc-darts", "gdas", "rarts", "darts-pt", "sd-darts", "sharpdarts")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: what one recipe searched, another finds."""
    return tmp_path_factory.mktemp("searches")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_without_data(name: str, out: Path) -> None:
    found = recipes.run(name, "smoke", seed=0, out=out)
    assert isinstance(found["check"]["holds"], bool)
    for one in found["searches"].values():
        assert one.get("table") is None
        if "cell" in one:
            cell = SPACE.candidate(one["cell"])
            odd = sum(cell[n] in ("none", "skip_connect", "avg_pool_3x3") for n in SPACE.names)
            assert one["parameterless"] == odd


def test_a_search_is_kept_for_the_next_recipe(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"n": len(made)}

    monkeypatch.setattr(nb201, "_FOUND", {})
    assert nb201.kept("some thing", 3, out, make) == {"n": 1}
    nb201._FOUND.clear()
    assert nb201.kept("some thing", 3, out, make) == {"n": 1}  # from the folder
    assert nb201.kept("some thing", 4, out, make) == {"n": 2}  # another seed is another search


def test_random_search_takes_its_time_and_chooses_by_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accuracies = [0.2, 0.6, 0.4, 0.9]
    cells = SPACE.decode(SPACE.enumerate()[[7, 70, 700, 7000]])

    def alone(setting: Any, seed: int, index: int, out: Any) -> dict[str, Any]:
        return {
            "cell": cells[index].to_json(),
            "accuracy": accuracies[index],
            "seconds": 2.0,
        }

    monkeypatch.setattr(nb201, "alone", alone)
    setting = SCALES["smoke"]
    found = by_chance(setting, 0, 5.0, None)  # the third is begun within the time, the fourth not
    assert found["trained"] == 3
    assert found["cell"] == cells[1].to_json()
    assert by_chance(setting, 0, 0.0, None)["trained"] == 2


def test_saved_bytes_are_those_of_the_activations() -> None:
    net = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Sigmoid(), nn.Linear(32, 4, bias=False))
    x = torch.zeros(16, 8)
    # the input, the output of the sigmoid (also the input of the second layer); no weights
    assert saved_bytes(net, lambda: net(x).sum()) == 4 * (16 * 8 + 16 * 32)


def test_fewer_channels_keep_fewer_bytes() -> None:
    setting = replace(SCALES["smoke"], channels=16)
    whole = bytes_kept(Method("a"), setting, 0)
    quarter = bytes_kept(Method("b", partial=4), setting, 0)
    assert 0 < quarter < 0.6 * whole


@pytest.mark.data
def test_a_cell_is_looked_up(real_data: Path) -> None:
    skips = SPACE.candidate(dict.fromkeys(SPACE.names, "skip_connect"))
    found = answer(skips, SCALES["cpu"])
    assert found["parameterless"] == 6
    # what DARTS is published to find on CIFAR-10 and CIFAR-100
    assert found["table"]["cifar10"]["test"] == pytest.approx(54.30, abs=0.005)
    assert found["table"]["cifar100"]["test"] == pytest.approx(15.61, abs=0.005)


def test_the_toy_rests_where_paper_says() -> None:
    assert rarts.rests_at(FirstOrder(), steps=400) == pytest.approx(2.0, abs=0.01)
    # stationary point of a w - 2 a + 1 at y, plus k (w - a)^2 and k/2 (y - w)^2
    k = rarts._STRICT
    expected = 2 / (2 - 1 / (2 * k) - 1 / k)
    strict = Rarts(share=k, pull=k, in_turn=False)
    assert rarts.rests_at(strict, steps=600) == pytest.approx(expected, abs=0.01)


def test_the_grid_has_a_path_for_every_candidate() -> None:
    grid = sharpdarts.HyperCuboid((1, 8, 8), 10, layers=2, widths=(4, 8), reuse=(1, 2))
    assert grid.space.size == 5**2
    candidate = grid.space.candidate({"layer0": "8x2", "layer1": "none"})
    grid.activate(candidate)
    grid.eval()
    x = torch.randn(3, 1, 8, 8)
    plain = grid.extract(candidate).eval()
    assert torch.allclose(plain(x), grid(x), atol=1e-5)
    # run twice, the same weights: no more parameters than run once
    once = grid.extract(grid.space.candidate({"layer0": "8x1", "layer1": "none"}))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in once.parameters())
    assert not torch.allclose(once.eval()(x), plain(x), atol=1e-3)


def test_the_table_of_searches_collects_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "relax_quality.py"
    spec = importlib.util.spec_from_file_location("relax_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "relax_quality", module)
    spec.loader.exec_module(module)

    def check(test: float, chance: float) -> dict[str, Any]:
        both = {"darts": test, "random search": chance, "one random cell": 87.06}
        return {
            "test": {name: {"cifar10": v, "cifar100": v - 20} for name, v in both.items()},
            "parameterless": {"darts": 6, "random search": 2},
            "seconds": {"darts": 50.0, "random search": 51.0},
        }

    runs = [{"seed": i, "check": check(*two)} for i, two in enumerate([(54.0, 92.0), (93.0, 92.5)])]
    (tmp_path / "recipe_darts.json").write_text(json.dumps({"scale": "cpu", "runs": runs}))
    monkeypatch.setattr("sys.argv", ["relax_quality", "--results", str(tmp_path)])
    module.main()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| DARTS, first"))
    assert "54.30 / 15.61 | 73.50 ± 27.58 | 53.50 ± 27.58 | 92.25 ± 0.35 | 1 of 2 | 6.0" in row
    assert "pc-darts" in printed.splitlines()[-1]  # not run: named, with the command
    written = json.loads((tmp_path / "relax_quality.json").read_text())
    assert written["searches"]["DARTS, first order"]["cifar10"]["all"] == [54.0, 93.0]
    assert written["searches"]["GDAS"] is None
