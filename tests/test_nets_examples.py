"""The documented examples run, are short, and are the same in the docstring."""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path

import pytest

from espalier import nets
from espalier.testing.family import check_family

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
NAMES = {"own_family_declared": "Plain", "own_family_elastic": "Mixer"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_example_prints_a_candidate_and_its_parameters(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    candidate, parameters = capsys.readouterr().out.splitlines()
    assert "depth=" in candidate
    assert int(parameters.split()[0]) > 100


@pytest.mark.parametrize(("name", "family"), sorted(NAMES.items()))
def test_the_family_of_an_example_conforms(name, family):
    check_family(runpy.run_path(str(EXAMPLES / f"{name}.py"))[family]())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_example_is_short_and_stands_in_the_docstring(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    code = source.split('"""', 2)[2].split("if __name__")[0].strip()
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    assert textwrap.indent(code, "    ", lambda line: bool(line.strip())) in (nets.__doc__ or "")
