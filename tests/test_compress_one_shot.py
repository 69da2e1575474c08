"""Weights removed in closed form: the masks are as asked, the rest is the least squares."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from espalier.compress.one_shot import sparsify
from espalier.compress.removal import METHODS, magnitude, one_by_one, together, wanda
from espalier.errors import EspalierError

DAMP = 0.01


def drawn(rows: int = 5, columns: int = 16, n: int = 200):
    """Weights, inputs that hang together, their Gram matrix, and that matrix damped."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, columns)) @ (
        np.eye(columns) + 0.5 * rng.normal(size=(columns, columns))
    )
    w, gram = rng.normal(size=(rows, columns)), x.T @ x
    damped = gram + DAMP * gram.diagonal().mean() * np.eye(columns)
    return torch.tensor(w), torch.tensor(gram), damped


def lost(found: torch.Tensor, weight: torch.Tensor, gram: np.ndarray) -> float:
    step = (found - weight).numpy()
    return float(((step @ gram) * step).sum())


@pytest.mark.parametrize("kept", [0.5, 0.7, "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_as_many_are_kept_as_asked(method, kept) -> None:
    weight, gram, _ = drawn()
    left = METHODS[method](weight, gram, kept) != 0
    if isinstance(kept, str):
        n, m = map(int, kept.split(":"))
        assert (left.reshape(5, -1, m).sum(-1) == n).all()
    else:
        assert int(left.sum()) == pytest.approx(kept * 80, abs=3)


@pytest.mark.parametrize("kept", [0.5, "2:4"])
def test_what_is_left_is_the_least_squares_on_what_is_left(kept) -> None:
    weight, gram, damped = drawn()
    found = together(weight, gram, kept)
    for w0, w in zip(weight.numpy(), found.numpy(), strict=True):
        left = w != 0
        move = np.linalg.solve(damped[np.ix_(left, left)], damped[np.ix_(left, ~left)] @ w0[~left])
        assert np.allclose(w[left], w0[left] + move)


def test_of_one_group_the_best_pair_goes() -> None:
    weight, gram, damped = drawn(columns=4)
    found = together(weight, gram, "2:4")
    for w0, w in zip(weight, found, strict=True):
        losses = {}
        for gone in itertools.combinations(range(4), 2):
            left = [i for i in range(4) if i not in gone]
            move = np.linalg.solve(
                damped[np.ix_(left, left)], damped[np.ix_(left, gone)] @ w0.numpy()[list(gone)]
            )
            step = -w0.numpy().copy()
            step[left] = move
            losses[gone] = step @ damped @ step
        assert tuple(np.flatnonzero(w.numpy() == 0)) == min(losses, key=losses.__getitem__)


def test_one_by_one_is_the_surgeon_of_each_column_in_turn() -> None:
    weight, gram, damped = drawn(columns=12)
    found = one_by_one(weight, gram, 0.5)
    w = weight.numpy().copy()
    for column in range(12):  # each removed weight's optimal step, on the columns not passed yet
        inverse = np.linalg.inv(damped[column:, column:])
        gone = found.numpy()[:, column] == 0
        w[gone, column:] -= np.outer(w[gone, column] / inverse[0, 0], inverse[0])
    assert np.allclose(found.numpy(), w)


@pytest.mark.parametrize("kept", [0.5, "2:4"])
def test_removing_together_loses_least(kept) -> None:
    weight, gram, damped = drawn(20, 32)
    found = {name: lost(method(weight, gram, kept), weight, damped) for name, method in METHODS.items()}  # fmt: skip
    assert min(found, key=found.__getitem__) == "apt"
    assert found["apt"] < 0.9 * found["sparsegpt"]


def test_the_simple_rules_compare_what_they_say() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, -0.3, 0.4]])
    gram = torch.diag(torch.tensor([1.0, 1.0, 16.0, 100.0]))
    assert (magnitude(weight, gram, 0.5) != 0).tolist() == [[True] * 4, [False] * 4]
    pairs = [[True, True, False, False], [False, False, True, True]]
    assert (magnitude(weight, gram, "2:4") != 0).tolist() == pairs
    kept = [[False, False, True, True], [False, False, True, True]]
    assert (wanda(weight, gram, 0.5) != 0).tolist() == kept  # |w| |x|: 4 3 8 10; .1 .2 1.2 4
    assert (wanda(weight, gram, "2:4") != 0).tolist() == kept


@pytest.mark.parametrize("kept", ["4:4", "x", 1.0, 0, True])
def test_nonsense_is_refused(kept) -> None:
    weight, gram, _ = drawn()
    with pytest.raises(EspalierError, match="'N:M', 0 < N < M, or a share"):
        together(weight, gram, kept)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.odd, self.unused = nn.Linear(8, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.odd(x))


def test_layers_see_what_the_pruned_ones_before_them_give() -> None:
    torch.manual_seed(0)
    model = Twice()
    first, second = (layer.weight.detach().clone() for layer in (model.up, model.down))
    tokens = torch.randint(11, (20, 5))
    told = sparsify(model, tokens, "2:4", method="sparsegpt")
    with torch.no_grad():
        x = model.embed(tokens).reshape(-1, 8)
        assert torch.allclose(model.up.weight, one_by_one(first, x.T.double() @ x.double(), "2:4"))
        y = torch.relu(model.up(x)).double()  # of the pruned layer
        assert torch.allclose(model.down.weight, one_by_one(second, y.T @ y, "2:4"), atol=1e-5)
        wanted = y @ second.double().T
        error = (wanted - y @ model.down.weight.double().T).square().sum() / wanted.square().sum()
    assert [row["layer"] for row in told["layers"]] == ["up", "down", "odd"]
    assert told["layers"][1]["error"] == pytest.approx(float(error), rel=1e-4)
    assert {row["zeros"] for row in told["layers"]} == {0.5}
    assert {row["layer"]: row["reason"] for row in told["skipped"]} == {
        "head": "6 inputs are not whole groups of 4",
        "unused": "it never runs",
    }
    assert json.loads(json.dumps(told)) == told


def test_what_can_not_be_done_is_said() -> None:
    with pytest.raises(EspalierError, match="unknown way to remove weights 'wonda'"):
        sparsify(Twice(), torch.zeros(1, 2, dtype=torch.long), method="wonda")
    with pytest.raises(EspalierError, match="matches no linear layer"):
        sparsify(Twice(), torch.zeros(1, 2, dtype=torch.long), layers=("blocks.*",))
