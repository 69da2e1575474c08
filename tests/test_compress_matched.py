"""A block that keeps shapes may only go where the widths on both of its sides stay alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Depth, Pretrained, Widths
from espalier.compress.cut import BoundCut
from espalier.compress.matched import matched
from espalier.space import Decision, Space, ordinal
from shrink_toys import Small


class Chain(nn.Module):
    """A layer of equal shapes between two others, no shortcut around it."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(1, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.middle(self.into(x).relu()).relu().mean((2, 3)))
        return out


def test_every_candidate_runs_and_the_middle_can_go_where_widths_are_alike() -> None:
    x = torch.randn(2, 1, 6, 6)
    family = Pretrained(Chain(), x, (Widths(multiple=2, steps=4), Depth()))
    names = ("width:into", "width:middle", "depth:middle")
    assert set(family.space.names) == set(names)
    candidates = family.space.decode(family.space.enumerate())
    for candidate in candidates:
        assert family.build(candidate)(x).shape == (2, 3)
    options = family.space["width:into"].options
    wanted = {(a, b, d) for a, b, d in itertools.product(options, options, (0, 1)) if d or a == b}
    assert {tuple(c[n] for n in names) for c in candidates} == wanted


@pytest.mark.parametrize("cuts", [(Widths(), Depth()), (Widths(multiple=2), Depth())])
def test_residual_blocks_need_no_such_rule(cuts: tuple[Widths, Depth]) -> None:
    family = Pretrained(Small(), torch.randn(2, 1, 8, 8), cuts)
    assert any(name.startswith("depth:") for name in family.space.names)
    assert not family.space.constraints


def test_the_last_layer_can_go_only_where_the_output_keeps_its_shape() -> None:
    """The width before it would become the output's: one width, no pair."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(2, 6)
    family = Pretrained(model, x, (Widths(multiple=2, steps=4), Depth()))
    rows = family.space.decode(family.space.enumerate())
    assert {family.build(c)(x).shape for c in rows} == {(2, 8)}
    assert sorted((c["width:0"], c["depth:2"]) for c in rows) == [
        *((2, 1), (4, 1), (6, 1)),
        *((8, 0), (8, 1)),
    ]


class Asked(nn.Module):
    """Attention whose queries are as wide as the input: heads times a fixed number each."""

    def __init__(self, heads: int, each: int, before: bool) -> None:
        super().__init__()
        width = heads * each
        self.heads, self.each = heads, each
        self.stem = nn.Linear(6, width)
        self.more = nn.Sequential(nn.Linear(width, width)) if before else nn.Identity()
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.query = nn.Sequential(nn.Linear(width, width))
        self.out, self.head = nn.Linear(width, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self.stem(x).relu()).relu()
        b, n, _ = x.shape
        k = self.key(x).view(b, n, self.heads, self.each).permute(0, 2, 3, 1)
        v = self.value(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
        q = self.query(x[:, ::2]).view(b, -1, self.heads, self.each).permute(0, 2, 1, 3)
        y = ((q @ k).softmax(-1) @ v).transpose(1, 2).reshape(b, q.shape[2], -1)
        return self.head(self.out(y).relu().mean(1))


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_left_out_queries_bind_the_width_and_the_heads(heads: bool, before: bool) -> None:
    x = torch.randn(2, 4, 6)
    cuts = Widths(multiple=4, steps=3, heads=heads), Depth()
    family = Pretrained(Asked(4, 4, before), x, cuts)
    assert "depth:query" in family.space.names or "depth:query.0" in family.space.names
    drawn = family.space.sample(60, np.random.default_rng(0))
    for candidate in family.space.decode(drawn):
        assert family.build(candidate)(x).shape == (2, 3)


class Fixed(BoundCut):
    """Decisions and the layers that they change, without a model."""

    def __init__(self, changed: dict[Decision, str]) -> None:
        self.decisions = tuple(changed)
        self._changed = changed

    def layers(self) -> dict[str, tuple[str, ...]]:
        paths = "".join(dict.fromkeys("".join(self._changed.values())))
        return {p: tuple(d.name for d, of in self._changed.items() if p in of) for p in paths}

    def apply(self, *_: object) -> None:
        raise NotImplementedError

    def slice(self, *_: object) -> None:
        raise NotImplementedError


def space_of(changed: dict[Decision, str], fits: Callable[[dict[str, Any]], bool]) -> Space:
    decisions = list(changed)
    full = {d.name: d.options[-1] for d in decisions}
    return Space(decisions, matched(decisions, [Fixed(changed)], lambda some: fits(full | some)))


def test_within_a_block_that_is_left_out_nothing_is_asked() -> None:
    outer, inner = ordinal("depth:o", 0, 1), ordinal("depth:i", 0, 1, when={"depth:o": 1})
    one, two = ordinal("width:a", 2, 4, 6), ordinal("width:b", 2, 4, 6)
    changed = {outer: "xyz", inner: "y", one: "xy", two: "yz w"}

    def fits(c: dict[str, Any]) -> bool:
        return not c["depth:o"] or bool(c["depth:i"]) or c["width:a"] == c["width:b"]

    space = space_of(changed, fits)
    rows = space.decode(space.enumerate())
    assert all(fits({"depth:i": 1} | dict(c)) for c in rows)
    assert len(rows) == 9 + 9 + 3  # outer left out; both kept; inner left out


def test_three_widths_that_only_fit_together_are_tied() -> None:
    block = ordinal("depth:i", 0, 1)
    names = [f"width:{n}" for n in "abc"]
    changed = {block: "y", **{ordinal(n, 2, 4, 6): "y" + n[-1] for n in names}}
    space = space_of(changed, lambda c: c["depth:i"] or len({c[n] for n in names}) == 1)
    rows = space.decode(space.enumerate())
    assert len(rows) == 27 + 3


def test_widths_that_fit_alone_but_not_together_stay_as_they_are() -> None:
    block = ordinal("depth:i", 0, 1)
    changed = {block: "y", ordinal("width:a", 2, 4, 6): "ya", ordinal("width:b", 2, 4, 6): "yb"}
    space = space_of(changed, lambda c: c["depth:i"] or c["width:a"] + c["width:b"] > 9)
    rows = space.decode(space.enumerate())
    assert [c for c in rows if not c["depth:i"]] == [{"depth:i": 0, "width:a": 6, "width:b": 6}]
