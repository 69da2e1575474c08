"""Ternary experts and their code: parts checked by themselves, the recipe runs."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from espalier.errors import EspalierError

pytest.importorskip("transformers")

from espalier import recipes
from espalier.recipes import qmoe
from espalier.recipes._parts.ternary import Words, decode, encode, entropy, product, ternary


def signs(rows: int, d: int, zeros: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = [(1 - zeros) / 2, zeros, (1 - zeros) / 2]
    return rng.choice(np.array([-1, 0, 1], dtype=np.int8), (rows, d), p=p)


def test_words_are_the_most_probable_sequences() -> None:
    words = Words.of(0.8, bits=9)
    assert len(words.values) == 512
    chance = {0: math.log(0.8), 1: math.log(0.1), -1: math.log(0.1)}
    every = [
        s for n in (2, 4, 6) for s in itertools.product((0, 1, -1), repeat=n)
    ]  # longer ones of zeros come on top
    best = sorted((sum(map(chance.__getitem__, s)) for s in every), reverse=True)
    mine = [tuple(v[:n].tolist()) for v, n in zip(words.values, words.length, strict=True)]
    assert len(set(mine)) == len(mine)
    least = min(sum(map(chance.__getitem__, s)) for s in mine[1:])
    short = [s for s in mine if 0 < len(s) <= 6]
    above = [s for s in every if sum(map(chance.__getitem__, s)) > least + 1e-9]
    assert set(above) <= set(short)
    assert best[0] >= least
    for number, follow in enumerate(words.follow):
        for pair, to in enumerate(follow):
            if to >= 0:
                a, b = [(a, b) for a in (0, 1, -1) for b in (0, 1, -1)][pair]
                assert mine[to] == (*mine[number], a, b)
    with pytest.raises(EspalierError, match="too few"):
        Words.of(0.999, bits=4)


@pytest.mark.parametrize("d", [1, 7, 64, 129])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
def test_the_code_is_exact_row_by_row(d: int, zeros: float) -> None:
    words = Words.of(0.8, bits=12)
    values = signs(9, d, zeros)
    code = encode(values, words)
    assert np.array_equal(decode(code, words), values)
    assert np.array_equal(decode(code, words, slice(3, 5)), values[3:5])
    alone = encode(values[4:5], words)  # rows do not depend on each other
    assert np.array_equal(alone.words, code.words[code.starts[4] : code.starts[5]])


def test_the_code_is_near_the_entropy_where_rows_are_long() -> None:
    values = signs(20, 4000, 0.9)
    code = encode(values, Words.of(0.9))
    assert entropy(values) == pytest.approx(0.9 * -math.log2(0.9) - 0.1 * math.log2(0.05), rel=0.03)
    assert entropy(values) < code.bits < 1.15 * entropy(values) + 0.05
    assert code.bits_with_starts == pytest.approx(code.bits + 16 / 4000)
    low, high = -np.ones(20), 2 * np.ones(20)
    x = np.random.default_rng(1).standard_normal((3, 4000))
    plain = x @ np.where(values > 0, 2.0, values.astype(float)).T
    assert np.allclose(product(code, Words.of(0.9), low, high, x, block=7), plain)


def test_ternary_rows_have_their_least_and_largest() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 10, 40, generator=g)
    x = torch.randn(3, 400, 8, generator=g) @ torch.randn(3, 8, 40, generator=g)
    gram = (x.mT @ x).double()
    near, gptq = ternary(weight, None), ternary(weight, gram)
    for n, row in itertools.product(range(3), range(10)):
        w = weight[n, row]
        grid = torch.stack([w.min(), torch.zeros(()), w.max()])
        best = (w[:, None] - grid).abs().argmin(1) - 1
        assert torch.equal(near.signs[n, row].long(), best)
        assert set(gptq.values()[n, row].tolist()) <= set(grid.tolist())
    errors = [
        ((t.values() - weight).double() @ gram @ (t.values() - weight).double().mT)
        .diagonal(dim1=1, dim2=2)
        .sum(1)
        for t in (gptq, near)
    ]
    assert (errors[0] < 0.5 * errors[1]).all()


def test_rows_share_their_levels() -> None:
    weight = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    found = ternary(weight, None, rows=4)
    assert torch.equal(found.high[0, :4], weight[0, :4].max().expand(4))
    assert torch.equal(found.low[1, 4:], weight[1, 4:].min().expand(4))
    with pytest.raises(EspalierError, match="whole groups of 3"):
        ternary(weight, None, rows=3)


def test_qmoe_runs() -> None:
    found = recipes.run("qmoe")
    assert json.loads(json.dumps(found)) == found
    both = found["rows_together"]
    assert set(both) == {"16", "1"}
    for rows in both.values():
        code = rows["gptq"]["code"]
        assert code["exact"]
        assert code["product_error"] < 1e-6
        assert code["entropy"] <= code["bits_per_weight"] < code["with_starts"]
    assert both["16"]["gptq"]["code"]["zeros"] > both["1"]["gptq"]["code"]["zeros"]
    lost = both["16"]["gptq"]["bits_per_byte"] - found["original"]
    assert found["check"]["lost"]["gptq"] == pytest.approx(lost)


def test_the_verdict_of_qmoe_needs_all_three() -> None:
    def holds(gptq: float, bits: float, exact: bool) -> bool:
        code = {"bits_per_weight": bits, "exact": exact}
        rows = {"nearest": {"bits_per_byte": 4.0}, "gptq": {"bits_per_byte": gptq, "code": code}}
        return bool(qmoe.verdict(2.0, rows)["holds"])

    assert holds(3.0, 1.0, True)
    assert not holds(3.0, 1.01, True)
    assert not holds(3.0, 1.0, False)
    assert not holds(3.01, 1.0, True)
