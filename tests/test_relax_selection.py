"""Selection from a trained supernet, on supernets whose accuracy is a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nets.darts_cells import DARTSCells
from espalier.solvers.relax.perturbation import Perturbation, decided, gated, ordered, waking
from espalier.solvers.relax.sampled import Sampled, drawn
from espalier.space import Space, choice

EDGES = Space([choice(f"edge{i}", "none", "skip", "conv") for i in range(3)])
PAIRS = tuple(combinations((0, 1, 2), 2))
# a node that takes two of three inputs, and an operator on each
NODE = Space(
    [
        choice("inputs", *(f"{a}-{b}" for a, b in PAIRS)),
        *(
            choice(
                f"op_{i}",
                "skip",
                "conv",
                when={"inputs": [f"{a}-{b}" for a, b in PAIRS if i in (a, b)]},
            )
            for i in range(3)
        ),
    ]
)


class Shared(nn.Module):
    """Weights that a selection may tune, over a space."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.weight = nn.Parameter(torch.zeros(2))


def state_of(
    space: Space,
    logits: Mapping[str, list[float]],
    accuracy: Callable[[Mapping[str, Tensor], Shared], float],
    seed: int = 0,
) -> Any:
    """What a selection is given, with an accuracy by formula; `tuned` lists what was tuned."""
    supernet = Shared(space)
    tuned: list[dict[str, Any]] = []

    def tune(weights: Mapping[str, Any], epochs: int) -> None:
        tuned.append(dict(weights))
        with torch.no_grad():
            supernet.weight.add_(float(epochs))

    given = {name: torch.softmax(torch.tensor(found), 0) for name, found in logits.items()}
    return SimpleNamespace(
        supernet=supernet,
        mixture=lambda: given,
        probabilities=given,
        base=space.decode(space.corner(last=True))[0],
        one_hot=lambda name, index: torch.eye(space[name].count)[index],
        seed=seed,
        evaluate=lambda weights: accuracy(weights, supernet),
        tune=tune,
        tuned=tuned,
    )


def test_perturbation_keeps_what_hurts_most_and_not_what_weighs_most() -> None:
    logits = {"edge0": [0.0, 3.0, 0.0], "edge1": [0.0, 3.0, 0.0], "edge2": [2.0, 0.0, 0.0]}
    worth = {
        "edge0": torch.tensor([0.0, 0.01, 1.0]),  # conv is worth more than its small weight hides
        "edge1": torch.tensor([0.0, 1.0, 1.0]),  # equally good: the weight decides
        "edge2": torch.tensor([-0.1, 0.2, 0.1]),  # removing none would help
    }

    def accuracy(weights: Mapping[str, Tensor], _: Shared) -> float:
        return float(sum((w * worth[name]).sum() for name, w in weights.items()))

    state = state_of(EDGES, logits, accuracy)
    chosen = Perturbation()(state)
    # a sum of parts: each part's loss is its weight times its worth
    for name, values in logits.items():
        lost = torch.softmax(torch.tensor(values), 0) * worth[name]
        assert chosen[name] == EDGES[name].options[int(lost.argmax())]
    assert chosen.to_json() == {"edge0": "conv", "edge1": "skip", "edge2": "skip"}


def test_decisions_are_fixed_one_by_one_and_tuned_between() -> None:
    seen: list[float] = []

    def accuracy(weights: Mapping[str, Tensor], supernet: Shared) -> float:
        seen.append(supernet.weight[0].item())
        return float(weights["edge0"][2] + weights["edge1"][2] + weights["edge2"][2])

    state = state_of(EDGES, {name: [0.0, 0.0, 0.0] for name in EDGES.names}, accuracy)
    picked = Perturbation(tune_epochs=2)
    assert set(picked(state).to_json().values()) == {"conv"}
    order = ordered(EDGES, list(EDGES.names), 0)
    assert [row["decision"] for row in picked.log] == order
    assert seen == [0.0] * 3 + [2.0] * 3 + [4.0] * 3  # no tuning after the last
    for count, weights in enumerate(state.tuned, 1):
        hard = [name for name, w in weights.items() if w.tolist() == [0.0, 0.0, 1.0]]
        assert sorted(hard) == sorted(order[:count])
    orders = {tuple(ordered(EDGES, list(EDGES.names), seed)) for seed in range(20)}
    assert len(orders) == 6  # every order comes up


@pytest.mark.parametrize("relaxed", [True, False])
def test_topology_keeps_the_inputs_whose_removal_hurts_most(relaxed: bool) -> None:
    worth = {0: 0.5, 1: 0.1, 2: 0.4}

    def accuracy(weights: Mapping[str, Tensor], _: Shared) -> float:
        pairs = weights.get("inputs", torch.ones(3))  # not named: every edge runs
        reach = {
            i: float(weights[f"op_{i}"].sum())
            * sum(float(pairs[k]) for k, pair in enumerate(PAIRS) if i in pair)
            for i in range(3)
        }
        # an input is worth the same however much of it is there, until nothing is
        conv = sum(0.01 * float(weights[f"op_{i}"][1]) for i in range(3))
        return sum(worth[i] for i in range(3) if reach[i] > 0) + conv

    names = {f"op_{i}": [1.0, 0.0] for i in range(3)}
    if relaxed:
        names["inputs"] = [0.0, 0.0, 0.0]
    picked = Perturbation(tune_epochs=0)
    chosen = picked(state_of(NODE, names, accuracy))
    assert picked.log[-1]["decision"] == "inputs"  # after the operators, in any order
    assert chosen.to_json() == {"inputs": "0-2", "op_0": "conv", "op_2": "conv"}
    assert gated(NODE, "inputs") == {"op_0": {0, 1}, "op_1": {0, 2}, "op_2": {1, 2}}
    assert gated(NODE, "op_0") == {}


def test_options_that_switch_on_more_or_less_are_judged_by_themselves() -> None:
    space = Space([choice("depth", 1, 2), choice("kernel", 3, 5, when={"depth": (2,)})])
    assert gated(space, "depth") == {}


def test_an_edge_keeps_its_strength_when_it_is_fixed() -> None:
    state = state_of(EDGES, {name: [0.0, 0.0, 0.0] for name in EDGES.names}, lambda w, s: 0.0)
    weak = {name: 0.25 * w for name, w in state.mixture().items()}
    state.mixture = lambda: weak
    Perturbation()(state)
    first = ordered(EDGES, list(EDGES.names), 0)[0]
    assert state.tuned[0][first].sum() == pytest.approx(0.25)


def test_sampled_takes_the_best_of_different_candidates_and_puts_weights_back() -> None:
    def accuracy(chosen: Mapping[str, Any], supernet: Shared) -> float:
        tuned = supernet.weight[0].item()
        assert tuned == 3.0  # each is tuned from the shared weights, not from the last one's
        hits = (chosen["edge0"] == "none", chosen["edge1"] == "skip", chosen["edge2"] == "conv")
        return float(np.dot(hits, (1, 2, 4)))

    logits = {name: [0.0, 0.0, 1.0] for name in EDGES.names}
    state = state_of(EDGES, logits, accuracy)
    picked = Sampled(n=8, epochs=3)
    chosen = picked(state)
    assert state.supernet.weight.abs().sum().item() == 0.0
    scores = [row["accuracy"] for row in picked.log]
    assert len({str(row["candidate"]) for row in picked.log}) == len(scores) == 8
    assert picked.log[0]["candidate"] == dict.fromkeys(EDGES.names, "conv")  # the likeliest
    assert chosen.to_json() == picked.log[int(np.argmax(scores))]["candidate"]


def test_draws_follow_the_probabilities() -> None:
    p = {name: torch.tensor([0.0, 0.25, 0.75]) for name in EDGES.names}
    found = drawn(EDGES, p, {}, 100, seed=1)
    assert len(found) == 8  # what has probability 0 never comes
    assert all("none" not in candidate.to_json().values() for candidate in found)
    firsts = [drawn(EDGES, p, {}, 2, seed)[1]["edge0"] for seed in range(60)]
    assert 10 <= firsts.count("skip") <= 35  # the second differs from the first: over a quarter


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(EspalierError, match="tune_epochs"):
        Perturbation(tune_epochs=-1)
    with pytest.raises(EspalierError, match="n must be 1"):
        Sampled(n=0)


def test_the_topology_of_darts_cells_is_found() -> None:
    space = DARTSCells((3, 16, 16), 10, channels=4, cells=3, nodes=2).space
    inputs = [name for name in space.names if name.endswith(".inputs")]
    edges = {name: torch.ones(7) / 7 for name in space.names if ".op_" in name}
    assert waking(space, edges) == inputs
    assert set(ordered(space, [*inputs, *edges], 0)[-len(inputs) :]) == set(inputs)
    for name in inputs:
        after = decided(space, edges, name, 0)
        left = [child for child in gated(space, name) if after[child].sum() > 0]
        assert len(left) == 2  # of three
