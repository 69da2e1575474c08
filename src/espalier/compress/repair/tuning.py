"""A fine-tuning under way: its epochs, its clock, what it remembers and what ends it."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.repair.distil import Teaching
from espalier.compress.repair.optimise import Optimiser, held, make, pack, unpack
from espalier.train import checkpoint as checkpoints
from espalier.train import loop
from espalier.train import optimiser as optimisers
from espalier.train.evaluate import evaluate
from espalier.train.precision import Format
from espalier.train.running import device_of, laid_out, lay_out
from espalier.train.seeds import generator, global_seed

Clock = Callable[[], float]  # seconds from any zero

_SHUFFLE, _GLOBAL = 0xF1, 0xF2  # purposes of random streams
_FINE = 1 << 20  # steps of the learning rate's schedule
_PATIENCE, _STALE = 10, 0.5  # validations, and share of the training, where none is asked for
_SELDOM = 4  # with a limit in seconds, validation takes at most one part in 1 + so many


@dataclass
class State:
    """What a checkpoint keeps besides tensors."""

    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_share: float = 0.0  # of the training that was over then
    waited: int = 0  # validations since the best
    validations: int = 0
    validated: int = 0  # epochs that were over at the last one
    seconds: float = 0.0
    validation_seconds: float = 0.0
    stopped: str = ""
    precision: Format = "fp32"


class Run:
    """A fine-tuning under way."""

    def __init__(
        self,
        model: nn.Module,
        teaching: Teaching,
        optimiser: Optimiser,
        seconds: float | None,
        patience: int | None,
        seed: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self.model, self.teaching = model, teaching
        self.task, self.recipe, self.seed = teaching.task, teaching.recipe, seed
        self.limit, self.patience = seconds, patience
        self.clock = clock
        self.started = clock()
        self.state = State(precision=teaching.form)
        self.identity = self._identity(optimiser)
        if teaching.original is not None:
            teaching.original.eval()
        lay_out(model, next(iter(self.task.batches("train", 2)))[0])
        self.optimiser = make(model, self.recipe, optimiser)
        self.held = held(model)
        self.best = copy.deepcopy(model.state_dict())
        self.steps = loop.steps_of(self.task, self.recipe.batch)

    def _identity(self, optimiser: Optimiser) -> dict[str, Any]:
        shapes = [f"{name}{tuple(t.shape)}" for name, t in self.model.state_dict().items()]
        return {
            "method": "finetune",
            "weights": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
            "task": self.task.fingerprint,
            "seed": self.seed,
            "optimiser": optimiser,
            "temperature": self.teaching.temperature,
            "labels": self.teaching.labels,
            "patience": self.patience,
            "bounded": "epochs" if self.limit is None else "seconds",
            **asdict(self.recipe),
        }

    def resume(self, checkpoint: Path | None) -> None:
        """Goes back to where a checkpoint was written, if there is one."""
        saved = None if checkpoint is None else checkpoints.read(checkpoint)
        if saved is None or checkpoint is None:
            return
        checkpoints.check(checkpoint, saved.counters["identity"], self.identity)
        self.state = State(**saved.counters["state"])
        self.teaching.form = self.state.precision
        self.best = _under("best", saved.tensors)
        self.model.load_state_dict(_under("weights", saved.tensors))
        unpack(saved.tensors, self.model, self.optimiser)

    def save(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        tensors = {f"weights/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= pack(self.model, self.optimiser)
        self.state.seconds += self._lap()
        checkpoints.write(checkpoint, tensors, {"identity": self.identity, "state": asdict(self.state)})  # fmt: skip

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = self.clock()
        lap, self.started = now - self.started, now
        return lap

    def spent(self) -> float:
        """Seconds in all, those before a resume included."""
        return self.state.seconds + self.clock() - self.started

    def train(self, checkpoint: Path | None, progress: loop.Progress | None) -> None:
        """Epochs until something ends it; leaves the best weights in the model."""
        state = self.state
        if not state.before:
            state.before = state.best = self._validate()
        while not state.stopped:
            epoch = len(state.history)
            if epoch >= self.recipe.epochs:
                state.stopped = "epochs"
                break
            with global_seed(self.seed, epoch, _GLOBAL):
                row = self._epoch(epoch)
            state.history.append(row)
            self._judge(row)
            self.save(checkpoint)
            if progress is not None:
                self._show(progress, row)
        self.save(checkpoint)
        self.model.load_state_dict(self.best)
        self.model.eval()

    def _show(self, progress: loop.Progress, row: dict[str, Any]) -> None:
        """Epochs of all, or seconds of all."""
        shown = "no step" if row["loss"] is None else f"loss {row['loss']:.3f}"
        if self.limit is None:
            progress(row["epoch"], self.recipe.epochs, shown)
        else:
            total = max(int(self.limit), 1)
            progress(min(int(self.spent()), total), total, f"epoch {row['epoch']}, {shown}")

    def _epoch(self, epoch: int) -> dict[str, Any]:
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        device = device_of(self.model)
        order = generator(self.seed, epoch, _SHUFFLE)
        total, count, lr, longest = 0.0, 0, 0.0, 0.0
        for x, y in self.task.batches("train", self.recipe.batch, order, self.recipe.augment):
            if len(y) < 2:
                continue
            begun = self.clock()
            done = self._done(epoch * self.steps + count, longest)
            if done >= 1:
                self.state.stopped = "time"
                break
            lr = optimisers.rate(self.recipe, int(done * _FINE), _FINE)
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            loss = self.teaching.loss(self.model, laid_out(self.model, x.to(device)), y.to(device))
            value = float(loss.detach())
            if not math.isfinite(value):
                self.state.stopped = "diverged"
                break
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
            self.optimiser.step()
            self._hold()
            total, count = total + value, count + 1
            longest = max(longest, self.clock() - begun)
        self.model.eval()
        mean = total / count if count else None
        return {"epoch": epoch + 1, "loss": mean, "lr": lr, "steps": count}

    def _hold(self) -> None:
        """Weights of sparse layers that were 0 are 0."""
        with torch.no_grad():
            for weight, kept in self.held:
                weight.mul_(kept)

    def _done(self, step: int, longest: float) -> float:
        """Which share of the training is over: of its steps, or of its time if that is more."""
        share = step / (self.recipe.epochs * self.steps)
        if self.limit is None:
            return share
        left_for_steps = self.limit - self.state.validation_seconds - longest
        return max(share, self.spent() / left_for_steps if left_for_steps > 0 else 1.0)

    def _judge(self, row: dict[str, Any]) -> None:
        """Validates an epoch, where it is time to, and keeps its weights if they are the best."""
        state = self.state
        last = bool(state.stopped) or row["epoch"] == self.recipe.epochs
        trained = [r["epoch"] for r in state.history[state.validated :] if r["steps"]]
        if not trained or (state.stopped == "diverged" and not self._finite()):
            return  # time may end before an epoch's first step, with earlier ones to be validated
        if self.limit is not None and not last:
            looked = state.validation_seconds * (1 + state.validations)
            if self.spent() - looked < _SELDOM * looked:
                return
        row |= (found := self._validate())
        state.validations, state.validated = state.validations + 1, len(state.history)
        metric = self.task.metrics[0]
        new, old = found[metric.name], state.best[metric.name]
        share = self._done(row["epoch"] * self.steps, 0.0)
        if new > old if metric.goal == "max" else new < old:
            state.best, state.best_epoch, state.waited = found, trained[-1], 0
            state.best_share = share
            self.best = copy.deepcopy(self.model.state_dict())
            return
        state.waited += 1
        waited = state.waited >= (self.patience or _PATIENCE)
        stale = self.patience is not None or share - state.best_share >= _STALE
        if waited and stale and not state.stopped:
            state.stopped = "patience"

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _validate(self) -> dict[str, float]:
        begun = self.clock()
        found = evaluate(self.model, self.task, "validation")
        self.state.validation_seconds = max(self.state.validation_seconds, self.clock() - begun)
        return found

    def result(self) -> dict[str, Any]:
        """What happened."""
        state = self.state
        return {
            "history": state.history,
            "before": state.before,
            "after": state.best,
            "best_epoch": state.best_epoch,
            "stopped": state.stopped,
            "seconds": self.spent(),
        }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix and a slash, without it."""
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
