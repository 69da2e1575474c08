"""Several networks in one: nested masks by one score a unit, with weights that all of them share.

All-in-One (Gong et al., ICCAD 2022): a processor that lowers its frequency switches to a smaller network at
once, because it is the same weights under another threshold. What each level has for itself are its norms.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.compress.gating import unit_gates
from espalier.errors import BudgetError
from espalier.problem import Limits
from espalier.solvers.prune.budget import Budget
from espalier.solvers.prune.pricing import budgeted
from espalier.solvers.prune.topk import TopUnits
from espalier.solvers.relax import Moment
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe, loop, losses
from espalier.train.loop import Progress
from espalier.train.precision import Format, autocast
from espalier.train.seeds import generator

if TYPE_CHECKING:
    from espalier.compress.pretrained import Pretrained

_RATE, _EVERY = 0.05, 4  # of the scores at first; steps between thresholds
_DRAWS = 91  # purpose of the random stream


class _Switch(nn.Module):
    """A norm for each level, of which one runs."""

    def __init__(self, norm: nn.Module, levels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(levels))
        self.at = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norms[self.at](x)
        return out


class Nested(nn.Module):
    """A model with nested levels, the first whole, each further one within its budget.

    `candidates`: what each level keeps, of the family's space. `run(level)` sets what `forward` runs.
    """

    def __init__(self, family: Pretrained, within: Sequence[Limits]) -> None:
        super().__init__()
        self.gated = unit_gates(family)
        self.budgets = [budgeted(self.gated, limits) for limits in within]
        _check(self.budgets)
        self._gates = [TopUnits(budget, None) for budget in self.budgets]
        for gates in self._gates:
            gates.start(self.gated, self.gated.mixable, generator(0, _DRAWS))
        scores = self.gated.importances()
        self.levels = 1 + len(self.budgets)
        self._switches: list[_Switch] = []
        for path, module in list(self.gated.model.named_modules()):
            if isinstance(module, _BatchNorm):
                switch = _Switch(module, self.levels)
                parent, _, name = path.rpartition(".")
                setattr(self.gated.model.get_submodule(parent), name, switch)
                self._switches.append(switch)
        for index, name in enumerate(self.gated.mixable):
            self.register_buffer(f"score_{index}", scores[name])
        self.candidates: list[Candidate] = [family.original]

    @property
    def scores(self) -> dict[str, Tensor]:
        """The score of each unit `(units,)`, by decision."""
        return {n: self.get_buffer(f"score_{i}") for i, n in enumerate(self.gated.mixable)}

    def masks(self, level: int, scores: Mapping[str, Tensor]) -> dict[str, Any]:
        """The masks of a level, with the gradient of the scores; the whole model has none."""
        if level == 0:
            return {}
        given: Any = scores
        return dict(self._gates[level - 1].weights(given, Moment("architecture", 0, 0.0)))

    def refresh(self) -> None:
        """Finds each level's threshold for the present scores."""
        given: Any = self.scores
        for gates in self._gates:
            gates.after_step(given, {})

    def settle(self) -> None:
        """Decides what each level keeps: within its budget, and within the level before it."""
        given: Any = self.scores
        self.gated.scores = self.scores
        self.candidates = [self.candidates[0]]
        for gates, budget in zip(self._gates, self.budgets, strict=True):
            kept, before = gates.kept(given), self.candidates[-1]
            units = self.gated.units
            found = budget.settle(np.array([float(kept[n]) / units[n] for n in budget.names]))
            inside: Any = {n: min(found[n], before[n]) for n in budget.names}
            self.candidates.append(self.gated.space.candidate({**found, **inside}))

    def run(self, level: int, masks: Mapping[str, Any] | None = None) -> None:
        """Runs a level from now on: by given masks, or by its candidate."""
        for switch in self._switches:
            switch.at = level
        if masks is None:
            self.gated.activate(self.candidates[level])
        else:
            self.gated.mix(masks)

    def forward(self, x: Tensor) -> Tensor:
        """The level that runs."""
        out: Tensor = self.gated(x)
        return out

    def network(self, level: int) -> nn.Module:
        """A level alone, plain, its units cut out."""
        model = copy.deepcopy(self.gated.model)
        for path, module in list(model.named_modules()):
            if isinstance(module, _Switch):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module.norms[level])
        assert self.gated.family is not None
        twin = copy.copy(self.gated.family)
        twin.model = model.cpu().eval()
        named = {n.partition(":")[2]: score.cpu() for n, score in self.scores.items()}
        return twin.with_scores(named).build(self.candidates[level])

    def bytes(self) -> dict[str, int]:
        """Of all levels together, and of the model alone, at 4 bytes a number."""
        norms = sum(t.numel() for s in self._switches for t in s.norms[0].state_dict().values())
        every = sum(t.numel() for t in self.gated.model.state_dict().values())
        scores = sum(score.numel() for score in self.scores.values())
        return {"all": 4 * (every + scores), "one": 4 * (every - (self.levels - 1) * norms)}


def nested(
    family: Pretrained,
    task: Task,
    within: Sequence[Limits],
    recipe: Recipe,
    *,
    distil: float = 0.5,
    rate: float = _RATE,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Nested:
    """Trains all levels at once: in each step every one on the same batch.

    `within`: the limits of each level after the whole one, tighter and tighter. Smaller levels learn
    from the labels and, by `distil`, from the whole one. Scores go down the sum of all gradients for
    the masks. Errors: `BudgetError` for limits that do not get tighter, and as of `budgeted`.
    """
    net = Nested(family, within)
    moved: dict[str, Tensor] = {}

    def epoch_of(epoch: int, chosen: Format) -> loop.Step:
        net.refresh()  # what an epoch depends on is in its checkpoint, thresholds are not

        def step(x: Tensor, y: Tensor, index: int) -> Tensor:
            moved.update({n: s.clone().requires_grad_() for n, s in net.scores.items()})
            whole: Tensor | None = None
            total = torch.zeros(())
            for level in range(net.levels):
                net.run(level, net.masks(level, moved))
                with autocast(chosen, x.device.type):
                    outputs = net(x).float()
                loss = losses.hard(task, outputs, y, recipe.label_smoothing)
                if whole is None:
                    whole = outputs.detach()
                else:
                    loss = (1 - distil) * loss + distil * losses.soft(outputs, whole, y)
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
            return total / net.levels

        return step

    def after_step(epoch: int, step: int) -> None:
        steps = recipe.epochs * loop.steps_of(task, recipe.batch)
        done = epoch * loop.steps_of(task, recipe.batch) + step
        descend(net.scores, moved, rate * (1 - done / steps))
        if done % _EVERY == 0:
            net.refresh()

    settings = {"method": "nested", "within": [dict(w) for w in within], "distil": distil}
    settings["rate"] = rate
    loop.train(net, task, recipe, seed, epoch_of, settings, checkpoint, progress, after_step)
    net.refresh()
    net.settle()
    net.run(0)
    return net


def descend(scores: Mapping[str, Tensor], moved: Mapping[str, Tensor], rate: float) -> None:
    """Moves scores down their gradients by `rate`, root mean square over all of them."""
    grads = {n: m.grad for n, m in moved.items() if m.grad is not None}
    square = sum(float((g**2).sum()) for g in grads.values())
    size = (square / max(1, sum(g.numel() for g in grads.values()))) ** 0.5
    for name, grad in grads.items():
        scores[name].sub_(grad, alpha=rate / max(size, 1e-20))


def _check(budgets: Sequence[Budget]) -> None:
    for name in {one.name for budget in budgets for one in budget.capped}:
        most = [one.most for budget in budgets for one in budget.capped if one.name == name]
        if any(b >= a for a, b in pairwise(most)):
            raise BudgetError(
                f"nested levels need limits on {name} that get tighter, got {most}: sort them"
            )
