"""Tables that are longer than the example: what it does not reach stays as it is."""

import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Pretrained, Widths

LONGEST, WIDTH, TOKENS = 50, 16, 20
SHORT = torch.randint(0, TOKENS, (2, 8), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(0, TOKENS, (2, 30), generator=torch.Generator().manual_seed(1))


class Reading(nn.Module):
    """Tokens with positions from a buffer or a parameter, and a causal mask in a buffer."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        table = torch.randn(1, LONGEST, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(LONGEST, LONGEST)))
        if learned:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.size(1)
        x = self.embed(tokens) + self.positions[:, :n]
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        scores = scores.masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        x = x + scores.softmax(-1) @ self.v(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("learned", [False, True])
def test_rows_that_the_example_does_not_reach_are_no_widths(learned: bool) -> None:
    torch.manual_seed(0)
    model = Reading(learned).eval()
    family = Pretrained(model, SHORT, (Widths(multiple=1),))
    named = {name.partition(":")[2].partition("#")[0] for name in family.space.names}
    assert "up" in named
    assert not named & {"positions", "mask"}
    rows = [i for i in family.ignored if i.layer in ("positions", "mask")]
    assert {i.layer for i in rows} == {"positions", "mask"}
    assert all("nothing reads it" in i.reason for i in rows)
    family.build({**family.original, "width:up": 12})(LONG)
    with torch.no_grad():
        assert torch.allclose(family.build(family.original)(LONG), model(LONG), atol=1e-5)


def test_a_layer_whose_output_is_read_by_none_without_bias_is_left_alone() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = nn.Linear(8, 16), nn.Linear(8, 16, bias=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.spare(x)
            return self.head(torch.relu(self.body(x)))

    family = Pretrained(Spare(), torch.randn(2, 8), (Widths(multiple=1),))
    assert family.space.names == ("width:body",)
    assert [i.layer for i in family.ignored if "nothing reads it" in i.reason] == ["spare"]
