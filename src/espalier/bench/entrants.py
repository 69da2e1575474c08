"""Who takes part in a race: strategies by name, with options, as a line says them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, unknown
from espalier.problem import Limit
from espalier.solvers import strategies
from espalier.solvers.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:
    from espalier.bench.table import Table

ALIASES = {"predictor": "guided"}
BASELINE = "random"


@dataclass(frozen=True)
class Entrant:
    """One strategy of a race.

    - `name`: how the race calls it; what is written on the line.
    - `strategy`: a name of `STRATEGIES`, or anything called with (space, seed, **options); then it
      must be defined in a module, so that worker processes find it.
    - `options`: of its constructor.
    """

    name: str
    strategy: str | Callable[..., Strategy]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """What runs under this name, in a line that is the same in every process."""
        made = self.strategy
        what = made if isinstance(made, str) else f"{made.__module__}.{_name(made)}"
        options = {k: _shown(v) for k, v in sorted(self.options.items())}
        return f"{what}({', '.join(f'{k}={v}' for k, v in options.items())})"

    def make(self, table: Table, seed: int, limits: Iterable[Limit] = ()) -> Strategy:
        """The strategy, new, over the table's space.

        Features of the table go to a strategy that takes `features`. The first upper limit goes to
        one that takes `price` and `threshold`: the price of codes is that column of the table.
        """
        make = _maker(self.strategy)
        taken = inspect.signature(make).parameters
        options = dict(self.options)
        if "features" in taken and "features" not in options and table.encode is not None:
            options["features"] = table.encode
        first = next((limit for limit in limits if limit.op == "<="), None)
        if first is not None and {"price", "threshold"} <= set(taken):
            options.setdefault("price", _price(table, first.metric))
            options.setdefault("threshold", first.bound)
        try:
            inspect.signature(make).bind(table.space, seed, **options)
        except TypeError:
            known = [n for n in taken if n not in ("space", "seed", "self")]
            bad = next((n for n in options if n not in known), "")
            raise EspalierError(
                unknown(f"option of {self.name.split(':')[0]}", bad, known)
            ) from None
        for key, value in options.items():
            if key in taken:
                _check_kind(self.name.split(":")[0], key, value, taken[key].annotation)
        return make(table.space, seed, **options)


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def _shown(value: Any) -> str:
    text = repr(value)
    return _name(value) if " at 0x" in text else text  # an address is another one each time


_KINDS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": ()}


def _check_kind(strategy: str, option: str, value: Any, annotation: Any) -> None:
    """Raises where an option is annotated with plain kinds only, and a plain value is of none."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = [kind.strip() for kind in text.split("|")]
    if type(value) not in (bool, int, float, str) or not all(kind in _KINDS for kind in kinds):
        return
    if any(type(value) in _KINDS[kind] for kind in kinds):
        return
    raise EspalierError(f"{option} of {strategy} is {' or '.join(kinds)}, got {value!r}")


def _price(table: Table, metric: str) -> Callable[[Any], Any]:
    def price(codes: Any) -> Any:
        return table.metrics((metric,), codes)[metric]

    return price


def _maker(strategy: str | Callable[..., Strategy]) -> Callable[..., Strategy]:
    if callable(strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise EspalierError(unknown("strategy", strategy, [*STRATEGIES, *ALIASES]))
    made: Callable[..., Strategy] = getattr(strategies, STRATEGIES[strategy])
    return made


def entrants(given: str | Iterable[str | Entrant]) -> list[Entrant]:
    """Reads "random,evolution:population=30,sample=10,guided", or a list of names and entrants.

    Options follow a colon, as with tasks and tables; an item with "=" belongs to the strategy
    before it. "predictor" is another name of guided. The same line twice is one entrant. Random
    search is added where it is missing: every strategy is compared with it.
    Errors: `EspalierError` for an unknown name or option, the nearest is named.
    """
    items = _split(given) if isinstance(given, str) else list(given)
    out: dict[str, Entrant] = {}
    for item in items:
        entrant = _read(item) if isinstance(item, str) else item
        _maker(entrant.strategy)
        out.setdefault(entrant.name, entrant)
    if not out:
        raise EspalierError(f"a race needs a strategy: {', '.join(sorted(STRATEGIES))}")
    if BASELINE not in out:
        out = {BASELINE: Entrant(BASELINE, BASELINE), **out}
    return list(out.values())


def _split(text: str) -> list[str]:
    out: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if "=" in part and ":" not in part.split("=")[0] and out:
            out[-1] += ("," if ":" in out[-1] else ":") + part
        else:
            out.append(part)
    return out


def _read(text: str) -> Entrant:
    name, _, tail = text.strip().partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, sign, value = (p.strip() for p in part.partition("="))
        if not sign or not key or not value:
            raise EspalierError(
                f"a strategy's options read like evolution:population=30,sample=10, got {text!r}"
            )
        options[key] = _value(value)
    return Entrant(text.strip(), ALIASES.get(name, name), options)


def _value(text: str) -> Any:
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def check(given: Sequence[Entrant], table: Table, limits: Iterable[Limit] = ()) -> None:
    """Makes every entrant once: an option that is wrong is said before anything runs."""
    for entrant in given:
        entrant.make(table, 0, limits)


__all__ = ["ALIASES", "BASELINE", "Entrant", "check", "entrants"]
