"""The systolic array, by hand: folds, cycles, traffic, energy; and on real layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import espalier as esp
from espalier.costs import layers
from espalier.costs.systolic import Array, Product, SystolicCost, products
from espalier.errors import EspalierError
from espalier.testing.cost import check_cost

SQUARE = Product(m=8, n=8, k=8, inputs=64)


def test_one_fold_takes_fill_skew_and_drain() -> None:
    # 4x4 units, 4x4 outputs, sums of 10: 2*4 + 4 + 10 - 2
    one = Array(4, 4, "output", bandwidth=1e9).run(Product(4, 4, 10, 40))
    assert one.compute_cycles == one.cycles == 20


@pytest.mark.parametrize(
    ("dataflow", "product", "cycles"),
    [
        # output: ceil(6/4) * ceil(9/4) = 6 folds of 2*4 + 4 + 5 - 2 = 15
        ("output", Product(6, 9, 5, 30), 90),
        # weight: ceil(5/4) * ceil(9/4) = 6 folds of 2*4 + 4 + 6 - 2 = 16
        ("weight", Product(6, 9, 5, 30), 96),
        # input: ceil(5/4) * ceil(6/4) = 4 folds of 2*4 + 4 + 9 - 2 = 19
        ("input", Product(6, 9, 5, 30), 76),
    ],
)
def test_folds_of_the_dataflows(dataflow: str, product: Product, cycles: int) -> None:
    array = Array(4, 4, dataflow, bandwidth=1e9)  # type: ignore[arg-type]
    assert array.run(product).compute_cycles == cycles


def test_traffic_by_hand() -> None:
    # two strips either way: inputs pass twice, weights twice, 64 outputs once
    work = Array(4, 4, "output", bandwidth=1).run(SQUARE)
    assert work.sram_bytes == 64 * 2 + 64 * 2 + 64
    assert work.dram_bytes == 64 + 64 + 64  # all fits: each byte moves once
    # compute is 4 folds of 2*4+4+8-2 = 18: at one byte a cycle memory is the longer
    assert work.compute_cycles == 72
    assert work.cycles == 192
    # weight stationary: weights once, inputs twice, partial sums written, read and written
    work = Array(4, 4, "weight").run(SQUARE)
    assert work.sram_bytes == 64 + 128 + 3 * 64


def test_what_does_not_fit_is_read_again() -> None:
    big = Product(m=64, n=512, k=512, inputs=64 * 512)
    fits = Array(32, 32, "output", weight_kb=256).run(big).dram_bytes
    small = Array(32, 32, "output", weight_kb=128).run(big).dram_bytes
    assert small - fits == 512 * 512  # two strips of rows: the weights come twice
    spills = Product(m=4096, n=32, k=128, inputs=4096)
    kept = Array(32, 32, "weight", output_kb=128).run(spills).dram_bytes
    spilled = Array(32, 32, "weight", output_kb=64).run(spills).dram_bytes
    assert spilled - kept == 2 * 3 * 4096 * 32  # four folds of the sum, three times out and in


def test_energy_area_and_utilisation_by_hand() -> None:
    array = Array(4, 4, "output", input_kb=32, weight_kb=32, output_kb=32, bandwidth=1)
    price = array.price([SQUARE, SQUARE])
    assert price["latency_ms"] == pytest.approx(2 * 192 / 1e6)
    assert price["energy_mj"] == pytest.approx(2 * (512 * 0.25 + 320 * 1.25 + 192 * 160.0) * 1e-9)
    assert price["area_mm2"] == pytest.approx(16 * 0.0012 + 96 * 0.006)
    assert price["utilisation"] == pytest.approx(512 / (192 * 16))


def test_layers_become_products_with_all_their_macs() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(), nn.Linear(8 * 6 * 6, 10),
    ).eval()  # fmt: skip
    rows = layers(network, torch.zeros(1, 3, 16, 16))
    found = products(rows)
    assert found == [
        Product(64, 8, 27, 3 * 256),
        Product(36, 1, 9, 64, repeats=8),
        Product(1, 10, 288, 288),
    ]
    assert sum(p.macs for p in found) == sum(r["macs"] for r in rows)


def test_depthwise_layers_use_the_array_badly() -> None:
    dense = Array().price([Product(256, 64, 576, 256 * 64)])["utilisation"]
    depthwise = Array().price([Product(256, 1, 9, 256, repeats=64)])["utilisation"]
    assert depthwise < dense / 10


def test_as_a_cost_it_conforms() -> None:
    family = esp.nets.make("mobilenet", (1, 8, 8), 10)
    space = family.space

    codes = space.sample(3, np.random.default_rng(0))
    check_cost(SystolicCost(family), space.decode(codes))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(EspalierError, match="weight"):
        Array(dataflow="weigth")  # type: ignore[arg-type]
    with pytest.raises(EspalierError, match="rows of an array is above 0"):
        Array(rows=0)
