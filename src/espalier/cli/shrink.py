"""`espalier shrink`, of a module, a file or a folder of a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
    one_line_errors,
    runtime,
)
from espalier.cli.printing import print_explained, print_found
from espalier.errors import EspalierError


def shrink(
    model: Annotated[
        str,
        typer.Argument(
            help="The trained model: my.py:make_model, called with nothing or with (shape, "
            "classes), or a .pt2 or .onnx file; or a Hugging Face folder of a language model."
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="A folder of a language model: a text like what it is for, UTF-8."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Its weights: a state dict as .safetensors, .npz or .pt."),
    ] = None,
    task: Annotated[str, typer.Option(help="What it was trained for: as for `search`.")] = "digits",
    max_: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            help="An upper limit, NAME=VALUE, as often as needed: latency_ms=0.3, bytes=200kB, "
            "macs=2M, params=60k, or a share of the original's: latency_ms=60%. Of a language model: "
            "bytes, params, active_params, kv_bytes=25%@4096, prefill_ms, decode_ms.",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="The time for everything, repair included: 40s, 10min.")
    ] = "10min",
    decisions: Annotated[
        str | None,
        typer.Option(
            help="What may be cut, with commas: width, depth, bits, sparsity (width,depth by "
            "default). Of a language model: sublayers, blocks, heads, units, hidden, experts, "
            "active, bits, tables, sparsity, kv, rank, span (what the limits ask for by default)."
        ),
    ] = None,
    grouped: Annotated[
        bool, typer.Option("--grouped", help="A language model's layers all keep one shape.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window of the text; 512 at most by default.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="A language model that is too large for memory: the most that may be held, 4GB. It "
            "goes through layer by layer; the limit is on bytes, all layers keep one shape, --budget "
            "is not used."
        ),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="auto; allocate: an exact program on what each option harms; search: evolution on "
            "whole candidates; relax, or relax:dsa, relax:pas, relax:bip: masks learned by gradients."
        ),
    ] = "auto",
    measure: Annotated[
        str,
        typer.Option(help="What harm is: divergence from the original's outputs, loss, gradient."),
    ] = "divergence",
    repair: Annotated[
        bool,
        typer.Option("--repair/--no-repair", help="Least squares and fine-tuning after the cut."),
    ] = True,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="Repair uniform and random cuts as well."),
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only list what can be decided, and what not and why.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Out = None,
    resume: Resume = False,
    reuse: Annotated[
        Path | None,
        typer.Option(
            help="Take over the table and the profile of this earlier shrink of the model."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a trained model fit: cut, measure, repair, export, report.

    Example: `espalier shrink model.py:make_model --weights w.safetensors --task cifar10
    --max latency_ms=60% --max bytes=50% --budget 10min --out runs/small`

    A language model: `espalier shrink ./my-llama --text corpus.txt --max bytes=60%
    --max kv_bytes=25%@4096 --budget 20min --out ./my-llama-small`
    """
    hint = f" Go on with the same command and --resume (study: {out})." if out else ""
    if Path(model).is_dir() or text is not None:
        with one_line_errors(hint):
            refuse(weights, solver, text, explain, task, device, batch)
            limited = limits(max_ or [])
            if memory is not None:
                fixed = {"--decisions": decisions, "--explain": explain, "--reuse": reuse}
                fixed |= {"--resume": resume, "--no-baselines": not baselines}
                fixed |= {"--grouped": grouped, "--measure": measure != "divergence"}
                fixed |= {"--no-repair": not repair, "--threads": threads != 1}
                refuse_in_layers(fixed, out)
                in_layers(
                    model, text, memory, as_json, quiet,
                    within=limited, context=context, seed=seed, out=out,
                )  # fmt: skip
                return
            in_memory(
                model, text, explain, as_json, quiet,
                within=limited, budget=budget, decisions=decisions, grouped=grouped,
                context=context, measure=measure, repair=repair, baselines=baselines, seed=seed,
                threads=threads, out=out, resume=resume, reuse=reuse,
            )  # fmt: skip
        return
    with one_line_errors(hint):
        if grouped or context is not None or memory is not None:
            raise EspalierError(
                f"--grouped, --context and --memory are for a folder of a language model, got {model!r}"
            )
        decisions = "width,depth" if decisions is None else decisions
        from espalier.flows.explain import explain as explained
        from espalier.flows.progress import display
        from espalier.flows.shrink import shrink as run
        from espalier.problem import SearchBudget

        given = Path(model) if Path(model).suffix in (".pt2", ".onnx") else loaded(model)
        if explain:
            rows = explained(given, loaded(task), weights=weights, decisions=decisions, seed=seed)
            print(json.dumps(rows)) if as_json else print_explained(rows)
            return
        spend = SearchBudget.parse(budget)
        found = run(
            given,
            loaded(task),
            weights=weights,
            within=limits(max_ or []),
            on=runtime(device, threads, batch),
            budget=spend,
            decisions=decisions,
            solver=solver,
            measure=measure,  # type: ignore[arg-type]  # checked there
            repair=repair,
            baselines=baselines,
            seed=seed,
            out=out,
            resume=resume,
            reuse=reuse,
            progress=display(spend.seconds, quiet or as_json),
        )
        page = found.publish()
        if as_json:
            print(json.dumps(found.to_json()))
        else:
            print_found(found.to_json(), page, "shrunk")
