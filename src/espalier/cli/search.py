"""`espalier search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from espalier.cli.printing import print_found, print_json


def search(
    task: Annotated[
        str,
        typer.Option(
            help="digits, mnist, cifar10 (from ESPALIER_DATA), a folder of class folders, an .npz; "
            "with options: cifar10:size=16,train=4000; or my.py:make_task."
        ),
    ] = "digits",
    family: Annotated[
        str,
        typer.Option(
            help="mobilenet, resnet, multipath, superkernel, hierarchical-vit, hybrid, nb201-supernet, "
            "close, darts, or my.py:MyFamily, called with (shape, classes)."
        ),
    ] = "mobilenet",
    max_: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            help="An upper limit, NAME=VALUE, as often as needed: latency_ms=0.3, params=60k, "
            "macs=2M, bytes=200kB, activation_bytes=64kB, or a share of the largest: params=40%.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="What the search may spend: 2min, 90s, '300 trials', '10min, 500 trials'."
        ),
    ] = "2min",
    strategy: Annotated[
        str,
        typer.Option(
            help="nsga2, evolution, random, or another of the reference: guided, local, grid, "
            "eeea, mcts, reinforce, tpe, gp, cmaes."
        ),
    ] = "nsga2",
    solver: Annotated[
        str,
        typer.Option(
            help="search: train a supernet, then let the strategy search on it; relax: learn weights "
            "and architecture together by gradients, then draw from it."
        ),
    ] = "search",
    seed: Seed = 0,
    workers: Annotated[
        int,
        typer.Option(min=0, help="Processes that score and train, one thread each; 0: this one."),
    ] = 1,
    device: Device = "cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    out: Out = None,
    resume: Resume = False,
    reuse: Annotated[
        Path | None,
        typer.Option(help="Take over the supernet and latency table of this earlier study."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the network that fits: search, train, measure, export, report.

    Example: `espalier search --task digits --family mobilenet --max latency_ms=70% --max params=30k
    --budget 2min --workers 2 --out runs/digits`
    """
    with one_line_errors():
        from espalier.flows.progress import display
        from espalier.flows.search import search as run
        from espalier.problem import SearchBudget

        spend = SearchBudget.parse(budget)
        found = run(
            loaded(family),
            loaded_task(task),
            within=limits(max_ or []),
            on=runtime(device, threads, batch),
            budget=spend,
            seed=seed,
            out=out,
            resume=resume,
            reuse=reuse,
            workers=workers,
            strategy=strategy,
            solver=solver,
            progress=display(spend.seconds, quiet or as_json),
        )
        page = found.publish()
        if as_json:
            print_json(found.to_json())
        else:
            print_found(found.to_json(), page)
