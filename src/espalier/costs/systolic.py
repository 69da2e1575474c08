"""What networks cost on a systolic array: cycles, traffic and energy by closed formulas.

A grid of multiply-accumulate units through which operands are pushed; every convolution and linear
layer is run as a matrix product. Cycles of a fold, the folds of the dataflows and the mapping of a
convolution onto a product are those of SCALE-Sim: Samajdar, Joseph, Zhu, Whatmough, Mattina & Krishna,
"A Systematic Methodology for Characterizing Scalability of DNN Accelerators using SCALE-Sim" (ISPASS
2020); operands are double-buffered, so that a layer takes the longer of computing and memory traffic.
Energies an access are in the proportions of Horowitz, "Computing's Energy Problem" (ISSCC 2014), at
45 nm and 8 bits. What differs from the simulator: no cycle-by-cycle stalls, no bank conflicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from espalier.costs.cost import Builder, Cost
from espalier.costs.layers import layers
from espalier.costs.pieces import unseeded
from espalier.errors import EspalierError, unknown
from espalier.problem import Metric, Metrics
from espalier.space import Candidate

Dataflow = Literal["output", "weight", "input"]
DATAFLOWS: tuple[Dataflow, ...] = ("output", "weight", "input")

# picojoules: an 8-bit multiply-accumulate, a byte from a 32 KiB SRAM, a byte from DRAM
_MAC_PJ, _SRAM_PJ, _DRAM_PJ = 0.25, 1.25, 160.0
_SRAM_KB = 32.0
# square millimetres: a unit with its registers, a KiB of SRAM
_UNIT_MM2, _KB_MM2 = 0.0012, 0.006


@dataclass(frozen=True)
class Product:
    """A matrix product: `m` output places, `n` output channels, sums of length `k`.

    `inputs` are the different input bytes, fewer than m k where windows overlap; `repeats` how often
    the product is run, as for the groups of a convolution.
    """

    m: int
    n: int
    k: int
    inputs: int
    repeats: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all repeats."""
        return self.m * self.n * self.k * self.repeats


@dataclass(frozen=True)
class Work:
    """What a product takes: compute cycles, cycles with memory, bytes from and to SRAM and DRAM,
    the share of units that compute."""

    compute_cycles: int
    cycles: int
    sram_bytes: int
    dram_bytes: int
    macs: int


@dataclass(frozen=True)
class Array:
    """An array: `rows` x `columns` units, what stays in them ("output", "weight" or "input"
    stationary), KiB of each buffer, bytes from DRAM a cycle, the clock. Operands are a byte."""

    rows: int = 32
    columns: int = 32
    dataflow: Dataflow = "output"
    input_kb: int = 64
    weight_kb: int = 64
    output_kb: int = 64
    bandwidth: float = 16.0
    ghz: float = 1.0

    def __post_init__(self) -> None:
        if self.dataflow not in DATAFLOWS:
            raise EspalierError(unknown("dataflow", str(self.dataflow), DATAFLOWS))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "dataflow" and not value > 0:
                raise EspalierError(f"{f.name} of an array is above 0, got {value!r}")

    @property
    def area_mm2(self) -> float:
        """Units and buffers."""
        memory = self.input_kb + self.weight_kb + self.output_kb
        return self.rows * self.columns * _UNIT_MM2 + memory * _KB_MM2

    def run(self, product: Product) -> Work:
        """One product: `Work` of all its repeats."""
        down, across, along = self._mapped(product)
        folds_down, folds_across = math.ceil(down / self.rows), math.ceil(across / self.columns)
        # a fold is filled and emptied over the rows, and skewed over the columns
        compute = folds_down * folds_across * (2 * self.rows + self.columns + along - 2)
        dram = self._dram(product, folds_down, folds_across)
        cycles = max(compute, math.ceil(dram / self.bandwidth))
        r = product.repeats
        sram = self._sram(product, folds_down, folds_across)
        return Work(compute * r, cycles * r, sram * r, dram * r, product.macs)

    def _mapped(self, p: Product) -> tuple[int, int, int]:
        """What lies along the rows, along the columns, and in time."""
        if self.dataflow == "output":
            return p.m, p.n, p.k
        if self.dataflow == "weight":
            return p.k, p.n, p.m
        return p.k, p.m, p.n

    def _sram(self, p: Product, folds_down: int, folds_across: int) -> int:
        """Bytes between the buffers and the units: what is pushed is read once a fold across or
        down, what stays once; partial sums of a split sum are written and read again."""
        if self.dataflow == "output":
            return p.m * p.k * folds_across + p.n * p.k * folds_down + p.m * p.n
        sums = p.m * p.n * (2 * folds_down - 1)
        if self.dataflow == "weight":
            return p.k * p.n + p.m * p.k * folds_across + sums
        return p.k * p.m + p.n * p.k * folds_across + sums

    def _dram(self, p: Product, folds_down: int, folds_across: int) -> int:
        """Bytes from and to memory. The stationary side is read once; a pushed operand once where
        its buffer holds it, else once a fold; partial sums go to memory where their buffer does not
        hold a strip of them."""
        kib = 1024
        inputs, weights, outputs = p.inputs, p.k * p.n, p.m * p.n
        again_in = again_w = 1
        if self.dataflow == "output":
            # strips of rows outside, strips of columns inside: the weights come by every time
            if weights > self.weight_kb * kib:
                again_w = folds_down
            if inputs > self.input_kb * kib and p.k * self.rows > self.input_kb * kib:
                again_in = folds_across
            return inputs * again_in + weights * again_w + outputs
        if self.dataflow == "weight":
            if inputs > self.input_kb * kib:
                again_in = folds_across
            strip = p.m * min(self.columns, p.n)
        else:
            if weights > self.weight_kb * kib:
                again_w = folds_across
            strip = p.n * min(self.columns, p.m)
        spilled = 2 * (folds_down - 1) * outputs if strip > self.output_kb * kib else 0
        return inputs * again_in + weights * again_w + outputs + spilled

    def price(self, workload: Iterable[Product]) -> dict[str, float]:
        """A workload run product after product: latency_ms, energy_mj, area_mm2, cycles, and the
        share of units busy (utilisation)."""
        done = [self.run(p) for p in workload]
        cycles = sum(w.cycles for w in done)
        macs = sum(w.macs for w in done)
        memory = self.input_kb + self.weight_kb + self.output_kb
        # a larger buffer costs more an access: with the length of its wires
        sram_pj = _SRAM_PJ * math.sqrt(memory / 3 / _SRAM_KB)
        picojoules = macs * _MAC_PJ
        picojoules += sum(w.sram_bytes for w in done) * sram_pj
        picojoules += sum(w.dram_bytes for w in done) * _DRAM_PJ
        return {
            "latency_ms": cycles / (self.ghz * 1e6),
            "energy_mj": picojoules * 1e-9,
            "area_mm2": self.area_mm2,
            "cycles": float(cycles),
            "utilisation": macs / (cycles * self.rows * self.columns) if cycles else 0.0,
        }


def products(rows: Iterable[Mapping[str, Any]]) -> list[Product]:
    """The products of a network, from the rows of `costs.layers`: convolutions and linear layers.

    Convolutions are those of two dimensions. Attention and products outside of layers are left out.
    """
    out = []
    for row in rows:
        if row["kind"] in ("conv", "depthwise") and len(row["out_shape"]) == 3 and row["kernel"]:
            out.append(_convolution(row))
        elif row["kind"] == "linear":
            n, k = int(row["out_shape"][-1]), int(row["in_shape"][-1])
            m = math.prod(row["out_shape"][:-1])
            out.append(Product(m, n, k, m * k))
    return out


def _convolution(row: Mapping[str, Any]) -> Product:
    kernel = row["kernel"]
    window = kernel**2 if isinstance(kernel, int) else math.prod(kernel)
    groups = row["groups"] or 1
    channels_in, channels_out = row["in_shape"][0] // groups, row["out_shape"][0] // groups
    places = math.prod(row["out_shape"][1:])
    inputs = channels_in * math.prod(row["in_shape"][1:])
    return Product(places, channels_out, window * channels_in, inputs, groups)


class SystolicCost(Cost):
    """The latency and energy of a family's networks on one array, predicted by formula."""

    metrics = (
        Metric("latency_ms", "ms", "min", "predicted"),
        Metric("energy_mj", "mJ", "min", "predicted"),
    )

    def __init__(self, family: Builder, array: Array | None = None) -> None:
        self.family, self.array = family, array or Array()

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """Builds each network, reads its layers and prices them, a row a candidate."""
        example = self.family.example()
        found = []
        for candidate in candidates:
            with unseeded():
                network = self.family.build(candidate).eval()
            found.append(self.array.price(products(layers(network, example))))
        return Metrics(
            {m.name: np.array([row[m.name] for row in found]) for m in self.metrics}, self.metrics
        )
