"""What of a model can be cut: its groups found, proved, and where need be its blocks traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from espalier.compress.coupling.drawn import seen
from espalier.compress.coupling.groups import Group, Scaled, grouped
from espalier.compress.coupling.labelling import Trace, evaluated, followed, outputs
from espalier.compress.coupling.labels import thin
from espalier.compress.coupling.proof import close, proven
from espalier.compress.coupling.sizes import SizeRead, resize
from espalier.compress.coupling.tracing import traced
from espalier.compress.cut import Ignored
from espalier.export.placing import put
from espalier.export.quiet import quiet

Written = tuple[tuple[SizeRead, int], ...]  # sizes in a graph, and their numbers before any cut


@dataclass(frozen=True)
class Retold:
    """A module to be traced into a graph before any of these groups is cut, and the sizes to be
    written into the graph. For other groups the user's own forward does."""

    sizes: Written
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """Groups that can be cut; the layers left alone; the groups in the shape of each leaf layer's
    inputs and outputs; and the modules, by path, that are traced for some of the groups."""

    groups: Mapping[str, Group]
    ignored: tuple[Ignored, ...]
    ends: Mapping[str, tuple[str, ...]]
    traced: Mapping[str, Retold] = field(default_factory=dict)


def discover(model: nn.Module, example: Tensor, unwanted: Callable[[Group], str]) -> Found:
    """The groups of a model; those for which `unwanted` gives a reason are left alone.

    Where a cut model fails because a block writes sizes of its input into its shapes, the block is
    traced into a graph in which such sizes can follow: the innermost blocks first, then those
    around them, up to the model itself. Errors: `EspalierError` as of `followed`.
    """
    model = seen(model)
    found, failed = _look(model, example, unwanted)
    tried: set[str] = set()
    for blocks in (_blocks, _around):
        paths = [p for p in blocks(failed) if not _within_graph(model, p)]
        if tried.issuperset(paths):
            continue
        tried.update(paths)
        twin, changed = _traced(model, example, sorted({*paths, *found.traced}))
        if not found.traced.keys() >= set(changed):
            second, left = _look(twin, example, unwanted, changed)
            if len(second.groups) > len(found.groups):
                found, failed = replace(second, traced=_wanted(found, second)), left
    own = {path for path, _ in model.named_modules()}  # a graph may hold more
    return replace(found, ends={p: names for p, names in found.ends.items() if p in own})


def _wanted(first: Found, second: Found) -> dict[str, Retold]:
    """For which groups each module is traced: those around it that only then can be cut, or that
    are cut otherwise then."""
    changed = [g for g in second.groups.values() if _cuts(first.groups.get(g.name)) != _cuts(g)]
    found = {}
    for path, graph in second.traced.items():
        before = first.traced[path].groups if path in first.traced else frozenset()
        names = {g.name for g in changed if any(path in _above(p) for p in _holders(g))}
        if graph.sizes and (before or names):
            found[path] = replace(graph, groups=before | names)
    return found


def _cuts(group: Group | None) -> Any:
    """What a cut of a group changes besides its members."""
    return group and (group.numbers, {(s.path, s.node, s.place) for s in group.sizes})


def _look(
    model: nn.Module,
    example: Tensor,
    unwanted: Callable[[Group], str],
    graphs: Iterable[str] = (),
) -> tuple[Found, list[Group]]:
    """The groups; and those that failed. In `graphs` sizes of channels are written as numbers."""
    trace = followed(model, example)
    written = {path: _written(trace, path) for path in graphs}
    for path, sizes in written.items():
        resize(model.get_submodule(path), sizes)  # type: ignore[arg-type]
    found, of, ignored = grouped(trace)
    shapes = _bare_norms(model, trace, of)
    found = [replace(g, numbers=shapes.get(g.name, ())) for g in found]
    reasons = {g.name: unwanted(g) for g in found}
    ignored += [Ignored(name, "width", why) for name, why in reasons.items() if why]
    wanted = [g for g in found if not reasons[g.name]]
    with quiet():  # torch.fx prints each failure of a graph, which the proof expects
        sound, failed = proven(model, example, wanted)
    named = {g.name: g for g in sound}
    ends = {
        path: tuple(n for n in dict.fromkeys(_of([*sides[0], *sides[1]], of)) if n in named)
        for path, sides in trace.ends.items()
    }
    names = {i.layer for i in failed}
    graphed = {path: Retold(sizes) for path, sizes in written.items()}
    made = Found(named, tuple(ignored + failed), ends, graphed)
    return made, [g for g in wanted if g.name in names]


def _written(trace: Trace, path: str) -> Written:
    return tuple((read, len(read.labels)) for read in trace.sizes if read.path == path)


def _bare_norms(
    model: nn.Module, trace: Trace, of: Mapping[int, str]
) -> dict[str, tuple[Scaled, ...]]:
    """The shapes of norms without weights, by the one group that they are over."""
    found: dict[str, tuple[Scaled, ...]] = {}
    for path, (given, _) in trace.ends.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.LayerNorm) and not module.elementwise_affine:
            names, shape = set(_of(given, of)), module.normalized_shape
            if len(names) == 1 and len(shape) == 1:
                name = names.pop()
                found[name] = (*found.get(name, ()), Scaled(path, "normalized_shape", shape[0]))
    return found


def _of(fields: Iterable[Tensor], of: Mapping[int, str]) -> Iterable[str]:
    return [of[x] for f in fields for x in np.unique(thin(f)[0].numpy()).tolist() if x in of]


def _blocks(failed: Iterable[Group]) -> set[str]:
    """The modules that hold the layers of groups that can't be cut as they are, but the model."""
    return {p for g in failed for p in _holders(g)} - {""}


def _around(failed: Iterable[Group]) -> set[str]:
    """Those modules, and all around them up to the one that holds every layer of the group."""
    found: set[str] = set()
    for group in failed:
        chains = [_above(p) for p in _holders(group)]
        shared = set.intersection(*map(set, chains))
        found |= {p for chain in chains for p in chain if p not in shared}
        found.add(max(shared, key=len))
    return found


def _holders(group: Group) -> set[str]:
    return {p.rpartition(".")[0] for m in group.members for p, _ in m.owners}


def _above(path: str) -> list[str]:
    """The path, and those of all modules around it: "" is the model."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _within_graph(model: nn.Module, path: str) -> bool:
    return any(isinstance(model.get_submodule(p), fx.GraphModule) for p in _above(path))


def _traced(model: nn.Module, example: Tensor, paths: list[str]) -> tuple[nn.Module, list[str]]:
    """A copy with those modules traced that can be, and still compute the same."""
    with evaluated(model), torch.no_grad():
        expected = outputs(model(example))
    twin = copy.deepcopy(model)
    changed: list[str] = []
    for path in paths:
        before = twin.get_submodule(path) if path else copy.copy(twin)
        if _plain(before):
            continue
        try:
            with quiet(), evaluated(twin), torch.no_grad():
                put(twin, path, traced(before))
                found = outputs(twin(example))
            same = len(found) == len(expected) and all(map(close, found, expected))
        except Exception:  # whatever tracing meets in a user's code: the block stays as it is
            same = False
        if same:
            changed.append(path)
        else:
            put(twin, path, before)
    return twin, changed


def _plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")
