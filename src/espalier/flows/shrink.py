"""The other main job: a trained model and a budget go in, the best model that fits comes out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from espalier import tasks
from espalier.compress import Cut, Pretrained
from espalier.compress.sparsity import StoredBytes
from espalier.costs import Counts, OnnxRuntime, PredictedLatency
from espalier.errors import BudgetError, EspalierError, NotInTimeError
from espalier.estimators.calibration import Measure
from espalier.flows.decisions import make_cuts
from espalier.flows.finals import ANSWER
from espalier.flows.fitting import Solve, best_fitted
from espalier.flows.given import ModelLike, given_model
from espalier.flows.measuring import begun, study_folder, withdraw
from espalier.flows.pricing import check_names
from espalier.flows.progress import Display, Silent
from espalier.flows.repairing import repair_all
from espalier.flows.rivals import rivals
from espalier.flows.shrink_identity import PAID, shrink_identity
from espalier.flows.shrinking import Shrinking
from espalier.flows.shrunk import Shrunk
from espalier.flows.solving import check_counted, check_decided, chosen, known_names, solves_by
from espalier.problem import Limit, Limits, SearchBudget, limits
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe
from espalier.train.evaluate import calibration
from espalier.train.running import device_of

_CALIBRATION = 128  # images that ranges of activations are read from
_TIGHTER = (1.0, 0.95, 0.88)  # where the repaired network lands over the limit after all


def shrink(
    model: ModelLike,
    task: Task | str,
    *,
    example: Tensor | None = None,
    weights: str | Path | None = None,
    within: Limits | Sequence[Limit],
    on: OnnxRuntime | None = None,
    budget: str | float | SearchBudget = "10min",
    decisions: str | Iterable[str | Cut] = ("width", "depth"),
    solver: str = "auto",
    measure: Measure = "divergence",
    repair: bool = True,
    tune: bool = True,
    baselines: bool = True,
    recipe: Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    reuse: str | Path | None = None,
    progress: Display | None = None,
) -> Shrunk:
    """Changes a trained model so that it keeps limits measured on a device, and stays good.

    The flow: the original is measured; the latency of its layers at every width goes into a table;
    what every option harms is read on training data; an exact program chooses under all limits at
    once, and its answer is built, measured and tightened until it keeps the limits as measured;
    then it is repaired (statistics, least squares, distillation from the original), measured again
    and tested once. What it is compared with gets the same: all widths thinned alike, one threshold
    on the importance of all channels, and the best of random candidates.

    - `model`: a module, a function that makes one (of nothing, or of shape and classes), or a file.
    - `weights`: a .safetensors, .npz or .pt state dict for it. `example`: an input, if not the task's.
    - `task`: a task, or a name such as "digits" or "cifar10".
    - `within`: limits, several at once; "60%" is a share of the original.
    - `on`: the runtime that latency is measured on.
    - `budget`: the time for everything: most of it is repair.
    - `decisions`: kinds among "width", "depth", "bits" and "sparsity", with settings behind a colon
      ("bits:8/4", "bits:weights/4", "sparsity:2:4/50%", "width:multiple=8"), or cuts.
    - `solver`: "allocate" (the exact program), "search" (evolution on whole candidates), "relax"
      (masks learned by gradients: "relax:dsa", which it is short for, "relax:pas", "relax:bip"), or
      "auto".
    - `measure`: what harm is: "loss", "divergence" from the original's outputs, or "gradient".
    - `repair`: False leaves the weights as cut, batch-norm statistics set anew.
    - `tune`: False ends the repair after its closed forms, which take seconds and no labels.
    - `baselines`: False gives their time to the answer.
    - `out`: the study's folder; a new one under `runs/` when absent. `resume` goes on from it.
    - `reuse`: the folder of an earlier shrink of the same model: its table and profile are taken
      over, so that other limits take seconds up to repair.

    What is handed out is the answer, or a baseline that keeps the limits too and is better on
    validation. It keeps the limits as measured, or `BudgetError` says what is reachable. Raises
    `EspalierError` with one line for bad input. Ctrl-C ends cleanly; call again with `resume=True`.
    """
    began = time.time()
    solver = known_names(solver, measure)
    task = tasks.make(task) if isinstance(task, str) else task
    asked, spend = _limits(within, task), SearchBudget.parse(budget)
    cuts = make_cuts(decisions)
    module, one = given_model(model, task, weights, example)
    family = pretrained(module, one, task, cuts, _name(model, module), seed)
    check_decided(family, solver)
    runtime = on or OnnxRuntime()
    folder = study_folder(out, f"{task.name}-{family.name}-small", resume)
    identity = shrink_identity(family, task, asked, runtime, solver, measure, seed, cuts)
    identity |= {"repair": repair, "baselines": baselines} | ({} if tune else {"tune": tune})
    identity |= {} if recipe is None else {"recipe": asdict(recipe)}
    settings = {"budget": str(spend)}
    taken = {} if reuse is None else PAID.of(Path(reuse), identity)
    study = begun(folder, identity, settings, seed, resume)
    show = progress or Silent()
    if (device := device_of(module).type) != "cpu":
        study.notes.append(f"the model came on {device}: a shrink computes on the processor alone")
    try:
        with study, show:
            for text in study.notes:
                show.note(text)
            study.event("phase", name="reading the model", seconds=time.time() - began)
            job = Shrinking(
                family, task, asked, runtime, study, seed, spend, show, repair, recipe, measure, taken,
                solver=solver, baselines=baselines, tune=tune, cuts=cuts,
            )  # fmt: skip
            return _run(job, began)
    except EspalierError as error:
        if resume:
            raise
        if PAID.nothing(folder):
            withdraw(folder)
            raise
        error.args = (f"{error}; what was measured is kept: reuse {folder}",)
        raise


def _run(job: Shrinking, began: float) -> Shrunk:
    with job.phase("original"):
        job.read_original()
        check_counted(job)
    with job.phase("latency table"):
        job.calibrate()
    with job.phase("sensitivity"):
        job.set_estimator()
        name, why = chosen(job, job.solver)
        job.show.note(f"solver {name}: {why}")
        solves = solves_by(job, name)
    with job.phase("allocation"):
        job.show.phase("choosing within the limits as measured", 1)
        wanted = job.chosen("chosen", partial(_answer_and_rivals, job, solves))
    with job.phase("repair"):
        entries = repair_all(job, wanted)
        for tighter in _TIGHTER[1:]:
            if job.keeps(entries[ANSWER].metrics):
                break
            job.show.note("the repaired network is over the limit: choosing a smaller one")
            over = entries[ANSWER]
            job.slower[over.candidate] = over.metrics["latency_ms"].value
            try:
                again = job.chosen(f"chosen/{tighter}", partial(_answer, job, solves, tighter))
            except (BudgetError, NotInTimeError):
                break  # a rival may keep the limits
            entries |= repair_all(job, again, again=True)
    return Shrunk.settle(job, entries, (name, why), time.time() - began)


def _answer_and_rivals(job: Shrinking, solves: Mapping[str, Solve]) -> dict[str, Candidate]:
    if not job.baselines:
        return _answer(job, solves)
    return best_fitted(job, ANSWER, solves) | rivals(job)


def _answer(
    job: Shrinking, solves: Mapping[str, Solve], tighten: float = 1.0
) -> dict[str, Candidate]:
    return {ANSWER: best_fitted(job, ANSWER, solves, tighten)[ANSWER]}


# --- what is given -----------------------------------------------------------------------------


def pretrained(
    module: nn.Module,
    example: Tensor,
    task: Task,
    cuts: Sequence[Cut],
    name: str = "model",
    seed: int = 0,
) -> Pretrained:
    """The model as a family of what can be cut from it; ranges of activations are read from training
    data."""
    data = calibration(task, 1, _CALIBRATION, seed)[0]
    return Pretrained(module, example, cuts, name=name, calibration=data)


def _limits(within: Limits | Sequence[Limit], task: Task) -> tuple[Limit, ...]:
    asked = limits(within)
    if not asked:
        raise BudgetError(
            "a shrink needs a limit, like latency_ms=60% or bytes=50% of the original's"
        )
    known = {m.name: m for m in (*Counts.metrics, *StoredBytes.metrics, *PredictedLatency.metrics)}
    check_names(asked, known, task.metrics)
    return asked


def _name(model: ModelLike, module: nn.Module) -> str:
    if isinstance(model, (str, Path)):
        return Path(model).stem
    inner = dict(module.named_children())
    wrapped = list(inner) == ["model", "logits"]  # of transformers, taken by its logits
    return type(inner["model"] if wrapped else module).__name__.lower()
