"""`espalier bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from espalier.cli.options import (
    Json,
    Quiet,
    limits,
    one_line_errors,
)
from espalier.cli.printing import print_json


def bench(
    table: Annotated[
        str,
        typer.Option(
            help="A table by name: digits ships with Espalier; nb201, nb_macro, nb_graph, nb_nlp, "
            "hw_gpt "
            "are read from ESPALIER_DATA. Options follow a colon: nb201:dataset=cifar100."
        ),
    ] = "digits",
    strategies: Annotated[
        str,
        typer.Option(
            help="Strategies with commas between, options after a colon: "
            "random,evolution:population=30,sample=10,guided. Random search always takes part."
        ),
    ] = "random,evolution,guided",
    queries: Annotated[
        int, typer.Option(min=1, help="Candidates that every run may ask the table for.")
    ] = 100,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of every strategy; fewer than 6 can prove nothing.")
    ] = 20,
    objectives: Annotated[
        str,
        typer.Option(
            help="Metrics of the table with commas between, like val_acc,lat_pixel3; by default "
            "the one that the table chooses by. Two or more are judged by hypervolume."
        ),
    ] = "",
    max_: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            help="An upper limit on a metric of the table, NAME=VALUE, as often as needed: "
            "params=500k, lat_pixel3=10, or a share of the largest: params=40%.",
        ),
    ] = None,
    estimators: Annotated[
        str,
        typer.Option(
            help="Metrics of the table to judge as estimators of its test results, like "
            "params,macs: Kendall's tau, precision and best rank at k, bias."
        ),
    ] = "",
    workers: Annotated[
        int,
        typer.Option(min=0, help="Simulated workers in virtual time; 0: one query after another."),
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Candidates asked at a time.")] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes, one thread each; they change no result.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the race; if not given, one under runs/ that the same call finds again."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Race search strategies on a table of trained networks: many seeds, equal budgets.

    What is best so far is chosen by validation and reported on test. The page says who is better
    than random search, who is not, and what bounds them all. Stopped, the same command goes on.

    Example: `espalier bench --table nb201:dataset=cifar100 --strategies random,evolution,guided
    --queries 300 --seeds 100 --jobs 2 --out runs/bench`
    """
    with one_line_errors(" Go on with the same command."):
        from espalier.bench.command import bench as run

        result, files = run(
            table,
            strategies,
            queries,
            seeds,
            objectives=_names(objectives),
            within=limits(max_ or []),
            workers=workers,
            batch=batch,
            jobs=jobs,
            estimators=_names(estimators),
            out=out,
            quiet=quiet or as_json,
        )
        if as_json:
            print_json(result)
        else:
            _print_race(result, files["html"])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_race(result: dict[str, Any], page: Path) -> None:
    from rich.table import Table

    from espalier.bench.page import headline
    from espalier.bench.sheets import brief

    console = Console()
    sheet = brief(result)
    table = Table(title=sheet.caption, title_justify="left")
    for i, head in enumerate(sheet.heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table)
    for line in [headline(result) + ".", *result["verdicts"], *result["notes"]]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
