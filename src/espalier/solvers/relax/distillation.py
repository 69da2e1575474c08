"""Self-distillation from earlier supernets (SD-DARTS, Zhu et al., 2023)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import EspalierError
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.terms import On, Term, TermState
from espalier.train.schedules import Schedule, scheduled

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture


class SelfDistillation(Term):
    """KL divergence from the vote of the last `teachers` snapshots to the supernet, on weight steps.

    After each epoch the supernet and its mixture are kept. Teachers vote for the class they think
    likeliest; each one's probabilities count as many times as the class it votes for has votes.
    `temperature` softens both sides.
    """

    name = "distillation"
    on: On = "weights"

    def __init__(
        self, teachers: int = 3, coefficient: Schedule | float = 1.0, temperature: float = 1.0
    ) -> None:
        if teachers < 1 or temperature <= 0:
            raise EspalierError(
                "self-distillation needs 1 teacher or more and a temperature above 0, got "
                f"{teachers!r} and {temperature!r}"
            )
        self.teachers, self.temperature = teachers, temperature
        self.coefficient = scheduled(coefficient)
        self._kept: list[tuple[Any, dict[str, Tensor]]] = []
        self._blank: nn.Module | None = None

    def start(self, supernet: nn.Module) -> None:
        """Forgets the teachers of another search."""
        self._kept, self._blank = [], supernet

    def after_epoch(self, supernet: nn.Module, mixture: Mixture) -> None:
        """Keeps a copy of the supernet, which must not be mixed now, and the oldest no longer."""
        plain = {
            name: (w if isinstance(w, Tensor) else w.weights).detach().clone()
            for name, w in mixture.items()
        }
        self._keep(copy.deepcopy(supernet), plain)

    def _keep(self, teacher: Any, mixture: dict[str, Tensor]) -> None:
        teacher.requires_grad_(False)
        teacher.eval()
        teacher.mix(mixture)
        self._kept = [*self._kept, (teacher, mixture)][-self.teachers :]

    def added(self, moment: Moment, state: TermState) -> Tensor | None:
        """Nothing while there is no teacher."""
        return super().added(moment, state) if self._kept else None

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """KL(vote, supernet), mean over the batch, times the temperature squared."""
        heat = self.temperature
        with torch.no_grad():
            outputs = [state.run(teacher, state.inputs) for teacher, _ in self._kept]
            wanted = voted(torch.stack([torch.softmax(o / heat, 1) for o in outputs]))
        told = torch.log_softmax(state.outputs / heat, 1)
        return functional.kl_div(told, wanted, reduction="batchmean") * heat**2

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and mixtures of the teachers, oldest first."""
        out = {}
        for index, (teacher, mixture) in enumerate(self._kept):
            for name, tensor in teacher.state_dict().items():
                out[f"{index}/state/{name}"] = tensor
            for name, tensor in mixture.items():
                out[f"{index}/mixture/{name}"] = tensor
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes the teachers anew from what `tensors` gave."""
        assert self._blank is not None
        device = next(self._blank.parameters()).device
        for index in range(self.teachers):
            own = _within(tensors, f"{index}/state/")
            if own:
                teacher = copy.deepcopy(self._blank)
                teacher.load_state_dict(own)
                mixture = _within(tensors, f"{index}/mixture/")
                self._keep(teacher, {name: t.to(device) for name, t in mixture.items()})


def voted(probabilities: Tensor) -> Tensor:
    """Probabilities of teachers `(teachers, batch, classes)` as one `(batch, classes)`."""
    votes = probabilities.argmax(2)  # (teachers, batch)
    agree = (votes[:, None] == votes[None]).sum(1).to(probabilities.dtype)
    shares = agree / agree.sum(0, keepdim=True)
    return (shares[..., None] * probabilities).sum(0)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
