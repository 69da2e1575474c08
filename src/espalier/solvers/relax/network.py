"""The problem of a supernet and a task: batches, mixtures, losses with terms, and both optimisers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.solvers.relax.moment import Moment, Phase
from espalier.solvers.relax.problem import Part, Wanted
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.solvers.relax.scope import base_of, held_of
from espalier.solvers.relax.settings import Settings
from espalier.solvers.relax.terms import Term, TermState
from espalier.solvers.relax.thresholds import architecture_parameters
from espalier.tasks import Task
from espalier.train import checkpoint
from espalier.train.precision import Format, autocast
from espalier.train.running import device_of, laid_out
from espalier.train.seeds import generator

_PHASES: dict[Wanted, Phase] = {
    "weights": "weights",
    "architecture": "architecture",
    "both": "architecture",
}
_DRAWS, _ORDER = 11, 12  # purposes of random streams
Batch = tuple[Tensor, Tensor]


class Feed:
    """Batches of each part, the present one of each until `next_step`; read when first asked for.

    A part that ends before the epoch does starts again in another order.
    """

    def __init__(
        self, parts: Mapping[Part, Task], settings: Settings, seed: int, network: nn.Module
    ) -> None:
        self._parts, self._settings = parts, settings
        self._seed, self._network = seed, network
        self._device = device_of(network)
        self._streams: dict[Part, Iterator[Batch]] = {}
        self._now: dict[Part, Batch] = {}

    def begin(self, epoch: int) -> None:
        """Starts an epoch: its order is a function of the seed and the epoch alone."""
        self._streams = {part: self._passes(part, epoch) for part in self._parts}
        self._now = {}

    def next_step(self) -> None:
        """Goes on: the next time that a part is asked for, it gives its next batch."""
        self._now = {}

    def batch(self, part: Part) -> Batch:
        """This step's inputs and targets of a part, on the device."""
        if part not in self._now:
            x, y = next(self._streams[part])
            inputs = laid_out(self._network, x.to(self._device, non_blocking=True))
            self._now[part] = inputs, y.to(self._device, non_blocking=True)
        return self._now[part]

    def _passes(self, part: Part, epoch: int) -> Iterator[Batch]:
        repeat = 0
        while True:
            stream = int(part == "validation")
            order = generator(self._seed, epoch, _ORDER, stream, repeat)
            task = self._parts[part]
            yield from task.batches("train", self._settings.batch, order, self._settings.augment)
            repeat += 1


def sgd(weights: Sequence[nn.Parameter], settings: Settings, lr: float) -> torch.optim.SGD:
    """SGD of the settings; its momenta start at 0, since not all weights run in a first step."""
    out = torch.optim.SGD(
        weights, lr, settings.momentum, weight_decay=settings.weight_decay, fused=True
    )
    if settings.momentum:
        for weight in weights:  # the fused step takes momenta for all of its weights or for none
            out.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return out


class NetworkProblem:
    """A supernet under a relaxation, as update rules see it."""

    def __init__(
        self,
        supernet: Any,
        task: Task,
        relaxation: Relaxation,
        logits: Logits,
        terms: Sequence[Term],
        settings: Settings,
        feed: Feed,
        seed: int,
        chosen: Format,
        splits: bool,
    ) -> None:
        self.supernet, self.task, self.relaxation, self.logits = supernet, task, relaxation, logits
        self.terms, self.settings, self.feed, self.seed = terms, settings, feed, seed
        self.chosen, self.splits = chosen, splits
        own = {id(p) for p in (*architecture_parameters(supernet), *logits.values())}
        self.weights = [p for p in supernet.parameters() if p.requires_grad and id(p) not in own]
        self.architecture = [p for p in logits.values() if p.requires_grad]
        self.optimiser = sgd(self.weights, settings, settings.lr)
        self.adam = torch.optim.Adam(
            self.architecture,
            lr=settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_decay,
            fused=True,
        )
        names = relaxation.probabilities(logits).keys()
        self.held = held_of(supernet, names, base_of(supernet), device_of(supernet))
        self.added: dict[str, list[Tensor]] = {}  # what terms added to losses, since cleared
        self._twins: list[NetworkProblem] = []
        self._at = (0, 0, 0.0)  # epoch, step, progress

    def go_to(self, epoch: int, step: int, progress: float) -> None:
        """Sets the moment and the learning rate, of twins too."""
        self._at = epoch, step, progress
        rate = self.settings.rate(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for twin in self._twins:
            twin.go_to(epoch, step, progress)

    def moment(self, phase: Phase) -> Moment:
        """The present moment; its generator is a function of seed, epoch, step and phase."""
        epoch, step, progress = self._at
        if phase == "evaluate":
            return Moment(phase, epoch, progress)
        draws = generator(self.seed, epoch, step, _DRAWS, int(phase == "architecture"))
        return Moment(phase, epoch, progress, draws)

    def loss(self, part: Part, wanted: Wanted) -> Tensor:
        """The task's loss of the mixture on this step's batch, with the terms that apply."""
        moment = self.moment(_PHASES[wanted])
        x, y = self.feed.batch(part)
        with torch.set_grad_enabled(wanted != "weights"):
            mixture = self.relaxation.weights(self.logits, moment)
        self.supernet.mix(mixture)
        outputs = self.run(self.supernet, x)
        loss = self.task.loss(outputs, y)
        applying = [term for term in self.terms if self._applies(term, part, wanted)]
        if not applying:
            return loss
        with torch.set_grad_enabled(wanted != "weights"):
            chances = self.relaxation.probabilities(self.logits)
        state = TermState(self.supernet, x, y, outputs, loss, mixture, chances, self.run, self.held)
        total = loss
        for term in applying:
            added = term.added(moment, state)
            if added is not None:
                total = total + added
                self.added.setdefault(term.name, []).append(added.detach())
        return total

    def _applies(self, term: Term, part: Part, wanted: Wanted) -> bool:
        """Terms on the architecture are added once a step: on its own half, where there is one."""
        if wanted != "architecture" and term.on != "architecture":
            return True
        own = part == "validation" or not self.splits
        return wanted != "weights" and term.on != "weights" and own

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module's outputs, in fp32, computed in the search's precision."""
        with autocast(self.chosen, x.device.type):
            outputs: Tensor = module(x)
        return outputs.float()

    def descend(self, wanted: Literal["weights", "architecture"]) -> None:
        """One step of SGD with its gradient clipped, or of Adam with the relaxation's hook."""
        if wanted == "weights":
            nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            return
        before = {name: p.detach().clone() for name, p in self.logits.items()}
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.relaxation.after_step(self.logits, before)

    def twin(self) -> NetworkProblem:
        """A copy with weights of its own on the same batches, learning the same architecture.

        Errors: `SpaceError` where the architecture's parameters are in the supernet itself.
        """
        if architecture_parameters(self.supernet):
            raise SpaceError(
                "a rule with two copies of the weights needs an architecture outside of them; this "
                "supernet holds its thresholds itself: use SingleLevel or FirstOrder"
            )
        out = NetworkProblem(
            copy.deepcopy(self.supernet),
            self.task,
            self.relaxation,
            self.logits,
            self.terms,
            self.settings,
            self.feed,
            self.seed,
            self.chosen,
            self.splits,
        )
        out.added = self.added  # its losses are of the same search
        self._twins.append(out)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and momenta by name."""
        return checkpoint.pack(self.supernet, self.optimiser)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        checkpoint.unpack(tensors, self.supernet, self.optimiser)
