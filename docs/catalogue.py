"""Writes the catalogue pages of the docs from the recipes: run before building the site."""

from __future__ import annotations

from pathlib import Path

from espalier import recipes

FOLDER = Path(__file__).parent / "recipes"


def write(folder: Path = FOLDER) -> list[Path]:
    """One page a recipe and an index; gives the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["| recipe | what it is | source |", "| --- | --- | --- |"]
    written = []
    for recipe in recipes.all_recipes():
        path = folder / f"{recipe.name}.md"
        path.write_text(recipes.page(recipe))
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
