"""The recipes about evaluation, in parts: what they compute, on small tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench_toys import toy
from espalier.bench.criteria import criteria
from espalier.recipes import archgym, nas_eval_hard, ose_zse_eval
from espalier.testing import check_table


def test_the_systolic_arrays_are_a_table_like_any_other() -> None:
    table = archgym.systolic_table(small=True)
    assert len(table) == 1536
    check_table(table)
    row = table.space.decode(table.codes[700:701])[0]
    price = archgym.simulate(dict(row))
    for name in ("latency_ms", "energy_mj", "area_mm2"):
        assert table.columns[name][700] == price[name]
    assert table.columns["score"][700] == pytest.approx(
        np.log(price["latency_ms"] * price["energy_mj"])
    )


def test_the_workload_is_resnet20() -> None:
    macs = sum(p.macs for p in archgym.resnet20())
    assert macs == 40_551_040  # 40.6 M without shortcuts of its own, 19 convolutions and a linear
    assert len(archgym.resnet20()) == 20


def test_the_lottery_reports_every_draw_and_the_best_with_fresh_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        archgym, "AGENTS", {n: archgym.AGENTS[n] for n in ("evolution", "local", "random")}
    )
    found, logged = archgym.lottery(toy(), 3, 1, 4, 20, seed=0)
    for row in found["agents"].values():
        order = [row[k] for k in ("lowest", "lower", "median", "upper", "highest")]
        assert order == sorted(order)
    assert found["within_noise"] == (not found["different"])
    assert 20 < len(logged) <= 256


def test_the_proxy_is_judged_on_what_was_not_logged() -> None:
    table = archgym.systolic_table(small=True)
    logged = np.random.default_rng(0).permutation(len(table))[:1000]
    found = archgym.proxied(table, logged, seed=0)
    assert found["held_out"] == 536
    assert 0 < found["rmse"]["latency_ms"] < 0.2
    assert found["speedup"] > 0


def test_relative_improvement_of_a_strategy() -> None:
    table = toy()
    found = nas_eval_hard._relative(table, "evolution", 30, range(4))
    assert found["random_networks"] == 4 * 8
    assert 0 < found["low"] <= found["mean"] <= found["high"]
    by_hand = 100 * (found["test"] - found["random_average"]) / found["random_average"]
    assert found["mean"] == pytest.approx(by_hand)


def test_two_runs_agree_or_not() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=80)
    size = np.abs(truth) + rng.uniform(size=80)

    def report(scores: np.ndarray) -> dict[str, object]:
        return criteria(scores, truth, complexity=size, shares=(0.05, 0.1), resamples=50)

    names = (*ose_zse_eval.MEASURES, *ose_zse_eval.COUNTED)
    first = {n: report(truth + rng.normal(size=80)) for n in names}
    first["params"] = report(truth)
    again = dict(first)
    again["synflow"] = report(-truth)
    found = ose_zse_eval._check(first, again)
    assert found["agree"]["snip"]
    assert not found["agree"]["synflow"]
    assert not found["holds"]
    assert len(found["beaten_by_counts"]) == len(ose_zse_eval.MEASURES)
    json.dumps(found)
