"""The space is read off the modules, conditions and all."""

from __future__ import annotations

import pytest
from torch import nn

from espalier import space as sp
from espalier.errors import SpaceError
from espalier.nets import elastic
from espalier.nets.collect import collect

DEPTH = sp.ordinal("depth", 1, 2, 3)


def conditions(module: nn.Module) -> dict[str, dict[str, tuple]]:
    return {d.name: {name: tuple(o) for name, o in d.when.items()} for d in collect(module)}


def conv(name: str) -> nn.Module:
    return elastic.Conv2d(4, 4, sp.choice(name, 3, 5))


def test_repeated_blocks_are_decided_only_where_they_run():
    found = conditions(elastic.Repeat(DEPTH, lambda i: conv(f"kernel{i}")))
    assert found == {
        "depth": {},
        "kernel0": {},
        "kernel1": {"depth": (2, 3)},
        "kernel2": {"depth": (3,)},
    }


def test_conditions_add_up_on_the_way_down():
    inner = sp.ordinal("inner", 1, 2)
    module = elastic.Repeat(
        DEPTH, lambda i: elastic.Repeat(inner, lambda j: conv(f"k{j}")) if i == 2 else conv("k")
    )
    assert conditions(module)["inner"] == {"depth": (3,)}
    assert conditions(module)["k0"] == {"depth": (3,)}
    assert conditions(module)["k1"] == {"depth": (3,), "inner": (2,)}


def test_one_decision_in_several_places_is_active_where_any_is():
    deep = elastic.Repeat(DEPTH, lambda i: conv("shared") if i else nn.Identity())
    assert conditions(deep)["shared"] == {"depth": (2, 3)}
    assert conditions(nn.Sequential(deep, conv("shared")))["shared"] == {}
    other = elastic.Repeat(sp.ordinal("other", 1, 2), lambda i: conv("shared") if i else nn.ReLU())
    assert conditions(nn.Sequential(deep, other))["shared"] == {}


def test_alternatives_and_skipped_blocks_are_conditions_too():
    module = nn.Sequential(
        elastic.OneOf(sp.choice("op", "a", "b"), {"a": conv("ka"), "b": conv("kb")}),
        elastic.Skippable(sp.choice("use", False, True), conv("ks")),
        elastic.OneOf(sp.choice("op2", 1, 2), {1: conv("both"), 2: conv("both")}),
    )
    found = conditions(module)
    assert found["ka"] == {"op": ("a",)}
    assert found["kb"] == {"op": ("b",)}
    assert found["ks"] == {"use": (True,)}
    assert set(found["both"].get("op2", (1, 2))) == {1, 2}


def test_own_conditions_are_kept():
    kernel = sp.choice("kernel", 3, 5, when={"width": (8,)})
    module = nn.Sequential(
        elastic.Conv2d(3, sp.ordinal("width", 4, 8)), elastic.Conv2d(8, 8, kernel)
    )
    assert conditions(module)["kernel"] == {"width": (8,)}


def test_products_and_parameters_declare_their_decisions():
    width, expansion = sp.ordinal("width", 4, 8), sp.choice("expansion", 2, 3)
    module = nn.Sequential(
        elastic.Linear(width, elastic.product(width, expansion)),
        elastic.Attention(width, sp.ordinal("heads", 1, 2)),
    )
    assert set(conditions(module)) == {"width", "expansion", "heads"}
    assert [d.name for d in collect(elastic.Parameter(3, width))] == ["width"]


def test_one_name_for_two_decisions_is_refused():
    module = nn.Sequential(
        elastic.Conv2d(3, sp.ordinal("width", 4, 8)), elastic.Conv2d(8, sp.ordinal("width", 8, 16))
    )
    with pytest.raises(SpaceError, match="'width' is declared twice"):
        collect(module)


def test_the_size_of_the_space_counts_what_is_active():
    space = sp.Space(collect(elastic.Repeat(DEPTH, lambda i: conv(f"kernel{i}"))))
    assert space.size == 2 + 4 + 8
