"""Recipes of pruning by gates: one small run each."""

from __future__ import annotations

import json

import pytest

from espalier.recipes import run


@pytest.mark.parametrize("name", ["bdwp-sat", "dsa", "pas", "bip", "all-in-one"])
def test_runs(name):
    found = json.loads(json.dumps(run(name, "smoke", 0)))
    assert isinstance(found["check"]["holds"], bool)
