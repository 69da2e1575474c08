"""Writes the catalogue pages of the docs from the recipes: run before building the site."""

from __future__ import annotations

import json
from pathlib import Path

from espalier import recipes

FOLDER = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MOST = 40  # figures shown of one check


def figures(name: str) -> str:
    """What the recipe's check gave, from benchmarks/results; nothing where it was not run."""
    path = RESULTS / f"recipe_{name.replace('-', '_')}.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    seeds = len(found["seeds"])
    held = (
        f"The check held for {found['held']} of {found['judged']} seeds. "
        if found["judged"]
        else ""
    )
    rows = [
        f"| {key} | {row['median']:.4g} | {row['min']:.4g} | {row['max']:.4g} |"
        for key, row in list(found["summary"].items())[:MOST]
    ]
    table = "\n".join(
        ["| figure | median | least | greatest |", "| --- | --- | --- | --- |", *rows]
    )
    return (
        f"\n## Figures obtained\n\n{held}`python benchmarks/recipes.py {name} --scale {found['scale']} "
        f"--seeds {seeds}`, {found['date']}; true counts as 1.\n\n{table}\n"
    )


def write(folder: Path = FOLDER) -> list[Path]:
    """One page a recipe and an index; gives the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["| recipe | what it is | source |", "| --- | --- | --- |"]
    written = []
    for recipe in recipes.all_recipes():
        path = folder / f"{recipe.name}.md"
        path.write_text(recipes.page(recipe) + figures(recipe.name))
        rows.append(f"| [{recipe.name}]({recipe.name}.md) | {recipe.title} | {recipe.source} |")
        written.append(path)
    index = folder / "index.md"
    index.write_text(
        "# Catalogue\n\nRecipes compose Espalier's parts into published systems. "
        "Each has a check that can be run: `espalier recipe run NAME`.\n\n" + "\n".join(rows) + "\n"
    )
    return [index, *written]


if __name__ == "__main__":
    for page in write():
        print(page)
