"""`espalier shrink`, of a module, a file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.cli import shrink_options as options
from espalier.cli.language import in_layers, in_memory, refuse, refuse_in_layers
from espalier.cli.options import (
    Batch,
    Device,
    Json,
    Out,
    Quiet,
    Resume,
    Seed,
    Threads,
    limits,
    loaded,
    loaded_task,
    one_line_errors,
    runtime,
)
from espalier.cli.printing import print_explained, print_found, print_json
from espalier.errors import EspalierError

_USUAL = "width,depth"


def shrink(
    model: options.Model,
    text: options.Text = None,
    weights: options.Weights = None,
    task: options.Trained = "digits",
    max_: options.Most = None,
    budget: options.Budget = "10min",
    decisions: options.Decisions = None,
    grouped: options.Grouped = False,
    context: options.Context = None,
    memory: options.Memory = None,
    solver: options.Solver = "auto",
    measure: options.Harm = "divergence",
    repair: options.Repair = True,
    tune: options.Tune = True,
    baselines: options.Baselines = True,
    explain: options.Explain = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Out = None,
    resume: Resume = False,
    reuse: options.Reuse = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a trained model fit: cut, measure, repair, export, report.

    Example: `espalier shrink model.py:make_model --weights w.safetensors --task cifar10
    --max latency_ms=60% --max bytes=50% --budget 10min --out runs/small`

    A language model: `espalier shrink ./my-llama --text corpus.txt --max bytes=60%
    --max kv_bytes=25%@4096 --budget 20min --out ./my-llama-small`

    A ViT or BERT that classifies: `espalier shrink ./my-vit --task cifar10 --max latency_ms=60%`
    """
    asked: dict[str, Any] = {
        "budget": budget, "decisions": decisions, "measure": measure, "repair": repair,
        "baselines": baselines, "seed": seed, "out": out, "resume": resume, "reuse": reuse,
    }  # fmt: skip
    with one_line_errors():
        if text is not None or (Path(model).is_dir() and not _reads(model)):
            refuse(weights, solver, text, explain, task, device, batch, tune)
            asked |= {"grouped": grouped, "context": context, "threads": threads}
            asked["within"] = limits(max_ or [])
            if memory is not None:
                _through_layers(model, text, memory, explain, as_json, quiet, **asked)
            else:
                in_memory(model, text, explain, as_json, quiet, **asked)
            return
        if grouped or context is not None or memory is not None:
            raise EspalierError(
                f"--grouped, --context and --memory are for a folder of a language model, got {model!r}"
            )
        asked |= {"weights": weights, "tune": tune}
        asked |= {"decisions": decisions if decisions is not None else _USUAL}
        if explain:
            _explained(model, task, as_json, weights, asked["decisions"], seed)
            return
        asked |= {"solver": solver, "on": runtime(device, threads, batch)}
        _shrunk(model, task, max_ or [], as_json, quiet, **asked)


def _explained(
    model: str, task: str, as_json: bool, weights: Path | None, decisions: str, seed: int
) -> None:
    """What could be decided on a module or a file; printed."""
    from espalier.flows.explain import explain

    rows = explain(
        _given(model), loaded_task(task), weights=weights, decisions=decisions, seed=seed
    )
    print_json(rows) if as_json else print_explained(rows)


def _shrunk(
    model: str, task: str, most: list[str], as_json: bool, quiet: bool, **asked: Any
) -> None:
    """The whole job on a module or a file; printed."""
    from espalier.flows.progress import display
    from espalier.flows.shrink import shrink
    from espalier.problem import SearchBudget

    given = _given(model)
    spend = SearchBudget.parse(asked.pop("budget"))
    show = display(spend.seconds, quiet or as_json)
    found = shrink(
        given, loaded_task(task), within=limits(most), budget=spend, progress=show, **asked
    )
    page = found.publish()
    if as_json:
        print_json(found.to_json())
    else:
        name = found.best.name
        shown = "shrunk" if name == "shrunk" else f"shrunk: {name}"  # a baseline that was better
        print_found(found.to_json(), page, shown)


def _given(model: str) -> Any:
    """The path of a graph's file or of a folder, or the object that `file.py:name` points to."""
    path = Path(model)
    return path if path.suffix in (".pt2", ".onnx") or path.is_dir() else loaded(model)


def _reads(folder: str) -> bool:
    """Whether a folder's model is shrunk for a task (BERT, ViT) rather than on a text."""
    from espalier.compress.language.files.folder import is_encoder

    return is_encoder(folder)


def _through_layers(
    model: str,
    text: Path | None,
    memory: str,
    explain: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """A language model a layer at a time, which refuses what it has no use for; printed."""
    fixed = {"--decisions": asked["decisions"], "--explain": explain, "--reuse": asked["reuse"]}
    fixed |= {"--grouped": asked["grouped"], "--measure": asked["measure"] != "divergence"}
    fixed |= {"--no-baselines": not asked["baselines"]}
    fixed |= {"--no-repair": not asked["repair"], "--threads": asked["threads"] != 1}
    refuse_in_layers(fixed, asked["out"])
    kept = {name: asked[name] for name in ("within", "context", "seed", "out", "resume")}
    in_layers(model, text, memory, as_json, quiet, **kept)
