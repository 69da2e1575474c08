"""The phases of a search, each recorded in the study so that a second run goes on from it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from espalier import train
from espalier.costs import Cost, OnnxRuntime, PredictedLatency
from espalier.estimators import Estimator, OneShot, Trained
from espalier.flows.evaluate import Score
from espalier.flows.measuring import Measuring
from espalier.flows.plan import Plan, make_plan
from espalier.flows.pricing import Pricing, hand_scaled
from espalier.flows.progress import Display
from espalier.flows.relaxing import Drawn, relax_shared
from espalier.flows.speed import FewBatches, threads, timed_second
from espalier.flows.weights import derive, load_weights, save_weights
from espalier.nets import Family
from espalier.problem import Limit, Problem, Reading, SearchBudget
from espalier.solvers import strategies
from espalier.solvers.relax import Relaxed
from espalier.solvers.strategies import Strategy
from espalier.space import Candidate, Space
from espalier.study import Processes, Serial, Study, Trial
from espalier.tasks import Task
from espalier.train import Recipe

MakeStrategy = Callable[[Space, int], Strategy]


@dataclass
class Job(Measuring):
    """Everything a search works with."""

    family: Family
    task: Task
    limits: tuple[Limit, ...]
    runtime: OnnxRuntime
    study: Study
    strategy: str | MakeStrategy
    seed: int
    workers: int
    budget: SearchBudget
    recipe: Recipe
    show: Display
    own_costs: tuple[Cost, ...] = ()
    own_estimator: Estimator | None = None
    own_plan: Plan | None = None
    solver: str = "search"
    pricing: Pricing = field(init=False)
    predicted: PredictedLatency = field(init=False)
    plan: Plan = field(init=False)
    relaxed: Relaxed | None = None
    threads: int = 1
    speed: dict[str, float] = field(default_factory=dict)
    estimates: dict[Candidate, Reading] = field(default_factory=dict)
    phase_started: float = field(default_factory=time.time)

    # --- what is asked ---------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether candidates are scored on shared weights."""
        return self.own_estimator is None and hasattr(self.family, "activate")

    @property
    def problem(self) -> Problem:
        """Best quality, least of the first limited cost, within every limit."""
        return Problem((self.quality, self.pricing.metrics[self.axis]), self.limits)

    def executor(self) -> Serial | Processes:
        """Where trials run."""
        return Processes(self.workers, retries=1) if self.workers > 0 else Serial()

    # --- phases ----------------------------------------------------------------------------

    def decide_plan(self) -> None:
        """Measures how fast this machine trains, once, and divides the budget."""
        self.show.phase("timing a training step", 1)

        def decide() -> dict[str, Any]:
            speed = {"threads": float(torch.get_num_threads())}
            plan = self.own_plan
            if plan is None and self.budget.seconds is not None:
                speed = self._speed()
            if plan is None:
                plan = make_plan(self.budget, self.spent(), speed, self.workers, self.shared)
            return {"plan": plan.to_json(), "speed": speed}

        decided = self.study.once("plan", decide)
        self.plan = Plan(**decided["plan"])
        # on record, because sums in another order give other last bits
        self.speed = decided["speed"]
        self.threads = int(self.speed["threads"])
        p = self.plan
        self.show.note(
            f"plan: {p.supernet_epochs} epochs of the supernet, {p.trials} trials, "
            f"{p.finalists} finalists, {p.final_epochs} epochs each"
        )

    def _speed(self) -> dict[str, float]:
        """Seconds of an epoch of the supernet, of an epoch of a middling candidate and of a trial,
        and the number of threads that trains the supernet fastest on this machine as it is now."""
        few, one = FewBatches(self.task, 4), replace(self.recipe, epochs=1)
        steps = max(self.task.size("train") // self.recipe.batch, 1)
        share = steps / min(4, steps)
        middle = self.family.space.decode(hand_scaled(self.family.space, 3)[1:2])
        probe = copy.deepcopy(self.family)
        all_threads = torch.get_num_threads()
        speed = {"supernet_epoch": 0.0, "threads": float(all_threads)}
        if self.shared:
            timed = {
                n: share * timed_second(lambda: train.train_supernet(probe, few, one, 0), n)
                for n in sorted({1, all_threads})
            }
            fastest = min(timed, key=lambda n: timed[n])
            speed.update(supernet_epoch=timed[fastest], threads=float(fastest))
        alone = 1 if self.workers > 0 else all_threads
        network = probe.build(middle[0])
        estimator = self._estimator(probe)
        speed["final_epoch"] = share * timed_second(lambda: train.fit(network, few, one, 0), alone)
        speed["trial"] = timed_second(lambda: estimator.estimate(middle), alone)
        return speed

    def _estimator(self, family: Family) -> Estimator:
        if self.own_estimator is not None:
            return self.own_estimator
        if self.shared:
            return OneShot(family, self.task, seed=self.seed)
        return Trained(family, self.task, replace(self.recipe, epochs=3), seed=self.seed)

    def train_shared(self) -> None:
        """Trains the supernet; a checkpoint every epoch, so a killed run goes on.

        With the solver "relax" its architecture learns too.
        """
        if not self.shared:
            return
        self.show.phase("training the supernet", self.plan.supernet_epochs)
        initial = self.study.folder / "initial.safetensors"
        if initial.exists():
            load_weights(self.family, initial)
        else:
            save_weights(self.family, initial)
        if self.solver == "relax":
            with threads(self.threads):
                self.relaxed = relax_shared(self)
            return
        recipe = replace(self.recipe, epochs=self.plan.supernet_epochs)
        with threads(self.threads):
            train.train_supernet(
                self.family,
                self.task,
                recipe,
                derive(self.seed, "supernet"),
                checkpoint=self.study.folder / "supernet.safetensors",
                progress=self.show.step,
            )

    def drawn(self, space: Space, seed: int) -> Strategy:
        """Draws from the architecture that was learned."""
        assert self.relaxed is not None
        return Drawn(space, seed, self.relaxed.probabilities, self.relaxed.candidate)

    def explore(self, strategy: str | MakeStrategy, phase: str) -> list[Trial]:
        """One search over the space; every trial is recorded."""
        seed = derive(self.seed, phase) % 2**32
        made = (
            strategies.make(strategy, self.family.space, seed)
            if isinstance(strategy, str)
            else strategy(self.family.space, seed)
        )
        self.show.phase(f"{phase}: {made.name}", self.plan.trials)
        done = 0
        best = -float("inf")
        sign = 1.0 if self.quality.goal == "max" else -1.0

        def on_trial(trial: Trial) -> None:
            nonlocal done, best
            done += 1
            reading = trial.metrics.get(self.quality.name)
            value = -float("inf") if reading is None else sign * reading.value
            if phase == "search" and value > best:
                best = value
                self.show.best(self._summary(trial.metrics))
            self.show.step(done, self.plan.trials)

        trials = self.study.search(
            phase,
            self.problem,
            made,
            Score(self._estimator(self.family)),
            trials=self.plan.trials,
            batch=self.plan.population,
            executor=self.executor(),
            price=self.pricing,
            deadline=self._deadline(),
            on_trial=on_trial,
        )
        for trial in trials:
            if trial.state == "done":
                self.estimates[trial.candidate] = trial.metrics[self.quality.name]
        return trials

    def _deadline(self) -> float | None:
        """When a search ends at the latest: three times what was planned for it."""
        if self.budget.seconds is None or "trial" not in self.speed:
            return None
        planned = self.plan.trials * self.speed["trial"] / max(self.workers, 1)
        return time.time() + 3 * planned + 5.0

    def _summary(self, metrics: dict[str, Reading]) -> str:
        shown = [self.quality.name, *(x.metric for x in self.limits)]
        return ", ".join(
            f"{n} {metrics[n].value:.4g} ({metrics[n].how})" for n in shown if n in metrics
        )
