"""The job for language models: a folder, a text and limits go in, the best model that fits comes out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from espalier.compress import Cut
from espalier.compress.language.anatomy import KINDS, anatomy
from espalier.compress.language.cache.cuts import held
from espalier.compress.language.family import Language
from espalier.compress.language.files.folder import Folder, read_folder
from espalier.costs.language import LanguageCounts
from espalier.costs.language_times import TIMES, Generation
from espalier.errors import BudgetError, DataError, EspalierError, unknown
from espalier.flows.finals import ANSWER
from espalier.flows.language.curve import curve
from espalier.flows.language.cuts import language_cuts
from espalier.flows.language.generating import generation
from espalier.flows.language.grouped import price_of_one_shape
from espalier.flows.language.harm import MEASURES, loss_of
from espalier.flows.language.identity import PAID, language_identity
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.latency import (
    WRITTEN,
    fitted,
    measured,
    still_kept,
    times,
    told_times,
)
from espalier.flows.language.limits import language_limits
from espalier.flows.language.reach import check_reach
from espalier.flows.language.repairing import model_of, repair_all, tested_readings
from espalier.flows.language.reproducing import WINDOWS, Asked
from espalier.flows.language.rivals import rivals
from espalier.flows.language.room import check_place, check_room
from espalier.flows.language.shrunk import ShrunkLanguage
from espalier.flows.language.solving import evolved, finalist, solved
from espalier.flows.measuring import begun, study_folder, withdraw
from espalier.flows.pricing import Pricing
from espalier.flows.progress import Display, Silent
from espalier.problem import Limit, Limits, SearchBudget
from espalier.solvers.allocate import Solution
from espalier.space import Candidate
from espalier.tasks.tokens import TokenText, encoder, token_text

_CONTEXT = 512  # of windows, where the model allows more and none is asked for
_CALIBRATED = 32  # windows that the order of heads and units, and scales, are read from
_CALIBRATED_TOKENS = 8192


def shrink_language(
    model: str | Path,
    text: str | Path | bytes,
    *,
    within: Limits | Sequence[Limit],
    budget: str | float | SearchBudget = "10min",
    decisions: str | Iterable[str | Cut] | None = None,
    grouped: bool = False,
    context: int | None = None,
    measure: str = "divergence",
    repair: bool = True,
    baselines: bool = True,
    windows: tuple[int, int, int] = WINDOWS,
    seed: int = 0,
    threads: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    reuse: str | Path | None = None,
    progress: Display | None = None,
) -> ShrunkLanguage:
    """Makes a language model keep limits, and stay as good as they allow.

    The flow: what every option of every decision harms is read on calibration windows of the text;
    an exact program chooses under all limits at once; evolution on calibration loss goes on from its
    answer; what was cut is repaired (least squares layer by layer, distillation from the original,
    training through rounded weights), the best stage by validation stays; it is tested once beside
    its baselines, written as a folder that `transformers` loads or as ONNX, and checked.

    - `model`: a local Hugging Face folder with safetensors; nothing in it is run.
    - `text`: a UTF-8 file like what the model is for; split into calibration, validation and test.
    - `within`: limits on bytes, params, active_params, kv_bytes, prefill_ms, decode_ms; "60%" is a
      share of the original's, "25%@4096" one at a context of 4096 tokens.
    - `budget`: the time for everything: most of it is repair.
    - `decisions`: kinds by name (sublayers, blocks, heads, units, windows, hidden, experts, merge,
      active, bits, tables, sparsity, kv, growing, rank, span) or cuts with settings; by default those that the limits ask
      for. `grouped`: all layers keep one shape.
    - `context`: tokens of a window; by default the model's, at most 512.
    - `measure`: what harm is: "divergence" of the outputs, "loss", or "gradient".
    - `threads`: what times are measured with.
    - `out`: the folder of the study and of the smaller model. `resume` goes on from it; `reuse`
      takes the profile of an earlier shrink over, so that other limits take seconds up to repair; of
      one with other decisions, what the kinds in common harm.

    The answer keeps the limits, or `BudgetError` says what is reachable. Raises `EspalierError` with
    one line for bad input.
    """
    began = time.time()
    if measure not in MEASURES:
        raise EspalierError(unknown("measure of harm", measure, MEASURES))
    if threads < 1:
        raise EspalierError(f"times are measured with 1 thread or more, got {threads}")
    asked, length = language_limits(within)
    if not (decisions is None or isinstance(decisions, str)):
        decisions = tuple(decisions)
    wanted = Asked(asked, decisions, repair, baselines, threads, windows)
    spend = _budget(budget)
    folder = read_folder(model)
    _check_kind(folder)
    where = study_folder(out, f"{folder.path.name}-small", resume)
    check_place(where, folder)
    task = _text(folder, text, context, windows, seed)
    check_room(folder)
    network = folder.model()
    parts = anatomy(network)
    at, runtime = _length(length, parts.context, asked, threads)
    cuts = language_cuts(decisions, parts, asked, grouped, at + (WRITTEN if runtime else 0))
    family = _family(folder, network, task, cuts, grouped)
    del network  # the family has its own
    identity = language_identity(
        folder, family, task, asked, at, cuts,
        measure=measure, seed=seed, grouped=grouped, repair=repair, baselines=baselines,
        threads=threads,
    )  # fmt: skip
    taken = {} if reuse is None else PAID.of_space(Path(reuse), identity, family.space)
    study = begun(where, identity, {"budget": str(spend)}, seed, resume)
    show = progress or Silent()
    try:
        with study, show:
            for line in study.notes:
                show.note(line)
            study.event("phase", name="reading the model", seconds=time.time() - began)
            job = LanguageJob(
                folder, family, task, asked, at, runtime, study, seed, spend, show, measure, wanted, grouped,
                taken,
            )  # fmt: skip
            return _run(job, cuts, repair, baselines, began)
    except EspalierError as error:
        if resume:
            raise
        if PAID.nothing(where):
            withdraw(where)
            raise
        error.args = (f"{error}; what was measured is kept: reuse {where}",)
        raise


def _run(
    job: LanguageJob, cuts: Sequence[Cut], repair: bool, baselines: bool, began: float
) -> ShrunkLanguage:
    with job.phase("original"):
        counts = _counts(job)
        job.pricing = Pricing(job.family.space, [counts])
        job.read_original()
        if job.runtime is not None:
            job.original.metrics |= measured(job, job.family.original)
        job.resolve()
        check_reach(job, cuts, _stored(job))
    if job.runtime is not None:
        with job.phase("timing"):
            job.pricing = Pricing(job.family.space, [counts, times(job)])
    with job.phase("sensitivity"):
        job.set_harm()
        job.sense()
    with job.phase("allocation"):
        answers: list[Solution] = []

        def solve(limits: Sequence[Limit]) -> Candidate:
            answers.append(solved(job, limits))
            return answers[-1].candidate

        first = fitted(job, solve)
    with job.phase("search"):
        others = rivals(job)
        found = evolved(job, [first, *others.values()])
        best = finalist(job, [*found, first, *others.values()])
        wanted = {ANSWER: still_kept(job, best, first)}
        if baselines:
            wanted |= others
            job.curve = curve(job)
        if job.grouped:
            job.one_shape = price_of_one_shape(job, cuts, _stored(job), first)
    with job.phase("repair"):
        entries = repair_all(job, wanted, repair)
    with job.phase("test"):
        loss = job.study.once(
            "test/original", lambda: loss_of(job.family.model, job.task.windows("test"))
        )
        metrics = {**job.original.metrics, **tested_readings(job, loss)}
        original = replace(job.original, metrics=metrics)
        answer = entries[ANSWER].candidate
        job.times = told_times(job, answer, lambda: model_of(job, answer))
        job.generation = generation(job, answer, lambda: model_of(job, answer))
    return ShrunkLanguage.settle(job, entries, original, answers[-1], time.time() - began)


def _stored(job: LanguageJob) -> int:
    """Bytes of a weight as the folder has it."""
    return torch.empty(0, dtype=job.folder.stored).element_size()


def _counts(job: LanguageJob) -> LanguageCounts:
    stored = _stored(job)
    count = held(job.family.cuts, stored, job.context)
    return LanguageCounts(job.family, stored=stored, context=job.context, held=count)


def explain_language(
    model: str | Path,
    within: Limits | Sequence[Limit],
    decisions: str | Iterable[str | Cut] | None = None,
    grouped: bool = False,
) -> list[dict[str, Any]]:
    """A row a decision (decision, kind, layers, options, original), then a row for what is left
    alone and why. Nothing is measured; without limits those on bytes are thought of.

    Errors: as `shrink_language`.
    """
    asked, length = language_limits(within or {"bytes": "50%"})
    folder = read_folder(model)
    _check_kind(folder)
    check_room(folder)
    network = folder.model()
    cuts = language_cuts(decisions, anatomy(network), asked, grouped, length or 0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(int(folder.config.vocab_size), (2, 16), generator=draw)
    rows: list[dict[str, Any]] = Language(
        network, ids, cuts, grouped=grouped, name=folder.path.name
    ).explain()
    return rows


# --- what is given -----------------------------------------------------------------------------


def _budget(given: str | float | SearchBudget) -> SearchBudget:
    spend = SearchBudget.parse(given)
    if spend.trials is not None:
        raise BudgetError(
            f"a language model is shrunk in a time, like 10min, not in trials: {spend}"
        )
    return spend


def _check_kind(folder: Folder) -> None:
    if not KINDS[folder.kind].decoder:
        decoders = ", ".join(sorted(name for name, kind in KINDS.items() if kind.decoder))
        raise EspalierError(
            f"{folder.path} is a {folder.kind}, which writes no text: give a decoder ({decoders}); "
            "shrink it for a task, where it classifies (--task, espalier.shrink(path, task)); or cut "
            "it in Python: Language(read_folder(path).model(), inputs, (Heads(), Units())) of "
            "espalier.compress.language has its decisions (.space) and makes smaller ones (.build)"
        )


def _text(
    folder: Folder,
    text: str | Path | bytes,
    context: int | None,
    windows: tuple[int, int, int],
    seed: int,
) -> TokenText:
    config = folder.config
    most = int(getattr(config, "max_position_embeddings", None) or _CONTEXT)
    if context is not None and not 2 <= context <= most:
        raise DataError(f"a context of this model is 2 to {most} tokens, got {context}")
    length = context or min(most, _CONTEXT)
    encode = encoder(folder.tokenizer())
    return token_text(text, int(config.vocab_size), length, encode, windows, seed)


def _family(
    folder: Folder,
    network: Any,
    task: TokenText,
    cuts: Sequence[Cut],
    grouped: bool,
) -> Language:
    most = max(1, min(_CALIBRATED, _CALIBRATED_TOKENS // (task.context + 1)))
    calibration = task.windows("train", most)[:, :-1]
    return Language(network, calibration, cuts, grouped=grouped, name=folder.path.name)


def _length(
    length: int | None, most: int, asked: Sequence[Limit], threads: int
) -> tuple[int, Generation | None]:
    """At how many tokens cache and times are asked for, and what measures the times, if they are."""
    if not any(x.metric in TIMES for x in asked):
        return length or most, None
    if length is not None and length > most:
        raise BudgetError(
            f"times are measured at a context that the model has, at most {most}, got @{length}"
        )
    at = length or min(most, _CONTEXT)
    return at, Generation(at, threads)
