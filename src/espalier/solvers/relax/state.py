"""What a selection sees of a search: the trained supernet, and how to score and tune mixtures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.network import sgd
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.solvers.relax.settings import Settings
from espalier.solvers.relax.thresholds import architecture_parameters
from espalier.space import Candidate
from espalier.tasks import Split, Task
from espalier.train.evaluate import calibration, set_statistics
from espalier.train.precision import Format, autocast
from espalier.train.running import device_of, evaluating, laid_out
from espalier.train.seeds import generator

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

_BATCH = 512
_IMAGES = 2000
_TUNE, _SCORED = 13, 14  # purposes of random streams


@dataclass
class SelectionState:
    """A search after its last epoch. `base` holds options for decisions that were not relaxed."""

    supernet: Any
    task: Task
    relaxation: Relaxation
    logits: Logits
    names: tuple[str, ...]
    settings: Settings
    seed: int
    base: Candidate
    precision: Format
    weights_task: Task  # the part of train that the weights learned from
    _read: dict[Any, Any] = field(default_factory=dict, repr=False)
    _tunes: int = 0

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """How probable each option is, by decision, on the processor, without gradients."""
        found = self.relaxation.probabilities(self.logits)
        return {name: p.detach().float().cpu() for name, p in found.items()}

    @property
    def strengths(self) -> dict[str, Tensor]:
        """How much an edge weighs in its node, a scalar by decision; 1 where not named."""
        found = self.relaxation.strengths(self.logits)
        return {name: s.detach().float().cpu() for name, s in found.items()}

    def mixture(self) -> Mixture:
        """The mixture at the end of the search, without chance or gradients."""
        last = Moment("evaluate", self.settings.epochs, 1.0)
        with torch.no_grad():
            return self.relaxation.weights(self.logits, last)

    def one_hot(self, name: str, index: int) -> Tensor:
        """Weights `(options,)` that run one option of a decision."""
        out = torch.zeros(self.supernet.space[name].count, device=device_of(self.supernet))
        out[index] = 1.0
        return out

    def evaluate(
        self,
        weights: Mixture | Candidate,
        images: int = _IMAGES,
        split: Split = "validation",
    ) -> float:
        """The task's first metric on up to `images` examples of a split; larger is better.

        Batch-norm statistics are set for it from training images, and put back afterwards. A
        metric that is better when smaller is given negated. The supernet is left running it.
        """
        calibrating, inputs, targets = self._data(images, split)
        device = device_of(self.supernet)
        self._run(weights)
        with statistics_kept(self.supernet), autocast(self.precision, device.type):
            set_statistics(self.supernet, calibrating)
            with evaluating(self.supernet), torch.inference_mode():
                outputs = [self.supernet(x).float().cpu() for x in inputs]
        metric = self.task.metrics[0]
        found = self.task.measure(torch.cat(outputs), targets)[metric.name]
        return found if metric.goal == "max" else -found

    def _run(self, weights: Mixture | Candidate) -> None:
        if isinstance(weights, Candidate):
            self.supernet.activate(weights)
        else:
            self.supernet.mix(_fixed(weights, device_of(self.supernet)))

    def tune(
        self, weights: Mixture | Candidate, epochs: float = 1, lr: float | None = None
    ) -> None:
        """Trains the shared weights under a fixed mixture or candidate on their part of train.

        Parts of an epoch are allowed. The rate is constant: `lr`, or a tenth of the search's, as
        DARTS-PT does (Wang et al., 2021).
        """
        self._tunes += 1
        kept = {id(p) for p in architecture_parameters(self.supernet)}
        learned = [p for p in self.supernet.parameters() if p.requires_grad and id(p) not in kept]
        chosen = self.settings
        optimiser = sgd(learned, chosen, chosen.lr / 10 if lr is None else lr)
        device = device_of(self.supernet)
        size = self.weights_task.size("train")
        left = max(1, round(epochs * size / chosen.batch))
        self._run(weights)
        self.supernet.train()
        for x, y in self._passes():
            with autocast(self.precision, device.type):
                outputs = self.supernet(laid_out(self.supernet, x.to(device)))
            loss = self.task.loss(outputs.float(), y.to(device))
            loss.backward(inputs=learned)  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learned, chosen.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            left -= 1
            if left == 0:
                break
        self.supernet.eval()

    def _passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        repeat = 0
        while True:
            order = generator(self.seed, _TUNE, self._tunes, repeat)
            yield from self.weights_task.batches(
                "train", self.settings.batch, order, self.settings.augment
            )
            repeat += 1

    def _data(self, images: int, split: Split) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Batches to calibrate on, inputs and targets to score on; read once."""
        if (images, split) not in self._read:
            device = device_of(self.supernet)
            if "calibration" not in self._read:
                found = calibration(self.weights_task, 2, _BATCH // 2, self.seed)
                self._read["calibration"] = [laid_out(self.supernet, x.to(device)) for x in found]
            inputs, targets, left = [], [], images
            some = self.task.size(split) > images
            order = generator(self.seed, _SCORED) if some else None
            for x, y in self.task.batches(split, min(_BATCH, images), order):
                inputs.append(laid_out(self.supernet, x[:left].to(device)))
                targets.append(y[:left])
                left -= len(y)
                if left <= 0:
                    break
            self._read[images, split] = inputs, torch.cat(targets)
        inputs, labels = self._read[images, split]
        return self._read["calibration"], inputs, labels


def _fixed(weights: Mixture, device: torch.device) -> dict[str, Tensor]:
    """Weights on the device, without gradients or idle options."""
    plain = {n: w if isinstance(w, Tensor) else w.weights for n, w in weights.items()}
    return {name: w.detach().to(device) for name, w in plain.items()}


class Selection(ABC):
    """How a trained mixture becomes one candidate."""

    @abstractmethod
    def __call__(self, state: SelectionState) -> Candidate:
        """The candidate. It may tune and evaluate through `state`."""


@contextmanager
def statistics_kept(supernet: nn.Module) -> Iterator[None]:
    """Puts the batch-norm statistics of a supernet back afterwards."""
    norms = [m for m in supernet.modules() if isinstance(m, _BatchNorm)]
    buffers = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
