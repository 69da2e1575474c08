"""How long a language model reads a context and writes a token: measured, and added up from parts.

Parts are timed inside whole models, where they stand; the sum is a prediction that a measurement of
the answer corrects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.costs.cost import CodeCost
from espalier.costs.language import LanguageFamily, Table
from espalier.costs.language_parts import Part, parts
from espalier.problem import Metric, Metrics
from espalier.space import Space

Array = NDArray[np.float64]
Codes = NDArray[Any]
TIMES = ("prefill_ms", "decode_ms")
OVERHEAD = "overhead"
_RUNS = 9  # of a model whose parts are timed
_STEPS = 12  # tokens that are written behind one pass over the context
_LEAST = 5  # such passes
_FAST = 0.1
# what makes a part faster, one kind at a time; bits and zeros do not where weights stay floats
SPEEDING = ("heads", "units", "experts", "active", "hidden", "kv", "rank")


@dataclass(frozen=True)
class Generation:
    """Generation by torch and `transformers` on this machine: one sequence, `threads` threads.

    `prefill_ms` is a pass over `context` tokens into a new cache, `decode_ms` one token behind that.
    """

    context: int
    threads: int = 1
    seconds: float = 1.0  # that a measurement may take

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"torch {torch.__version__} with its cache, {self.context} tokens"

    def about(self) -> dict[str, Any]:
        """The settings as JSON."""
        about: dict[str, Any] = {"name": "torch", "version": torch.__version__, "device": "cpu"}
        return about | {"threads": self.threads, "batch": 1, "context": self.context}

    def measure(self, model: Any, make_cache: Callable[[], Any] | None = None) -> dict[str, float]:
        """Both times of a model with its cache: what the fastest tenth of the runs keeps, of those
        that fit into `seconds`. Other work on the machine makes runs longer, never shorter."""
        rows: dict[str, list[float]] = {name: [] for name in TIMES}
        with _threads(self.threads), torch.inference_mode():
            run = _Run(model, make_cache, self.context)
            run.prefill()
            run.decode()  # not counted: what is done once
            begin = time.perf_counter()
            while len(rows["prefill_ms"]) < _LEAST or time.perf_counter() - begin < self.seconds:
                rows["prefill_ms"].append(_milliseconds(run.prefill))
                rows["decode_ms"] += [_milliseconds(run.decode) for _ in range(_STEPS)]
        return {name: float(np.quantile(values, _FAST)) for name, values in rows.items()}

    def parts(
        self,
        model: Any,
        modules: Mapping[str, Sequence[str]],
        make_cache: Callable[[], Any] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of each part (name -> paths of modules, that run once a pass) and of the
        rest, "overhead", by metric: of the fastest passes, as in `measure`."""
        with _threads(self.threads), torch.inference_mode():
            run = _Run(model, make_cache, self.context)
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in TIMES}
            for _ in range(_RUNS + 1):
                rows["prefill_ms"].append(_inside(model, modules, run.prefill))
                rows["decode_ms"].append(_inside(model, modules, run.decode))
        return {
            metric: {n: float(np.quantile([r[n] for r in found[1:]], _FAST)) for n in found[0]}
            for metric, found in rows.items()
        }


class _Run:
    """The two steps of generation, each to be called again and again."""

    def __init__(self, model: Any, make_cache: Callable[[], Any] | None, context: int) -> None:
        self.model, self.make = model, make_cache
        draw = torch.Generator().manual_seed(0)
        rows = int(model.get_input_embeddings().weight.shape[0])
        self.ids = torch.randint(rows, (1, context), generator=draw)
        self.cache: Any = None
        self.length = 0
        self.positions = int(getattr(model.config, "max_position_embeddings", 0) or 0)

    def prefill(self) -> None:
        """Reads the context."""
        cache = None if self.make is None else self.make()  # None: the model's own
        self.length = self.ids.shape[1]
        found = self.model(input_ids=self.ids, past_key_values=cache, use_cache=True)
        self.cache = found.past_key_values

    def decode(self) -> None:
        """Writes one token."""
        more: dict[str, Any] = {}
        if self.length >= self.positions > 0:  # learned ones end there: the last stands in
            more["position_ids"] = torch.full((1, 1), self.positions - 1)
        self.model(input_ids=self.ids[:, :1], past_key_values=self.cache, use_cache=True, **more)
        self.length += 1


def _milliseconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def _inside(
    model: Any, modules: Mapping[str, Sequence[str]], step: Callable[[], None]
) -> dict[str, float]:
    spent = dict.fromkeys(modules, 0.0)
    starts: dict[str, float] = {}
    with ExitStack() as stack:
        for name, paths in modules.items():
            for path in paths:
                module = model.get_submodule(path)

                def before(*_: Any, path: str = path) -> None:
                    starts[path] = time.perf_counter()

                def after(*_: Any, path: str = path, name: str = name) -> None:
                    spent[name] += 1e3 * (time.perf_counter() - starts[path])

                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        begin = time.perf_counter()
        step()
        whole = 1e3 * (time.perf_counter() - begin)
    return {**spent, OVERHEAD: max(whole - sum(spent.values()), 0.0)}


class _threads:
    """So many threads of torch while this is open."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


class LanguageTimes(CodeCost):
    """Predicted times of a family's candidates, from parts that were timed.

    `timed`: metric -> part -> decision -> milliseconds at each of its options, the others as in the
    original ("" for the part in the original); parts are named as those of `LanguageCounts`. What
    several decisions save of a part is added up.
    """

    metrics = tuple(Metric(name, "ms", "min", "predicted") for name in TIMES)

    def __init__(self, family: LanguageFamily, timed: Mapping[str, Any]) -> None:
        self.space: Space = family.space
        found = parts(family.model, family.anatomy, family.space)
        self._parts: dict[str, Part] = {p.name: p for p in reversed(list(found))}
        self._timed = timed
        self._tables: dict[str, tuple[Table, ...]] = {}

    def tables(self, metric: str) -> tuple[Table, ...]:
        """A metric as tables that add up to it."""
        if metric not in self._tables:
            rows = self._timed[metric].items()
            self._tables[metric] = tuple(self._table(name, own) for name, own in rows)
        return self._tables[metric]

    def estimate_codes(self, codes: Codes) -> Metrics:
        """Both times of codes `(n, d)`."""
        rows = self.space.canonical(codes)
        columns = {
            m.name: np.sum([t.at(self.space, rows) for t in self.tables(m.name)], axis=0)
            for m in self.metrics
        }
        return Metrics(columns, self.metrics)

    def _table(self, name: str, own: Mapping[str, Any]) -> Table:
        presence = self._parts[name].presence if name in self._parts else ()
        decisions = [d for d in own if d]
        scope = tuple(n for n in self.space.names if n in {*presence, *decisions})
        whole = float(own[""])
        values = np.full([self.space[n].count for n in scope], whole)
        for decision in decisions:
            saved = np.array(own[decision], dtype=float) - whole
            shape = [-1 if n == decision else 1 for n in scope]
            values = values + np.minimum(saved, 0.0).reshape(shape)
        values = np.maximum(values, 0.02 * whole)
        for gate in presence:
            shape = [-1 if n == gate else 1 for n in scope]
            options: Any = self.space[gate].options
            there = np.array(options, dtype=float) > 0
            values = values * there.reshape(shape)
        return Table(scope, values, name)
