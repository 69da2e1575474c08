"""Repair of a cut language model: layer by layer, then by distillation; the best stage is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from espalier.compress.language.repair.distilling import distil, twin_of
from espalier.compress.language.repair.refit import refit
from espalier.costs.language_times import TIMES
from espalier.flows.finals import Entry
from espalier.flows.language.building import LATE, dense, early, late, reshaped
from espalier.flows.language.harm import felt, loss_of
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.latency import measured
from espalier.flows.weights import derive, load_weights, save_weights, weights_path
from espalier.problem import Reading
from espalier.space import Candidate

START = "repaired"
_LAST_SECONDS = 10.0  # export and report, after everything else
_LEAST = 1.0  # seconds of repair for each model, however little is left
_REFIT_TOKENS = 8192
_ROUNDING = 0.5  # of the time that is left, for training through rounded weights


def repair_all(
    job: LanguageJob, chosen: Mapping[str, Candidate], repair: bool = True
) -> dict[str, Entry]:
    """Repairs each candidate in an equal share of the time that is left, and tests each once."""
    count = len(set(chosen.values()))
    seconds = job.study.once("repair seconds", lambda: _share(job, count))
    out = {}
    for name, candidate in chosen.items():
        repaired(job, name, candidate, seconds, repair)
        out[name] = replace(entry_of(job, candidate), name=name)
    return out


def _share(job: LanguageJob, count: int) -> float | None:
    left = job.left()
    return None if left is None else max((left - _LAST_SECONDS) / max(count, 1), _LEAST)


def repaired(
    job: LanguageJob, name: str, candidate: Candidate, seconds: float | None, repair: bool
) -> dict[str, Any]:
    """Repairs one candidate and keeps its weights; gives its stages. Done once a study."""
    path = weights_path(job.study.folder, candidate, START)

    def work() -> dict[str, Any]:
        work = _Repair(job, name, candidate, seconds)
        model, stages = work.run(repair)
        save_weights(model, path)
        return {"stages": stages, "seconds": seconds}

    done: dict[str, Any] = job.study.once(f"repair/{candidate.id}", work)
    return done


class _Repair:
    """One repair: each stage starts from the best before it."""

    def __init__(
        self, job: LanguageJob, name: str, candidate: Candidate, seconds: float | None
    ) -> None:
        self.job, self.name, self.candidate = job, name, candidate
        self.seconds, self.started = seconds, time.time()
        self.stages: list[dict[str, Any]] = []
        self.shape = early(job.family, candidate)  # before bits and sparsity
        self.best: nn.Module = self.shape
        self.top = float("inf")
        kept: dict[str, Any] = {n: v for n, v in candidate.items() if n.partition(":")[0] in LATE}
        self.rounds: dict[str, int] = {
            n.partition(":")[2]: v for n, v in kept.items() if n.startswith("bits:") and v < 16
        }
        last = {d.name: d.options[-1] for d in job.family.space.decisions}
        self.reshaped = reshaped(job.family, candidate)
        self.sparse = any(n.startswith("sparsity:") and v != last[n] for n, v in kept.items())

    def run(self, repair: bool) -> tuple[nn.Module, list[dict[str, Any]]]:
        self.judge("cut", self.shape, late(self.job.family, self.shape, self.candidate))
        if repair and self.candidate != self.job.family.original:
            if self.reshaped:
                self.stage("least squares", self.least_squares)
                self.stage("distilled", self.distilled)
            if self.rounds and not self.sparse:
                self.rounded()
        return self.best, self.stages

    def stage(self, name: str, change: Callable[[nn.Module], Any]) -> None:
        self.job.show.phase(f"{self.name}: {name}", 100)
        network = twin_of(self.shape)
        more = change(network)
        network.requires_grad_(False)
        whole = late(self.job.family, network, self.candidate)
        self.judge(name, network, whole, more)

    def judge(
        self, name: str, shape: nn.Module, whole: nn.Module, more: Mapping[str, Any] | None = None
    ) -> None:
        job = self.job
        loss = self.loss(whole)
        kept = loss < self.top
        if kept:
            self.shape, self.best, self.top = shape, whole, loss
        row = {"stage": name, "kept": kept, "seconds": round(time.time() - self.started, 2)}
        self.stages.append({**row, "metrics": job.task.told(loss), **(more or {})})
        job.show.best(f"{self.name}, {name}: loss {loss:.4g}")

    def loss(self, whole: nn.Module) -> float:
        """The validation loss, with the candidate's own cache."""
        windows = self.job.windows
        return loss_of(whole, windows, felt(self.job.family, self.candidate, windows))

    def left(self) -> float | None:
        """Seconds of this repair's own time."""
        if self.seconds is None:
            return None
        return max(self.seconds - (time.time() - self.started), 0.3 * _LEAST)

    # --- the stages ------------------------------------------------------------------------

    def least_squares(self, network: nn.Module) -> dict[str, Any]:
        """The original's hidden states, layer by layer, on calibration windows."""
        most = max(1, _REFIT_TOKENS // (self.job.task.context + 1))
        windows = self.job.task.windows("train", most)[:, :-1]
        return {"maps": refit(network, self.job.family.model, windows)}

    def distilled(self, network: nn.Module) -> dict[str, Any]:
        """The original's distributions, in the rest of the time; half where rounding follows."""
        left = self.left()
        if left is not None and self.rounds:
            left *= _ROUNDING
        done = distil(
            network,
            self.job.family.model,
            self.job.task.windows("train")[:, :-1],
            self.loss,
            seconds=left,
            seed=derive(self.job.seed, "repair", self.candidate.id),
            progress=self.job.show.step,
        )
        return {"history": list(done.history)}

    def rounded(self) -> None:
        """Training through the rounded weights, from these: at its end they lie on their levels."""
        self.job.show.phase(f"{self.name}: trained in its bits", 100)
        network = twin_of(late(self.job.family, self.shape, self.candidate, hollow=True))
        done = distil(
            network,
            self.job.family.model,
            self.job.task.windows("train")[:, :-1],
            self.loss,
            seconds=self.left(),
            bits=self.bits(),
            seed=derive(self.job.seed, "rounded", self.candidate.id),
            progress=self.job.show.step,
        )
        network.requires_grad_(False)
        whole = dense(network)
        self.judge("trained in its bits", self.shape, whole, {"history": list(done.history)})

    def bits(self) -> dict[str, int]:
        """Place -> bits of its weights, one decision for all layers spelled out."""
        out = {}
        for layer in self.job.family.anatomy.layers:
            for part in ("qkv", "out", "up", "down", "experts"):
                own = self.rounds.get(f"{layer.path}.{part}", self.rounds.get(f"every.{part}"))
                if own is not None:
                    out[f"{layer.path}.{part}"] = int(own)
        tables = {n: int(b) for n, b in self.rounds.items() if "layers" not in n}
        return {**tables, **out}


def entry_of(job: LanguageJob, candidate: Candidate) -> Entry:
    """The row of a repaired candidate: its costs, validation, and the test read once."""
    stages: Sequence[Mapping[str, Any]] = job.study.once(f"repair/{candidate.id}", dict)["stages"]
    kept = [s for s in stages if s["kept"]][-1]
    metrics = dict(job.price(candidate))
    if job.runtime is not None:
        metrics |= {f"{name}_predicted": metrics[name] for name in TIMES}
        metrics |= measured(job, candidate)
    metrics |= job.validated(kept["metrics"]["loss"])
    metrics["loss_before"] = Reading(
        stages[0]["metrics"]["loss"], job.quality.unit, "measured", "validation"
    )
    model, windows = model_of(job, candidate), job.task.windows("test")
    tested = job.study.once(
        f"test/{candidate.id}",
        lambda: loss_of(model, windows, felt(job.family, candidate, windows)),
    )
    metrics |= tested_readings(job, tested)
    return Entry(candidate, "", metrics, START)


def tested_readings(job: LanguageJob, loss: float) -> dict[str, Reading]:
    """A test loss as readings."""
    units = {m.name: m.unit for m in job.task.metrics}
    return {n: Reading(v, units[n], "measured", "test") for n, v in job.task.told(loss).items()}


def model_of(job: LanguageJob, candidate: Candidate) -> nn.Module:
    """The repaired model of a candidate, read from the study."""
    if candidate == job.family.original:
        return job.family.model  # type: ignore[no-any-return]
    network = dense(early(job.family, candidate))  # bits and zeros lie in the weights that are read
    load_weights(network, weights_path(job.study.folder, candidate, START))
    return network
