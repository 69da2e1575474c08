"""Families of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from espalier.nets import elastic
from espalier.nets.family import Family
from espalier.nets.registry import FAMILIES, make
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit

if TYPE_CHECKING:
    from espalier.nets.mobilenet import MobileNet as MobileNet
    from espalier.nets.resnet import ResNet as ResNet

_LAZY = {"MobileNet": "mobilenet", "ResNet": "resnet"}

__all__ = ["FAMILIES", "Family", "MobileNet", "ResNet", "Supernet", "Unit", "elastic", "make"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return FAMILIES[_LAZY[name]]
    raise AttributeError(f"module 'espalier.nets' has no attribute {name!r}")
