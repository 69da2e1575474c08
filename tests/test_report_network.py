"""The drawing of the network: layers fold, shares add up, slabs stand where they can be seen."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from espalier.report.drawing import draw
from espalier.report.layers import COSTS, stages, total
from report_sample import sample_result


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [dict(row, latency_ms=0.001) for row in sample_result()["network"]]


def test_costs_survive_folding_and_shares_add_to_one(rows: list[dict[str, Any]]) -> None:
    found = stages(rows)
    layers = [x for stage in found for x in stage.layers]
    assert len(layers) == sum(row["kind"] in ("conv", "depthwise", "linear") for row in rows)
    for cost in COSTS:
        assert total(found, cost) == pytest.approx(sum(row[cost] for row in rows))
        assert sum(x.share[cost] or 0 for x in layers) == pytest.approx(1)


def test_kinds_and_operations_are_named(rows: list[dict[str, Any]]) -> None:
    named = {x.name: x for stage in stages(rows) for x in stage.layers}
    assert named["stem.conv"].operation == "3×3 convolution"
    assert named["stage1.0.expand"].kind == "pointwise"
    assert named["stage2.0.depthwise"].operation == "5×5 depthwise convolution, stride 2"
    assert named["head.linear"].kind == "linear"


def test_slabs_do_not_overlap_and_stay_inside(rows: list[dict[str, Any]]) -> None:
    drawing = draw(stages(rows))
    assert drawing is not None
    slabs = [slab for column in drawing.columns for slab in column.slabs]
    for left, right in pairwise(slabs):
        assert left.x + left.width < right.x
    assert slabs[0].x >= drawing.left
    assert slabs[-1].x + slabs[-1].width <= drawing.width
    assert all(s.y >= 0 and s.y + s.height < drawing.lines_y[0] for s in slabs)
    floors = [track.y for track in drawing.tracks]
    for slab in slabs:
        for (top, height), floor in zip(slab.bars, floors, strict=True):
            assert top + height == pytest.approx(floor)
            assert height <= 44
    assert floors[-1] < drawing.height


def test_taller_is_finer_and_wider_is_more_channels(rows: list[dict[str, Any]]) -> None:
    found = stages(rows)
    drawing = draw(found)
    assert drawing is not None
    layers = [x for stage in found for x in stage.layers]
    slabs = [slab for column in drawing.columns for slab in column.slabs]
    for a, sa in zip(layers, slabs, strict=True):
        for b, sb in zip(layers, slabs, strict=True):
            assert (a.side > b.side) == (sa.height > sb.height)
            assert (a.channels > b.channels) == (sa.width > sb.width)


def test_a_deep_network_groups_its_stages(rows: list[dict[str, Any]]) -> None:
    deep = []
    for i in range(60):
        row = dict(rows[0], stage=f"part{i // 20}.block{i}", name=f"part{i // 20}.block{i}.conv")
        deep.append(row)
    assert [stage.name for stage in stages(deep)] == ["part0", "part1", "part2"]
    blocks = [dict(row, stage=f"part.{i // 3}.{i % 3}") for i, row in enumerate(deep[:12])]
    assert [stage.name for stage in stages(blocks)] == ["part.0", "part.1", "part.2", "part.3"]
    drawing = draw(stages(deep))
    assert drawing is not None
    assert all(s.width >= 5 for c in drawing.columns for s in c.slabs)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"out_shape": None},
        {"out_shape": [10], "kind": "linear", "params": math.nan, "macs": None},
        {"out_shape": [16, 50], "kind": "conv", "kernel": [3], "name": "one-dimensional"},
        {"out_shape": [8, 4, 4], "kind": "surprise", "kernel": "big", "groups": None},
    ],
)
def test_odd_rows_are_drawn_or_left_out(odd: dict[str, Any]) -> None:
    drawing = draw(stages([odd]))
    if odd.get("out_shape"):
        assert drawing is not None
        assert len(drawing.columns) == 1
    else:
        assert drawing is None


def test_nothing_to_draw() -> None:
    assert draw(stages([])) is None
