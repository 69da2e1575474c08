"""Learning to rank: the pairwise hinge loss, and the loop that trains scorers with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.estimators.predictors.inputs import Batch


@dataclass(frozen=True)
class Learning:
    """How a scorer is trained.

    AdamW with a one-cycle rate up to `rate`, `steps` steps of at most `batch` graphs; pairs whose
    labels differ by no more than `gap` teach nothing; `margin` is the hinge's.
    """

    steps: int = 200
    rate: float = 3e-3
    decay: float = 1e-3
    batch: int = 128
    margin: float = 0.1
    gap: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not self.rate > 0:
            raise EspalierError(
                "learning takes 1 step or more, a batch of 2 or more and a rate above 0, got "
                f"steps={self.steps}, batch={self.batch}, rate={self.rate}"
            )


def hinge(scores: Tensor, labels: Tensor, margin: float, gap: float = 0.0) -> Tensor:
    """Pairwise hinge loss `(m,)` of scores `(m, n)` for labels `(n,)` or `(m, n)`.

    The mean of max(0, margin - (s_a - s_b)) over the pairs with y_a > y_b + gap; 0 without pairs.
    Labels that are NaN make no pairs.
    """
    labels = labels.expand(scores.shape)
    pairs = (labels.unsqueeze(2) - labels.unsqueeze(1) > gap).float()
    behind = F.relu(margin - (scores.unsqueeze(2) - scores.unsqueeze(1)))
    return (behind * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def learn(
    scorer: nn.Module,
    batch: Batch,
    labels: Tensor,
    learning: Learning,
    seed: int,
    parameters: Iterable[nn.Parameter] | None = None,
    forward: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Trains `scorer` on labels `(n,)`, or `(members, n)` with an order for each member.

    Members are summed, so each learns as if it were alone. The batches hang on `seed`.
    """
    order = torch.Generator().manual_seed(seed)
    score = forward or scorer
    optimiser = torch.optim.AdamW(
        scorer.parameters() if parameters is None else parameters,
        lr=learning.rate,
        weight_decay=learning.decay,
    )
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        learning.rate,
        # its first phase must be longer than a step: too few steps are the begin of more
        total_steps=max(learning.steps, 8),
        pct_start=max(0.1, 2 / max(learning.steps, 8)),
    )
    scorer.train()
    left = torch.empty(0, dtype=torch.long)
    for _ in range(learning.steps):
        part, truth = batch, labels
        if len(batch) > learning.batch:
            if len(left) < learning.batch:
                left = torch.randperm(len(batch), generator=order)
            rows, left = left[: learning.batch], left[learning.batch :]
            part, truth = batch.take(rows), labels[..., rows]
        loss = hinge(score(part), truth, learning.margin, learning.gap).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        rates.step()
    scorer.eval()
