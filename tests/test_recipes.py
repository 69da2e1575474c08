"""Every recipe is found by name, describes itself, and gets a page in the docs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from espalier import recipes
from espalier.errors import EspalierError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_describes_itself(name: str) -> None:
    recipe = recipes.find(name)
    assert recipe.name == name
    assert recipe.parts
    assert recipe.works_when
    assert json.loads(json.dumps(recipe.about()))["source"]
    assert recipe.title in recipes.page(recipe)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(EspalierError, match="default-search"):
        recipes.find("default-serch")
    with pytest.raises(EspalierError, match="smoke"):
        recipes.run("default-search", scale="smok")


def test_the_catalogue_is_generated(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "docs" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = module.write(tmp_path)
    assert len(pages) == 1 + len(recipes.names())
    assert "default-search" in (tmp_path / "index.md").read_text()
