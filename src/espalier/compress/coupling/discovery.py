"""What of a model can be cut: its groups found, proved, and where need be its blocks traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from espalier.compress.coupling.drawn import seen
from espalier.compress.coupling.groups import Group, Scaled, grouped
from espalier.compress.coupling.labelling import Trace, evaluated, followed, outputs
from espalier.compress.coupling.labels import thin
from espalier.compress.coupling.proof import close, proven
from espalier.compress.coupling.sizes import SizeRead, resize, traced
from espalier.compress.cut import Ignored
from espalier.export.placing import put

Written = tuple[tuple[SizeRead, int], ...]  # sizes in a graph, and their numbers before any cut


@dataclass(frozen=True)
class Found:
    """Groups that can be cut; the layers left alone; the groups in the shape of each leaf layer's
    inputs and outputs; and the modules to be
    traced into graphs before they are cut, with the sizes to be written into those."""

    groups: Mapping[str, Group]
    ignored: tuple[Ignored, ...]
    ends: Mapping[str, tuple[str, ...]]
    traced: Mapping[str, Written] = field(default_factory=dict)


def discover(model: nn.Module, example: Tensor, unwanted: Callable[[Group], str]) -> Found:
    """The groups of a model; those for which `unwanted` gives a reason are left alone.

    Where a cut model fails because a block writes sizes of its input into its shapes, the block is
    traced into a graph in which such sizes can follow. Errors: `EspalierError` as of `followed`.
    """
    model = seen(model)
    found, failed = _look(model, example, unwanted)
    paths = _blocks(model, failed)
    if not paths:
        return found
    twin, changed = _traced(model, example, paths)
    if not changed:
        return found
    second, _ = _look(twin, example, unwanted, changed)
    return second if len(second.groups) > len(found.groups) else found


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
    sound, failed = proven(model, example, wanted)
    named = {g.name: g for g in sound}
    ends = {
        path: tuple(n for n in dict.fromkeys(_of([*sides[0], *sides[1]], of)) if n in named)
        for path, sides in trace.ends.items()
    }
    names = {i.layer for i in failed}
    made = Found(named, tuple(ignored + failed), ends, written)
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


def _blocks(model: nn.Module, failed: Iterable[Group]) -> list[str]:
    """The modules that hold the layers of groups that can't be cut as they are."""
    parents = {p.rpartition(".")[0] for g in failed for m in g.members for p, _ in m.owners}
    return sorted(p for p in parents if p and not _within_graph(model, p))


def _within_graph(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    above = (".".join(parts[:i]) for i in range(len(parts) + 1))
    return any(isinstance(model.get_submodule(p), fx.GraphModule) for p in above)


def _traced(model: nn.Module, example: Tensor, paths: list[str]) -> tuple[nn.Module, list[str]]:
    """A copy with those modules traced that can be, and still compute the same."""
    with evaluated(model), torch.no_grad():
        expected = outputs(model(example))
    twin = copy.deepcopy(model)
    changed: list[str] = []
    for path in paths:
        before = twin.get_submodule(path)
        if _plain(before):
            continue
        try:
            put(twin, path, traced(before))
            with evaluated(twin), torch.no_grad():
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
