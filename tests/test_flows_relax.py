"""Searching by gradients from the main job: terms of the limits, draws, resuming, the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import espalier as esp
from espalier.costs import Counts
from espalier.errors import EspalierError
from espalier.flows import expected
from espalier.flows.plan import Plan
from espalier.flows.relaxing import Drawn
from espalier.report import page as pages
from espalier.report.reading import Result
from espalier.testing.strategy import check_strategy, small_space
from quick import QUICK
from report_html import read
from report_sample import sample_result
from test_flows_search import Interrupting, signature

pytestmark = pytest.mark.usefixtures("quick_tables", "pieces_once")

TINY = Plan(supernet_epochs=3, trials=6, population=3, finalists=1, final_epochs=1)


def family(shape: tuple[int, ...], classes: int) -> esp.Family:
    """A MobileNet with few options: its latency table takes a second."""
    return esp.nets.MobileNet(
        shape, classes, 8, stem=8, widths=((8, 16), 16, 32), depth=1, kernel=3,
        expansion=(2, 3), head=64,
    )  # fmt: skip


def relaxed_search(out: Path, **changes: Any) -> esp.Found:
    settings: dict[str, Any] = {
        "within": {"params": "85%", "latency_ms": 5.0, "activation_bytes": "100%"},
        "plan": TINY,
        "recipe": esp.Recipe(batch=64),
        "budget": "6 trials",
        "seed": 1,
        "out": out,
        "solver": "relax",
        "on": QUICK,
    }
    return esp.search(family, "digits:train=300", **{**settings, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> esp.Found:
    return relaxed_search(tmp_path_factory.mktemp("relax") / "run")


def test_expected_costs_are_those_of_the_pieces() -> None:
    net = esp.nets.MobileNet(
        (1, 8, 8), 4, 8, stem=8, widths=[8, (8, 16), 16], depth=(1, 2), kernel=3, expansion=2
    )
    counts, base = Counts(net), net.uniform(1.0)
    codes = net.space.sample(12, np.random.default_rng(0))
    for metric in expected.COUNTED:
        cost = expected.expected(net, expected.counted(metric), net.mixable, base)
        assert cost is not None
        got = [cost.at(candidate) for candidate in net.space.decode(codes)]
        assert got == pytest.approx(counts.estimate_codes(codes)[metric].tolist())
    # the mean over independent draws, against many of them
    chances = {
        name: torch.softmax(torch.randn(net.space[name].count, dtype=torch.float64), 0)
        for name in net.mixable
    }
    strategy = Drawn(net.space, 0, {n: p.tolist() for n, p in chances.items()}, base)
    strategy._seen.add(strategy._first)  # so that draws come alone
    mean = counts.estimate_codes(strategy._draw(20_000, 1.0))["bytes"].mean()
    assert float(cost(chances)) == pytest.approx(mean, rel=0.01)

    class Whole(esp.Family):
        space, shape, classes, name = net.space, net.shape, net.classes, "whole"
        build = net.build

    assert expected.expected(Whole(), expected.counted("params"), net.mixable, base) is None  # type: ignore[arg-type]


def test_draws_are_a_strategy_that_begins_with_what_was_derived() -> None:
    def make(space: esp.Space, seed: int) -> Drawn:
        chances = {d.name: np.arange(1, d.count + 1) / 7 for d in space.decisions if d.count}
        first = space.decode(space.repair(space.corner(last=True), np.random.default_rng(0)))[0]
        return Drawn(space, seed, {n: p.tolist() for n, p in chances.items()}, first)

    check_strategy(make, small_space())
    strategy = make(small_space(), 0)
    assert small_space().decode(strategy.ask(3))[0] == strategy.space.decode(strategy._first)[0]


def test_a_search_learns_its_architecture_and_keeps_the_limits(found: esp.Found) -> None:
    result = json.loads(json.dumps(found.to_json()))
    learned = result["architecture"]
    assert [row["epoch"] for row in learned["history"]] == [1, 2, 3]
    assert set(learned["options"]) == set(found.family.mixable)  # type: ignore[attr-defined]
    assert learned["operators"] == 0
    terms = learned["history"][-1]["terms"]
    assert set(terms) == {"params", "latency_ms"}  # the peak of memory is no sum
    tried = [t for t in result["trials"] if t["phase"] == "search"]
    limits = {x["metric"]: x["bound"] for x in result["question"]["limits"]}
    assert len(tried) == TINY.trials
    assert all(t["params"] <= limits["params"] for t in tried)
    derived = found.family.space.encode([learned["candidate"]])
    if float(found.pricing(derived)["params"][0]) <= limits["params"]:
        assert tried[0]["candidate"] == learned["candidate"]
    else:
        assert all(t["candidate"] != learned["candidate"] for t in tried)
    assert found.best.metrics["params"].value <= limits["params"]
    shown = pages.page(Result(result))
    monitor = learned["monitor"]
    assert f"from {monitor['supernet_accuracy']:.4g} to {monitor['derived_accuracy']:.4g}" in shown
    assert f"raises the loss by {monitor['sharpness']['mean']:.3g}" in shown
    assert "--solver relax" in result["reproduce"]["command"]
    assert "solver='relax'" in result["reproduce"]["python"]


def test_an_interrupted_search_learns_the_same(found: esp.Found, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        relaxed_search(out, reuse=found.folder, progress=Interrupting("training the supernet", 2))
    again = relaxed_search(out, resume=True)
    assert signature(again) == signature(found)
    ours, theirs = (x.to_json()["architecture"]["history"] for x in (again, found))
    assert ours == theirs
    with pytest.raises(EspalierError, match="solver"):
        relaxed_search(out, resume=True, solver="search")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"solver": "relaxed"}, "unknown solver 'relaxed'. Did you mean 'relax'"),
        ({"strategy": "random"}, "strategy 'random' is for solver 'search'"),
    ],
)
def test_what_can_not_be_relaxed_is_refused(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(EspalierError) as refused:
        relaxed_search(tmp_path / "run", **changes)
    assert rule in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_report_draws_the_architecture_only_where_one_was_learned(found: esp.Found) -> None:
    without = read(pages.page(Result(sample_result())))
    assert not any(e.attributes.get("data-figure") == "architecture" for e in without.elements)
    rows = [
        {"epoch": i, "parameterless": i // 2, "probabilities": {"op": [0.5 + i / 10, 0.5 - i / 10]}}
        for i in itertools.chain(range(4), [None])
        if i is not None
    ]
    learned = {"history": rows, "options": {"op": ["skip <b>", "conv"]}}
    parsed = read(pages.page(Result(sample_result() | {"architecture": learned})))
    assert parsed.wrong == []
    assert any(e.attributes.get("data-figure") == "architecture" for e in parsed.elements)
    views = pages.figures.figures(Result({"architecture": learned}))["architecture"]
    line, count = views[0]["figure"]["data"]
    assert line["y"] == [0.5, 0.6, 0.7, 0.8]
    assert "op = skip &lt;b&gt;" in line["hovertemplate"]
    assert count["y"] == [0, 0, 1, 1]
    none = pages.figures.figures(Result({"architecture": {**learned, "operators": 0}}))
    assert len(none["architecture"][0]["figure"]["data"]) == 1  # there is nothing to count
    spoiled = [{"epoch": 1, "probabilities": {"op": "x", "p": [None]}}, {"epoch": None}, {}]
    assert read(pages.page(Result({"architecture": {"history": spoiled}}))).wrong == []
    assert "How the search went" in (found.report()).read_text()
