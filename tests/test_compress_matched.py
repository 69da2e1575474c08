"""A block that keeps shapes may only go where the widths on both of its sides stay alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Depth, Pretrained, Widths
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
