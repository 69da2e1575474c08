"""Recipes of pruning by gates: one small run each, and their verdicts on made-up numbers."""

from __future__ import annotations

import json

import pytest

from espalier.recipes import all_in_one, bdwp_sat, bip, dsa, pas, run

# how a run's check follows from what else it reports
AGAIN = {
    "bdwp-sat": lambda r: bdwp_sat.checked(r["trainings"]),
    "dsa": lambda r: dsa.checked(r["allocations"], r["limit"]),
    "pas": lambda r: pas.checked(r["networks"], r["gates_ended_at"] / r["limit"], r["limit"]),
    "bip": lambda r: bip.checked(r["pruned"]),
    "all-in-one": lambda r: all_in_one.checked(r["levels"], r["bytes"], r["latency"]["ms"]),
}


@pytest.mark.parametrize("name", list(AGAIN))
def test_runs(name):
    found = json.loads(json.dumps(run(name, "smoke", 0)))
    check, again = found["check"], AGAIN[name](found)
    if name == "pas":  # the share that the gates ended at is given back as a product
        assert check.pop("gates_off_target") == pytest.approx(again.pop("gates_off_target"))
    assert check == again
    assert isinstance(check["holds"], bool)


# --- DSA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("macs", "accuracies", "times", "holds"),
    [
        (995, (0.60, 0.59, 0.58), (10, 16), True),
        (1000, (0.60, 0.59, 0.58), (10, 15), True),  # all of the budget, just fast enough
        (1001, (0.60, 0.59, 0.58), (10, 16), False),  # over the budget
        (985, (0.60, 0.59, 0.58), (10, 16), False),  # more than 1% of it unused
        (995, (0.60, 0.60, 0.58), (10, 16), False),  # no better than one ratio everywhere
        (995, (0.60, 0.58, 0.61), (10, 16), False),  # worse than global L1
        (995, (0.60, 0.58, 0.60), (10, 16), False),  # no better than it
        (995, (0.60, 0.59, 0.58), (10, 14), False),  # not enough faster than greedy rounds
        (995, (0.60, 0.59, 0.58), (16, 10), False),  # slower than they are
    ],
)
def test_dsa_check_can_fail(macs, accuracies, times, holds):
    own, uniform, global_l1 = accuracies
    found = {
        "dsa": {"accuracy": own, "macs": macs, "seconds": times[0]},
        "uniform": {"accuracy": uniform},
        "global_l1": {"accuracy": global_l1},
        # no claim is made on the accuracy of the rounds
        "greedy": {"accuracy": 0.9, "seconds": times[1]},
    }
    assert dsa.checked(found, 1000)["holds"] is holds


# --- Pruning-as-Search --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "macs", "accuracies", "apart", "holds"),
    [
        (1.01, 990, (0.97, 0.96), 1e-5, True),
        (0.985, 1015, (0.97, 0.96), 1e-5, True),
        (1.03, 990, (0.97, 0.96), 1e-5, False),  # gates above the target
        (0.97, 990, (0.97, 0.96), 1e-5, False),  # below it
        (1.01, 1030, (0.97, 0.96), 1e-5, False),  # the network above it
        (1.01, 970, (0.97, 0.96), 1e-5, False),  # below it
        (1.01, 990, (0.97, 0.97), 1e-5, False),  # no better than L1 at one ratio
        (1.01, 990, (0.97, 0.96), 1e-3, False),  # folded, it computes something else
    ],
)
def test_pas_check_can_fail(ended, macs, accuracies, apart, holds):
    found = {
        "pas": {"accuracy": accuracies[0], "macs": macs, "apart": apart},
        "l1": {"accuracy": accuracies[1]},
        "global_l1": {"accuracy": 0.99},  # no claim is made on it
    }
    assert pas.checked(found, ended, 1000)["holds"] is holds


# --- BiP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "passes", "holds"),
    [
        ((0.98, 0.97, 0.96, 0.975), 20, True),
        ((0.98, 0.98, 0.98, 0.984), 20, True),  # as good as one-shot cuts, behind by less than half
        ((0.97, 0.98, 0.96, 0.97), 20, False),  # below magnitudes at once
        ((0.97, 0.96, 0.98, 0.97), 20, False),  # below SNIP
        ((0.98, 0.97, 0.96, 0.99), 20, False),  # a point behind the rounds
        ((0.98, 0.97, 0.96, 0.975), 21, False),  # more than a third of their passes
    ],
)
@pytest.mark.parametrize("share", ["0.8", "0.95"])
def test_bip_check_can_fail(accuracies, passes, share, holds):
    names = ("bip", "magnitude", "snip", "rounds")

    def row(accuracies, passes):
        found = {n: {"accuracy": a} for n, a in zip(names, accuracies, strict=True)}
        found["bip"]["passes"], found["rounds"]["passes"] = passes, 60
        return found

    found = {s: row((0.98, 0.97, 0.96, 0.975), 20) for s in ("0.8", "0.95")}
    found[share] = row(accuracies, passes)
    check = bip.checked(found)
    assert check["holds"] is holds
    assert check[share]["holds"] is holds
    (other,) = set(found) - {share}
    assert check[other]["holds"] is True  # each sparsity is judged alone, both are needed


# --- All-in-One ---------------------------------------------------------------------------------------

STEADY = [
    f * 2.0 for f in all_in_one.FREQUENCIES
]  # each level as much faster as its clock is slower


@pytest.mark.parametrize(
    ("lost", "together", "ms", "holds"),
    [
        ((0.0, 0.005, -0.01, 0.009), 1040, STEADY, True),
        ((0.0, 0.0, 0.0, 0.011), 1040, STEADY, False),  # one level loses more than a point
        ((0.011, 0.0, 0.0, 0.0), 1040, STEADY, False),
        ((0.0, 0.005, -0.01, 0.009), 1110, STEADY, False),  # too much memory
        ((0.0, 0.005, -0.01, 0.009), 1040, [2.0] * 4, False),  # levels are no faster
        ((0.0, 0.005, -0.01, 0.009), 1040, STEADY[::-1], False),  # the smaller, the slower
    ],
)
def test_all_in_one_check_can_fail(lost, together, ms, holds):
    found = [{"accuracy": 0.9 - each, "alone": 0.9} for each in lost]
    size = {"all": together, "one": 1000}
    assert all_in_one.checked(found, size, ms)["holds"] is holds


def test_the_spread_of_latency_is_over_frequencies():
    # the whole model at full, 0.85, 0.7, 0.6 of the clock: 10, 11.76, 14.29, 16.67 ms
    times = [10.0, 10 / 0.85, 10 / 0.7, 10 / 0.6]
    mean = sum(times) / 4
    expected = (sum((t - mean) ** 2 for t in times) / 4) ** 0.5 / mean
    assert all_in_one.spread([10.0, 1.0, 1.0, 1.0], switching=False) == pytest.approx(expected)
    assert all_in_one.spread(STEADY, switching=True) == pytest.approx(0.0)


# --- BDWP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "left", "cycles", "holds"),
    [
        ((0.50, 0.495, 0.44), (277, 250), (154, 100), True),
        ((0.50, 0.52, 0.44), (300, 300), (150, 100), True),  # better than dense, just cheap enough
        ((0.50, 0.48, 0.44), (277, 250), (154, 100), False),  # more than a point lost
        ((0.50, 0.495, 0.44), (310, 250), (154, 100), False),  # the pass forward is dear
        ((0.50, 0.495, 0.44), (277, 310), (154, 100), False),  # the pass backward is
        ((0.50, 0.495, 0.495), (277, 250), (154, 100), False),  # no better than forward only
        ((0.50, 0.495, 0.44), (277, 250), (140, 100), False),  # not enough faster
        ((0.50, 0.495, 0.44), (277, 250), (100, 154), False),  # slower
    ],
)
def test_bdwp_check_can_fail(accuracies, left, cycles, holds):
    dense, both, forward = accuracies
    rows = {
        "dense": {
            "accuracy": dense,
            "macs": {"forward": 1000, "backward": 1000, "weights": 1000},
            "cycles": cycles[0],
        },
        "both": {
            "accuracy": both,
            # the gradient of the weights is dense, and no claim is made on it
            "macs": {"forward": left[0], "backward": left[1], "weights": 1000},
            "cycles": cycles[1],
        },
        "forward": {"accuracy": forward},
    }
    assert bdwp_sat.checked(rows)["holds"] is holds
