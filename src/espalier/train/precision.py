"""Which floating-point format a training computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from espalier.train.recipe import Precision

Format = Literal["fp32", "bf16"]


def resolve(precision: Precision, shape: tuple[int, ...]) -> Format:
    """The format that "auto" stands for: a fact of the processor and the input, never a timing.

    A timing would make two runs with one seed differ.
    """
    if precision != "auto":
        return precision
    return "bf16" if _computes_bf16() else "fp32"


def _computes_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; without, it is emulated and slower."""
    cpu = torch.cpu
    found = getattr(cpu, "_is_avx512_bf16_supported", None)
    return bool(found is not None and found())


def autocast(chosen: Format) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=chosen == "bf16")
