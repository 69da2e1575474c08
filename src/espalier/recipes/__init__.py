"""Published systems as recipes: one file each, found by name, loaded when asked for.

A recipe is a module with a `RECIPE`: what it is called, where it was published, which parts it
composes, and `run(scale, seed, out)`, which gives plain JSON with a `check`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError, unknown

SCALES = ("smoke", "cpu", "gpu")
Run = Callable[[str, int, Path | None], dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """One published system: name, title, source (paper, year), parts, what the check shows."""

    name: str
    title: str
    source: str
    parts: tuple[str, ...]
    works_when: str
    run: Run
    text: str = ""

    def about(self) -> dict[str, Any]:
        """The recipe as plain JSON, without what runs."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "parts": list(self.parts),
            "works_when": self.works_when,
        }


def names() -> list[str]:
    """Every recipe's name; none of them is loaded. `_parts` is what they are made of."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def find(name: str) -> Recipe:
    """The recipe of a name. Unknown names raise with the nearest."""
    if name not in names():
        raise EspalierError(unknown("recipe", name, names()))
    found: Recipe = import_module(f"{__name__}.{name.replace('-', '_')}").RECIPE
    return found


def all_recipes() -> list[Recipe]:
    """Every recipe, loaded."""
    return [find(name) for name in names()]


def run(name: str, scale: str = "smoke", seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Runs a recipe at a scale; gives plain JSON with `recipe`, `scale`, `seed` and its `check`."""
    if scale not in SCALES:
        raise EspalierError(unknown("scale", scale, SCALES))
    recipe = find(name)
    return {"recipe": recipe.name, "scale": scale, "seed": seed, **recipe.run(scale, seed, out)}


def page(recipe: Recipe) -> str:
    """The recipe's page in Markdown, for the terminal and the docs."""
    parts = "\n".join(f"- {part}" for part in recipe.parts)
    return (
        f"# {recipe.name}: {recipe.title}\n\nSource: {recipe.source}\n\n{recipe.text.strip()}\n\n"
        f"## Parts\n\n{parts}\n\n## Works when\n\n{recipe.works_when}\n\n"
        f"## Run it\n\n    espalier recipe run {recipe.name} --scale smoke\n"
    )
