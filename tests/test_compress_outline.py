"""Pieces looked up by shapes alone are those of real tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import test_compress_pieces_rows as folded
import test_compress_pretrained as plain
import test_compress_users as users
from compress_toys import IMAGES
from espalier.compress import Bits, Depth, Pretrained, Sparsity, Widths
from espalier.costs.pieces import pieces_of
from espalier.testing import check_family


def lite() -> nn.Module:
    """Layers of every kind whose shapes are told without torch's long way."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.GroupNorm(8, 8), nn.SiLU(),
        nn.ConvTranspose2d(8, 8, 2), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 1),
        nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10), nn.Tanh(),
        nn.Linear(10, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4),
    )  # fmt: skip


def vectors() -> nn.Module:
    """Linear layers whose norms and activations are one piece with them."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 16), nn.LayerNorm(16), nn.PReLU(), nn.Linear(16, 10),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Pretrained]] = {
    **{name: lambda name=name: plain.family_of(name) for name in plain.MODELS},  # type: ignore[misc]
    **{name: lambda name=name: users.family_of(name) for name in users.MODELS},  # type: ignore[misc]
    **{name: lambda name=name: folded.family_of(name) for name in folded.FOLDED},  # type: ignore[misc]
    "lite": lambda: Pretrained(lite(), IMAGES),
    "lite in bits": lambda: Pretrained(lite(), IMAGES, (Widths(), Bits((8,)))),
    "bits": lambda: Pretrained(vectors(), IMAGES, (Widths(multiple=4), Bits((4, 8)))),
    "sparsity": lambda: Pretrained(vectors(), IMAGES, (Widths(multiple=4), Sparsity())),
    "vit by width": lambda: Pretrained(plain.ViT(), IMAGES, (Widths(multiple=4), Depth())),
}
WITHOUT = {"language"}  # torch's own attention is other operators without values


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_pieces_looked_up_by_shapes_alone_are_those_of_real_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        family = FAMILIES[name]()
        if whole:
            monkeypatch.setattr("espalier.compress.pieces.units.outline", lambda *given: None)
        rows = family.space.sample(60, np.random.default_rng(0))
        told = [
            [(p.key, p.count, p.work) for p in (part.pieces[i] for i in part.index if i >= 0)]
            for part in pieces_of(family).parts(rows)
        ]
        found.append((told, family.units()))
        assert (family._pieces()._outline is None) == (whole or name in WITHOUT)
    assert found[0] == found[1]


class Asking(nn.Module):
    """What it computes hangs on the values that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x.relu() if float(x.detach().sum()) > -1e9 else x)  # type: ignore[no-any-return]


def test_a_model_that_asks_for_values_is_looked_at_with_them() -> None:
    family = Pretrained(Asking(), torch.randn(2, 8), Widths())
    assert family._pieces()._outline is None
    check_family(family)
