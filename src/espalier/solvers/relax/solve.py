"""The loop: decisions become gates with a gradient, which learn together with the shared weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.solvers.relax import store
from espalier.solvers.relax.collapse import parameterless, without_weights
from espalier.solvers.relax.monitor import sharpness
from espalier.solvers.relax.network import Feed, NetworkProblem
from espalier.solvers.relax.problem import Part
from espalier.solvers.relax.relaxation import Relaxation
from espalier.solvers.relax.relaxed import Relaxed
from espalier.solvers.relax.rules import FirstOrder, Rule
from espalier.solvers.relax.scope import base_of, names_of
from espalier.solvers.relax.selection import Magnitude
from espalier.solvers.relax.settings import Settings
from espalier.solvers.relax.slots import check_slots
from espalier.solvers.relax.softmax import Softmax
from espalier.solvers.relax.state import SelectionState, statistics_kept
from espalier.solvers.relax.terms import Term, entropy
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import checkpoint as checkpoints
from espalier.train.halves import halves
from espalier.train.loop import Diverged, Progress, steps_of
from espalier.train.precision import resolve
from espalier.train.running import device_of, lay_out
from espalier.train.seeds import generator, global_seed

_LOGITS, _GLOBAL = 16, 17  # purposes of random streams


def relax(
    supernet: Any,
    task: Task,
    *,
    relaxation: Relaxation | None = None,
    rule: Rule | None = None,
    terms: Sequence[Term] = (),
    selection: Callable[[SelectionState], Candidate] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    stop_when_collapsed: int | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Relaxed:
    """Searches a supernet by gradients, in place; it is left trained, with the candidate active.

    The slots: `relaxation` (default `Softmax()`), `rule` (`FirstOrder()`), `terms`, `selection`
    (`Magnitude()`); the defaults are DARTS's (Liu et al., 2019). `names`: the decisions to relax;
    unless given all that the supernet can mix, but for those that say which edges meet in a node of
    `supernet.joins`: these are left to the selection. Decisions that are not relaxed stay at the
    active candidate, at the largest where there is none. Weights learn from one part of train and the architecture from the other;
    validation is for selection and the monitor; test is not read.
    `stop_when_collapsed`: ends after the first epoch in which so many decisions between operators
    are likeliest to take one without parameters, as DARTS+ does (Liang et al., 2019).
    With a `checkpoint` path, a search that was killed goes on from its last epoch, to the same bits.
    Errors: `SpaceError` for a decision that can't be mixed; `Diverged` when a loss is NaN;
    `StudyError` for a checkpoint of another search.
    """
    relaxation, rule, settings = (
        relaxation or Softmax(),
        rule or FirstOrder(),
        settings or Settings(),
    )
    selection = selection or Magnitude()
    check_slots(supernet, relaxation, rule, terms, selection, settings, stop_when_collapsed)
    search = _Search(
        supernet,
        task,
        relaxation,
        rule,
        tuple(terms),
        settings,
        seed,
        names,
    )
    try:
        search.train(stop_when_collapsed, checkpoint, progress)
        with global_seed(seed, _GLOBAL):
            return search.finish(selection)
    except BaseException:
        supernet.activate(search.base)  # no mixture of a search that ended early stays
        raise


class _Search:
    """One run of `relax`."""

    def __init__(
        self,
        supernet: Any,
        task: Task,
        relaxation: Relaxation,
        rule: Rule,
        terms: tuple[Term, ...],
        settings: Settings,
        seed: int,
        names: Sequence[str] | None,
    ) -> None:
        self.supernet, self.task, self.settings, self.seed = supernet, task, settings, seed
        self.relaxation, self.rule, self.terms = relaxation, rule, terms
        self.names = names_of(supernet, names)
        self.base = base_of(supernet)
        device = device_of(supernet)
        self.logits = relaxation.start(supernet, self.names, generator(seed, _LOGITS))
        supernet.activate(self.base)
        parts: dict[Part, Task] = {"train": task}
        if rule.splits:
            first, second = halves(task, settings.arch_share, seed)
            parts = {"train": first, "validation": second}
        lay_out(supernet, next(iter(parts["train"].batches("train", 2)))[0])
        self.parts, auto = parts, settings.precision == "auto"
        self.problem = NetworkProblem(
            supernet,
            task,
            relaxation,
            self.logits,
            terms,
            settings,
            Feed(parts, settings, seed, supernet),
            seed,
            "fp32" if rule.fine and auto else resolve(settings.precision, device.type),
            rule.splits,
        )
        self.empty = without_weights(supernet, self.names)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        rule.start(self.problem)
        for term in terms:
            term.start(supernet)

    def train(
        self, collapsed: int | None, checkpoint: Path | None, progress: Progress | None
    ) -> None:
        """The epochs that are left."""
        epochs = self.settings.epochs
        identity = self._identity(collapsed)
        saved = None if checkpoint is None else checkpoints.read(checkpoint)
        if saved is not None and checkpoint is not None:
            checkpoints.check(checkpoint, saved.counters["identity"], identity)
            store.load(saved, self.problem, self.rule, self.terms)
            self.history, self.seconds = saved.counters["history"], saved.counters["seconds"]
            self.problem.chosen = saved.counters["precision"]
        while len(self.history) < epochs and not self._stopped(collapsed):
            started = time.monotonic()
            epoch = len(self.history)
            with global_seed(self.seed, epoch, _GLOBAL):
                self.history.append(self._epoch(epoch))
            self._remember()
            self.seconds += time.monotonic() - started
            if checkpoint is not None:
                counters = {
                    "identity": identity,
                    "history": self.history,
                    "precision": self.problem.chosen,
                    "seconds": self.seconds,
                }
                store.save(checkpoint, self.problem, self.rule, self.terms, counters)
            if progress is not None:
                row = self.history[-1]
                progress(epoch + 1, epochs, f"loss {row['loss']:.3f} entropy {row['entropy']:.2f}")
        self.supernet.eval()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        problem, settings = self.problem, self.settings
        steps = steps_of(self.parts["train"], settings.batch)
        total = settings.epochs * steps
        found: list[Tensor] = []
        arch: list[Tensor] = []
        self.supernet.train()
        problem.feed.begin(epoch)
        problem.added.clear()
        for step in range(steps):
            problem.feed.next_step()
            problem.go_to(epoch, step, (epoch * steps + step) / total)
            moves = epoch >= settings.warmup_epochs and step % settings.arch_every == 0
            losses = self.rule.step(problem, moves)
            found.append(losses.weights)
            if losses.architecture is not None:
                arch.append(losses.architecture)
        lr = problem.optimiser.param_groups[0]["lr"]
        # read once an epoch: a step must not wait for the device
        loss, arch_loss = _mean(found, epoch, lr), _mean(arch, epoch, lr) if arch else None
        with torch.no_grad():
            chances = self.relaxation.probabilities(self.logits)
            told = {name: p.detach().float().cpu() for name, p in chances.items()}
        return {
            "epoch": epoch + 1,
            "loss": loss,
            "arch_loss": arch_loss,
            "lr": lr,
            "entropy": float(entropy(told)),
            "parameterless": parameterless(self.empty, told),
            "probabilities": {name: p.tolist() for name, p in told.items()},
            "terms": {
                name: float(torch.stack(every).mean()) for name, every in problem.added.items()
            },
        }

    def _remember(self) -> None:
        """Lets the terms see the end of an epoch, with no mixture of this search in the supernet."""
        if self.terms:
            with torch.no_grad():
                mixture = self.relaxation.weights(self.logits, self.problem.moment("evaluate"))
            self.supernet.activate(self.base)
            for term in self.terms:
                term.after_epoch(self.supernet, mixture)

    def _stopped(self, collapsed: int | None) -> bool:
        if collapsed is None or not self.history:
            return False
        resting = len(self.history) <= self.settings.warmup_epochs
        return not resting and int(self.history[-1]["parameterless"]) >= collapsed

    def finish(self, selection: Callable[[SelectionState], Candidate]) -> Relaxed:
        """Selects, and measures what the selection costs and how sharp the minimum is."""
        started = time.monotonic()
        state = SelectionState(
            self.supernet,
            self.task,
            self.relaxation,
            self.logits,
            self.names,
            self.settings,
            self.seed,
            self.base,
            self.problem.chosen,
            self.parts["train"],
        )
        monitor: dict[str, Any] = {"supernet_accuracy": state.evaluate(state.mixture())}
        monitor["sharpness"] = self._sharpness(state)
        probabilities = {name: p.tolist() for name, p in state.probabilities.items()}
        candidate = selection(state)
        self.supernet.activate(candidate)
        monitor["derived_accuracy"] = state.evaluate(candidate)
        monitor["gap"] = monitor["supernet_accuracy"] - monitor["derived_accuracy"]
        monitor["epochs"] = len(self.history)
        self.supernet.eval()
        self.seconds += time.monotonic() - started
        return Relaxed(candidate, probabilities, self.history, monitor, self.seconds)

    def _sharpness(self, state: SelectionState) -> dict[str, float]:
        """On a few training batches, with the batch's own statistics, as the weights learned."""
        feed = Feed(self.parts, self.settings, self.seed, self.supernet)
        feed.begin(self.settings.epochs)
        batches = []
        for _ in range(4):
            feed.next_step()
            batches.append(feed.batch("train"))
        self.supernet.mix(state.mixture())
        self.supernet.train()

        def loss() -> Tensor:
            every = [self.task.loss(self.problem.run(self.supernet, x), y) for x, y in batches]
            return torch.stack(every).mean()

        with statistics_kept(self.supernet), global_seed(self.seed, _GLOBAL):
            found = sharpness(loss, self.problem.weights, seed=self.seed)
        self.supernet.eval()
        return found

    def _identity(self, collapsed: int | None) -> dict[str, Any]:
        shapes = [f"{name}{tuple(t.shape)}" for name, t in self.supernet.state_dict().items()]
        return {
            "weights": _digest(shapes),
            "task": self.task.fingerprint,
            "space": self.supernet.space.fingerprint,
            "names": list(self.names),
            "base": self.base.to_json(),
            "seed": self.seed,
            "settings": store.described(self.settings),
            "relaxation": store.described(self.relaxation),
            "rule": store.described(self.rule),
            "terms": store.described(self.terms),
            "stop_when_collapsed": collapsed,
        }


def _mean(losses: Sequence[Tensor], epoch: int, lr: float) -> float:
    """The mean of an epoch's losses. Errors: `Diverged`, with the first step that is not finite."""
    values = torch.stack(list(losses)).float().cpu()
    bad = ~torch.isfinite(values)
    if bad.any():
        raise Diverged(
            f"a loss is {float(values[bad][0])} in epoch {epoch + 1}, step {int(bad.nonzero()[0]) + 1}: "
            f"the search diverged; lower the learning rates (lr was {lr:.3g})"
        )
    return float(values.mean())


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
