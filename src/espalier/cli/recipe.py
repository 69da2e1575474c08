"""`espalier recipe list | show | run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from espalier.cli.options import (
    Json,
    one_line_errors,
)
from espalier.cli.printing import print_json


def recipe_list(as_json: Json = False) -> None:
    """The recipes, with the published system each stands for."""
    with one_line_errors():
        from espalier import recipes

        rows = [r.about() for r in recipes.all_recipes()]
        if as_json:
            print_json(rows)
        else:
            for row in rows:
                print(f"{row['name']:<20} {row['title']}")


def recipe_show(name: Annotated[str, typer.Argument(help="Name of the recipe.")]) -> None:
    """What a recipe does, what it is composed of, and its source."""
    with one_line_errors():
        from espalier import recipes

        print(recipes.page(recipes.find(name)))


def recipe_run(
    name: Annotated[str, typer.Argument(help="Name of the recipe.")],
    scale: Annotated[str, typer.Option(help="smoke (seconds), cpu (minutes) or gpu.")] = "smoke",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the study.")] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe and its check."""
    with one_line_errors():
        from espalier import recipes

        outcome = recipes.run(name, scale=scale, seed=seed, out=out)
        if as_json:
            print_json(outcome)
        else:
            Console().print_json(json.dumps(outcome.get("check", outcome)))
