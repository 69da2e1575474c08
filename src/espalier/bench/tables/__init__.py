"""The tables by name: `load("nb201:dataset=cifar100")`. A reader is imported when it is asked for.

A reader is a module with `load(**options) -> Table` and `OPTIONS`, the options it takes with the
values that each may have, the first being the default.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from espalier.bench.table import Table
from espalier.errors import EspalierError, unknown

TABLES: tuple[str, ...] = (
    "digits",
    "fbnet_latency",
    "hw_gpt",
    "nb201",
    "nb_graph",
    "nb_macro",
    "nb_nlp",
    "ofa_latency",
)


def names() -> list[str]:
    """Every table's name; none is read."""
    return sorted(TABLES)


def load(text: str) -> Table:
    """The table that a line names; options follow a colon: "nb201:dataset=cifar100".

    Read once a process. Errors: `EspalierError` for an unknown table, option or value (the nearest
    is named), and where its file is absent (what to put where), damaged, or of another form.
    """
    name, _, tail = text.strip().partition(":")
    if name not in TABLES:
        raise EspalierError(unknown("table", name, TABLES))
    reader: Any = import_module(f"{__name__}.{name}")
    options = {key: values[0] for key, values in reader.OPTIONS.items()}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, sign, value = (p.strip() for p in part.partition("="))
        if key not in options:
            raise EspalierError(unknown(f"option of table {name}", key, reader.OPTIONS))
        if not sign or value not in reader.OPTIONS[key]:
            raise EspalierError(unknown(f"{key} of table {name}", value, reader.OPTIONS[key]))
        options[key] = value
    return _loaded(name, tuple(sorted(options.items())))


@cache
def _loaded(name: str, options: tuple[tuple[str, str], ...]) -> Table:
    reader: Any = import_module(f"{__name__}.{name}")
    made: Table = reader.load(**dict(options))
    return made


def forget() -> None:
    """Lets go of the tables that were read: the next `load` looks at the files again."""
    _loaded.cache_clear()
