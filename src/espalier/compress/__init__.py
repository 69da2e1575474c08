"""Decisions on a trained model: widths, depth, bits, sparsity; and repair after them.

    family = Pretrained(model, example, cuts=(Widths(), Depth()))
    smaller = family.build(candidate)                # plain, with the weights that are left
    repair.finetune(smaller, family.model, task, recipe)

Files are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from espalier.compress.cut import BoundCut as BoundCut
from espalier.compress.cut import Cut as Cut
from espalier.compress.cut import Ignored as Ignored

if TYPE_CHECKING:
    from espalier.compress import repair as repair
    from espalier.compress.bits import Bits as Bits
    from espalier.compress.depth import Depth as Depth
    from espalier.compress.gates import Gated as Gated
    from espalier.compress.pretrained import Pretrained as Pretrained
    from espalier.compress.sparsity import Sparsity as Sparsity
    from espalier.compress.widths import Widths as Widths

_CLASSES = {
    "Bits": "bits",
    "Depth": "depth",
    "Gated": "gates",
    "Pretrained": "pretrained",
    "Sparsity": "sparsity",
    "Widths": "widths",
}
__all__ = ["BoundCut", "Cut", "Ignored", "repair", *sorted(_CLASSES)]


def __getattr__(name: str) -> Any:
    if name == "repair":
        return import_module("espalier.compress.repair")
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
