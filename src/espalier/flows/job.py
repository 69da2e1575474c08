"""The phases of a search, each recorded in the study so that a second run goes on from it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from espalier import train
from espalier.costs import Cost, OnnxRuntime, PredictedLatency
from espalier.errors import BudgetError
from espalier.estimators import Estimator, OneShot, Trained
from espalier.flows.evaluate import Finish, Score
from espalier.flows.plan import Plan, fit_epochs, make_plan
from espalier.flows.pricing import Codes, Pricing, hand_scaled
from espalier.flows.progress import Display
from espalier.flows.speed import FewBatches, threads, timed_second
from espalier.flows.weights import derive, load_weights, save_weights, trained_network, weights_path
from espalier.nets import Family
from espalier.problem import Limit, Metric, Problem, Reading, SearchBudget, front
from espalier.solvers import strategies
from espalier.solvers.strategies import Strategy
from espalier.space import Candidate, Space
from espalier.study import Processes, Serial, Study, Trial
from espalier.tasks import Task
from espalier.train import Recipe

# A finalist must be inside the limit by this much when first measured, so that the noise of the
# second measurement does not throw it out.
_MARGIN = 0.98
_MEASURED_AT_MOST = 40


MakeStrategy = Callable[[Space, int], Strategy]


@dataclass
class Entry:
    """A trained and measured candidate: a row of the result."""

    candidate: Candidate
    name: str
    metrics: dict[str, Reading]
    start: str = ""


@dataclass
class Job:
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
    pricing: Pricing = field(init=False)
    predicted: PredictedLatency = field(init=False)
    plan: Plan = field(init=False)
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
    def quality(self) -> Metric:
        """What the search makes best."""
        return self.task.metrics[0]

    @property
    def axis(self) -> str:
        """The cost that spans the front: the first that is limited, else latency."""
        return self.limits[0].metric if self.limits else "latency_ms"

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
        """Trains the supernet; a checkpoint every epoch, so a killed run goes on."""
        if not self.shared:
            return
        self.show.phase("training the supernet", self.plan.supernet_epochs)
        initial = self.study.folder / "initial.safetensors"
        if initial.exists():
            load_weights(self.family, initial)
        else:
            save_weights(self.family, initial)
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
        if not any(t.state == "done" for t in trials):
            raise BudgetError(
                f"{made.name} found no candidate within {', '.join(map(str, self.limits))} "
                f"in {self.plan.trials} trials: raise a limit or the number of trials"
            )
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

    # --- from trials to finalists ----------------------------------------------------------

    def price(self, candidate: Candidate) -> dict[str, Reading]:
        """Every counted or predicted cost of one candidate."""
        return self.pricing(self.family.space.encode([candidate])).readings()[0]

    def measured(self, candidate: Candidate, network: torch.nn.Module | None, key: str) -> Reading:
        """The latency on the real runtime, measured once a study and key, then read."""

        def measure() -> dict[str, Any]:
            built = self.family.build(candidate) if network is None else network
            timing = self.runtime.measure(built.eval(), self.family.example(self.runtime.batch))
            return {
                "value": timing.median_ms,
                "spread": timing.spread * timing.median_ms,
                "p90": timing.p90_ms,
                "runs": timing.runs,
                "busy": timing.busy,
            }

        got = self.study.once(f"{key}/{candidate.id}", measure)
        return Reading(got["value"], "ms", "measured", "", got["spread"])

    def busy(self, candidate: Candidate) -> bool:
        """Whether other work disturbed the measurement of the trained network."""
        return bool(self.study.once(f"latency-trained/{candidate.id}", dict).get("busy"))

    def keeps(self, readings: dict[str, Reading], margin: float = 1.0) -> bool:
        """Whether the readings keep every limit; measured latency within `margin` of its own."""
        for limit in self.limits:
            bound = limit.bound
            if readings[limit.metric].how == "measured" and limit.op == "<=":
                bound *= margin
            if replace(limit, bound=bound).violation([readings[limit.metric].value])[0] > 0:
                return False
        return True

    def first_within(
        self, candidates: Iterable[Candidate], count: int, taken: Sequence[Candidate] = ()
    ) -> list[Candidate]:
        """The first `count` candidates that keep the limits as measured on the real runtime."""
        within: list[Candidate] = []
        near: list[Candidate] = []
        ratios: list[float] = []
        for candidate in candidates:
            if len(within) >= count or len(ratios) >= _MEASURED_AT_MOST:
                break
            if candidate in taken:
                continue
            price = self.price(candidate)
            predicted = price["latency_ms"]
            # where the table is off by a factor for all, don't measure what can't keep the limit
            usual = float(np.median(ratios)) if len(ratios) >= 4 else 1.0
            corrected = replace(predicted, value=predicted.value * usual)
            if not self.keeps({**price, "latency_ms": corrected}):
                continue
            reading = self.measured(candidate, None, "latency")
            ratios.append(reading.value / predicted.value)
            if self.keeps({**price, "latency_ms": reading}, _MARGIN):
                within.append(candidate)
            elif self.keeps({**price, "latency_ms": reading}):
                near.append(candidate)
        return (within + near)[:count]

    def ordered(self, trials: Sequence[Trial]) -> list[Candidate]:
        """Trials that keep the limits as predicted, the best estimate first, cheap before dear."""
        sign = -1.0 if self.quality.goal == "max" else 1.0
        done = [t for t in trials if t.state == "done" and not t.violation]
        done.sort(
            key=lambda t: (
                sign * t.metrics[self.quality.name].value,
                t.metrics[self.axis].value,
                t.position,
            )
        )
        return [t.candidate for t in done]

    def select(self, searched: Sequence[Trial], random: Sequence[Trial]) -> dict[str, list[Any]]:
        """Who is trained to the end: the best found, cheaper ones on the front, the baselines."""
        self.show.phase("measuring finalists on the real runtime", 1)
        top = self.first_within(self.ordered(searched), self.plan.finalists)
        if not top:
            top = self._smallest_within(searched)
        cheaper = self._cheaper(searched, top)
        hand = self.first_within(self._hand(), 1)
        by_chance = self.first_within(self.ordered(random), self.plan.finalists)
        return {"search": top, "cheaper": cheaper, "hand": hand, "random": by_chance}

    def _smallest_within(self, trials: Sequence[Trial]) -> list[Candidate]:
        rising = sorted(
            (t for t in trials if t.state == "done"), key=lambda t: t.metrics["latency_ms"].value
        )
        found = self.first_within([t.candidate for t in rising], 1)
        if found:
            return found
        least = self.measured(rising[0].candidate, None, "latency")
        raise BudgetError(
            f"no candidate keeps {', '.join(map(str, self.limits))} as measured: the cheapest of "
            f"{len(rising)} trials takes {least.value:.4g} ms on {self.runtime.name}"
        )

    def _cheaper(self, trials: Sequence[Trial], top: Sequence[Candidate]) -> list[Candidate]:
        """One front candidate at about half the cost of the best, so that the front has a slope."""
        done = [t for t in trials if t.state == "done" and not t.violation]
        cost = self.price(top[0])[self.axis].value
        cheap = [t for t in done if t.metrics[self.axis].value <= 0.6 * cost]
        return self.first_within(self.ordered(cheap), 1, taken=top)

    def _hand(self) -> list[Candidate]:
        codes: Codes = hand_scaled(self.family.space)
        keeps = self.problem.violations(self.pricing(codes)) <= 0.05  # the table may be off
        return self.family.space.decode(codes[keeps][::-1])

    # --- to the end ------------------------------------------------------------------------

    def finish(
        self, chosen: Sequence[Candidate]
    ) -> dict[Candidate, tuple[str, dict[str, Reading]]]:
        """Trains each from the supernet's weights and from scratch; keeps the better start."""
        starts = ("supernet", "scratch") if self.shared else ("scratch",)
        epochs = int(self.study.once("final epochs", lambda: self._final_epochs(len(chosen))))
        recipe = replace(self.recipe, epochs=epochs)
        best: dict[Candidate, tuple[str, dict[str, Reading]]] = {}
        name = f"{self.quality.name}_validation"
        sign = 1.0 if self.quality.goal == "max" else -1.0
        for start in starts:
            self.show.phase(f"training to the end, from {start}", len(chosen))
            done = 0

            def on_trial(trial: Trial) -> None:
                nonlocal done
                done += 1
                self.show.step(done, len(chosen))

            used = replace(recipe, lr=recipe.lr * 0.5) if start == "supernet" else recipe
            work = Finish(self.family, self.task, used, self.seed, start, self.study.folder)  # type: ignore[arg-type]
            for trial in self.study.map(
                f"final from {start}",
                list(chosen),
                work,
                executor=self.executor(),
                on_trial=on_trial,
            ):
                if trial.state != "done":
                    continue
                value = sign * trial.metrics[name].value
                old = best.get(trial.candidate)
                if old is None or value > sign * old[1][name].value:
                    best[trial.candidate] = (start, trial.metrics)
        return best

    def _final_epochs(self, count: int) -> int:
        """What was planned, or what the time that is left allows if the machine became slower."""
        if self.budget.seconds is None or "final_epoch" not in self.speed:
            return self.plan.final_epochs
        left = self.budget.seconds - self.spent() - 6.0  # export and report
        planned = self.plan.supernet_epochs * self.speed["supernet_epoch"]
        slower = self.study.phase_seconds().get("supernet", 0.0) / planned if planned else 1.0
        starts = 2 if self.shared else 1
        return fit_epochs(self.plan, left, slower, self.speed, self.workers, starts * count)

    def spent(self) -> float:
        """Seconds that this study took so far, over all its runs."""
        return sum(self.study.phase_seconds().values()) + time.time() - self.phase_started

    def entry(
        self, candidate: Candidate, name: str, start: str, final: dict[str, Reading]
    ) -> Entry:
        """Measures the trained network, tests it once, and puts all its numbers together."""
        weights = weights_path(self.study.folder, candidate, start)
        network = trained_network(self.family, candidate, weights)
        metrics = dict(self.price(candidate))
        metrics["latency_ms_predicted"] = metrics["latency_ms"]
        metrics["latency_ms"] = self._settled(candidate, network)
        metrics.update(final)
        if candidate in self.estimates:
            metrics[f"{self.quality.name}_estimated"] = self.estimates[candidate]
        tested = self.study.once(
            f"test/{candidate.id}/{start}", lambda: train.evaluate(network, self.task, "test")
        )
        for metric in self.task.metrics:
            if metric.name in tested:
                metrics[metric.name] = Reading(tested[metric.name], metric.unit, "measured", "test")
        return Entry(candidate, name, metrics, start)

    def _settled(self, candidate: Candidate, network: torch.nn.Module) -> Reading:
        """The trained network's latency; where it lands over the limit and the first measurement
        did not, the median of four decides."""
        reading = self.measured(candidate, network, "latency-trained")
        price = self.price(candidate)
        if self.keeps({**price, "latency_ms": reading}):
            return reading
        again = [self.measured(candidate, network, f"latency-trained-{i}") for i in range(2)]
        all_four = sorted(
            [self.measured(candidate, None, "latency"), reading, *again], key=lambda r: r.value
        )
        middle = all_four[1:3]
        value = sum(r.value for r in middle) / 2
        return replace(reading, value=value, spread=all_four[-1].value - all_four[0].value)

    def non_dominated(self, entries: Sequence[Entry]) -> list[Entry]:
        """The front of trained, measured entries by validation quality and measured cost."""
        sign = -1.0 if self.quality.goal == "max" else 1.0
        values = np.array(
            [
                [
                    sign * e.metrics[f"{self.quality.name}_validation"].value,
                    e.metrics[self.axis].value,
                ]
                for e in entries
            ]
        )
        return [entries[i] for i in front(values)]
