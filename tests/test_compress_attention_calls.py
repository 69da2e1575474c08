"""One attention that is called in several ways: with masks and without, for weights and for none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Pretrained, Widths
from espalier.compress.attention_graph import attended, plain_attention
from espalier.compress.calls import Call, follow
from espalier.compress.coupling.groups import cut
from espalier.compress.coupling.proof import without
from espalier.errors import EspalierError
from espalier.testing.plain import check_plain

VECTORS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
WAYS = (
    ("masked", "bare"),
    ("bare", "masked"),
    ("by place", "none"),
    ("padded", "masked by head"),
    ("masked", "by place"),
    ("soft", "masked"),
)


class Reused(nn.Module):
    """One attention for its own tokens and for those of a memory."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.ways = first, second
        self.start, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.memory = nn.Parameter(torch.randn(1, 6, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        memory = self.memory.expand(len(x), -1, -1)
        for way, read in zip(self.ways, (x, memory), strict=True):
            x = x + self.attended(way, x, read)
        return self.head(x)

    def attended(self, way: str, x: Tensor, read: Tensor) -> Tensor:
        future = torch.ones(6, 6, dtype=torch.bool).triu(1)
        padding = torch.zeros(len(x), 6, dtype=torch.bool)
        padding[:, 4:] = True
        mask = {
            "masked": future,
            "masked by head": future.expand(len(x) * self.attention.num_heads, 6, 6),
            "soft": -torch.arange(6.0).expand(6, 6),
        }.get(way)
        if way == "by place":
            found, _ = self.attention(x, read, read, None, False, future)
        elif way in ("bare", "padded"):
            given = {"key_padding_mask": padding} if way == "padded" else {}
            found, _ = self.attention(x, read, read, need_weights=False, **given)
        else:
            found, _ = self.attention(x, read, read, attn_mask=mask, need_weights=False)
        return found


@pytest.mark.parametrize("ways", WAYS)
def test_an_attention_that_is_called_in_two_ways_serves_both(ways: tuple[str, str]):
    torch.manual_seed(0)
    model = Reused(*ways).eval()
    found = Pretrained(model, VECTORS, (Widths(multiple=1),)).cuts[0]
    kept = found.kept({"width:attention": 3})
    small = copy.deepcopy(model)
    cut(small, found.groups, kept)
    whole = without(model, dict(found.groups), kept)
    # where a mask has a row for each head, the reference has those that are left
    expected = (small if "masked by head" in ways else whole)(VECTORS)
    plain_attention(small, attended(follow(model, VECTORS[:1]).calls))
    check_plain(small)
    assert torch.allclose(small(VECTORS), expected, atol=1e-6)


class Weighted(nn.Module):
    """One attention that is asked for each head's weights, for their mean, and for none."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        _, each = self.attention(x, x, x, average_attn_weights=False)
        _, mean = self.attention(x, x, x)
        found, none = self.attention(x, x, x, need_weights=False)
        assert none is None
        return self.head(x * each.amax() + found * mean.amax())


def test_weights_are_given_as_each_call_wants_them():
    torch.manual_seed(0)
    model = Weighted().eval()
    found = Pretrained(model, VECTORS, (Widths(multiple=1),)).cuts[0]
    small = copy.deepcopy(model)
    cut(small, found.groups, found.kept({"width:attention": 2}))
    expected = small(VECTORS)
    plain_attention(small, attended(follow(model, VECTORS[:1]).calls))
    check_plain(small)
    assert torch.allclose(small(VECTORS), expected, atol=1e-6)


def test_an_attention_called_with_batches_and_without_is_refused():
    attention, x = nn.MultiheadAttention(8, 2), VECTORS
    calls = [Call("inner", attention, -1, (t, t, t)) for t in (x, x[0])]
    with pytest.raises(EspalierError, match="inner is called with batches and without"):
        attended(calls)


@pytest.mark.parametrize("masked_first", [True, False])
def test_heads_of_an_attention_called_in_two_ways_are_cut_in_both(masked_first: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.memory = nn.Parameter(torch.randn(1, 4, 16))

        def own(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            mask = torch.triu(torch.full((n, n), float("-inf")), 1)
            return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

        def cross(self, x: Tensor) -> Tensor:
            memory = self.memory.expand(len(x), -1, -1)
            return x + self.attention(x, memory, memory, need_weights=False)[0]

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            return self.head(self.cross(self.own(x)) if masked_first else self.own(self.cross(x)))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 6, 8)
    family = Pretrained(model, x, (Widths(multiple=1),))
    (bound,) = family.cuts
    with torch.no_grad():
        small = family.build({**family.original, "width:attention": 3})(x)
        wanted = without(model, dict(bound.groups), bound.kept({"width:attention": 3}))(x)
        assert torch.allclose(small, wanted, atol=1e-5)
