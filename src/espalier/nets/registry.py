"""The families by name, each loaded when it is first asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from espalier.errors import SpaceError, unknown
from espalier.nets.family import Family


class _Families(Mapping[str, type[Family]]):
    """Name to class; importing this package loads none of them."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> type[Family]:
        if name not in self._places:
            raise KeyError(name)
        module, _, attribute = self._places[name].partition(":")
        found: type[Family] = getattr(import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


FAMILIES: Mapping[str, type[Family]] = _Families(
    {
        "mobilenet": "espalier.nets.mobilenet:MobileNet",
        "resnet": "espalier.nets.resnet:ResNet",
        "multipath": "espalier.nets.multipath:MultiPath",
        "superkernel": "espalier.nets.superkernel:Superkernel",
        "hierarchical-vit": "espalier.nets.hierarchical:HierarchicalViT",
        "hybrid": "espalier.nets.hybrid:Hybrid",
        "nb201-supernet": "espalier.nets.nb201_supernet:NB201Supernet",
        "close": "espalier.nets.close:CLOSENet",
        "darts": "espalier.nets.darts_cells:DARTSCells",
    }
)
# the networks of tabular benchmarks: for a search in their tables, so they share no weights
BENCHMARKS: Mapping[str, type[Family]] = _Families(
    {
        "nb201": "espalier.nets.nb201:NB201",
        "nb_macro": "espalier.nets.macro:NBMacro",
    }
)


def make(name: str, shape: Sequence[int], classes: int, **options: Any) -> Family:
    """A family by name, for inputs of `shape` (channels, height, width) and so many classes.

    Errors: `SpaceError` for an unknown family or option; `DataError` for a wrong shape.
    """
    if name not in FAMILIES and name not in BENCHMARKS:
        raise SpaceError(unknown("family", name, [*FAMILIES, *BENCHMARKS]))
    family = FAMILIES[name] if name in FAMILIES else BENCHMARKS[name]
    known = [p for p in inspect.signature(family).parameters if p not in ("shape", "classes")]
    for option in options:
        if option not in known:
            raise SpaceError(unknown(f"option of family {name}", option, known))
    build: Any = family
    made: Family = build(shape, classes, **options)
    return made
