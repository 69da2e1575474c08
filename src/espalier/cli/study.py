"""`espalier measure | report | dashboard`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from espalier.cli.options import (
    Json,
    Threads,
    one_line_errors,
    runtime,
)
from espalier.cli.printing import print_json, shown

if TYPE_CHECKING:
    from espalier.problem import Reading


def measure(
    model: Annotated[Path, typer.Argument(help="An ONNX file, from anywhere.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    as_json: Json = False,
) -> None:
    """Price any ONNX file the way searches do: parameters, MACs, bytes, measured latency."""
    with one_line_errors():
        from espalier.costs import price_onnx

        def note(text: str) -> None:
            print(f"note: {text}", file=sys.stderr)

        priced: dict[str, Reading] = price_onnx(model, runtime(device, threads, batch), note)
        if as_json:
            print_json({k: r.to_json() for k, r in priced.items()})
            return
        from rich.table import Table

        table = Table("metric", "value", "unit", "how", "spread")
        for name, r in priced.items():
            spread = "" if r.spread is None else f"{r.spread:.2g}"
            table.add_row(name, shown(r.to_json()), r.unit, r.how, spread)
        Console().print(table)


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a study.")],
    as_json: Json = False,
) -> None:
    """Write the report of a finished search again: HTML, Markdown, JSON."""
    with one_line_errors():
        from espalier.flows.result import read_result
        from espalier.report import write

        files = write(read_result(run), run)
        if as_json:
            print_json({k: str(v) for k, v in files.items()})
        else:
            for name, path in files.items():
                print(f"{name}: {path}")


def dashboard(
    run: Annotated[Path, typer.Argument(help="The folder of a study.")],
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8080,
) -> None:
    """Show a study in Optuna's dashboard (a mirror of the ledger; needs the extra `dashboard`)."""
    with one_line_errors():
        from espalier.study import Study
        from espalier.study.mirror import serve

        with Study.open(run) as study:
            print(f"dashboard of {run}: http://127.0.0.1:{port} (Ctrl-C ends it)")
            serve(study, port)
