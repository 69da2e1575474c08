"""Groups of coupled channels: what must be cut together, wherever a model keeps it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compress.attention import Attention
from espalier.compress.coupling.calls import KERNEL, TABLE
from espalier.compress.coupling.labelling import Trace
from espalier.compress.coupling.labels import Whole
from espalier.compress.coupling.sizes import Place, Size, resize
from espalier.compress.cut import Ignored
from espalier.compress.narrow import Rows, narrow
from espalier.export.placing import put

Kept = Mapping[str, Tensor]
UNREAD = "nothing reads it when the model runs on the example: longer inputs may"
WEAK = (KERNEL, TABLE)  # reasons that hold of one dim and say nothing of the layer's outputs


@dataclass(frozen=True)
class Member:
    """One dim of one tensor that a group cuts: `rows` `(units, count)` are the places of each unit.

    `owners` are (module path, attribute), several where modules share the tensor. `consumed` says
    that a weight contracts over this dim: it is the input side of a layer that reads the group.
    """

    owners: tuple[tuple[str, str], ...]
    dim: int
    rows: Tensor
    consumed: bool

    @property
    def path(self) -> str:
        """The module's path."""
        return self.owners[0][0]

    @property
    def tensor(self) -> str:
        """The name of the parameter or buffer within its module: "weight"."""
        return self.owners[0][1]


@dataclass(frozen=True)
class Scaled:
    """A whole number on a module that counts a group's units or channels: `num_heads`; also on its
    configuration: `config.num_heads`."""

    path: str
    name: str
    value: int


@dataclass(frozen=True)
class Group:
    """Units (channels, or heads) that are cut one by one, each from all members at once.

    `name` is the path of the first layer that produces them. `heads`: a unit is an attention head,
    with grouped queries a group of heads that share keys and values. `averaged`: a norm or a mean
    is taken over the channels, so that a cut changes it.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    heads: bool = False
    averaged: bool = False
    numbers: tuple[Scaled, ...] = ()
    sizes: tuple[Size, ...] = ()

    @property
    def producer(self) -> Member:
        """The member that the group is named for."""
        return next(m for m in self.members if (m.path or m.tensor) == self.name.split("#")[0])

    def scaled(self, number: Scaled, kept: int) -> int:
        """A number of `numbers` where `kept` units are left."""
        return number.value * kept // self.units


def cut(model: nn.Module, groups: Mapping[str, Group], kept: Kept) -> None:
    """Leave only the kept units (ascending indices by group) of a model, in place.

    Parameters that modules share stay shared.
    """
    rows = kept_rows(groups, kept)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and {path, f"{path}.out_proj"} & set(rows):
            put(model, path, Attention(module))
    modules = dict(model.named_modules(remove_duplicate=False))
    shared: dict[int, Tensor] = {}
    for path, gone in rows.items():
        narrow(modules[path], gone, shared)
    for path, wanted in kept_sizes(groups, kept).items():
        resize(modules[path], wanted)
    for name, units in kept.items():
        for number in groups[name].numbers:
            value = groups[name].scaled(number, len(units))
            set_number(modules[number.path], number.name, value)


def set_number(module: nn.Module, name: str, value: int) -> None:
    """A number on a module, or on its configuration: that becomes the module's own copy."""
    if isinstance(getattr(module, name, None), tuple):  # a norm's shape without weights
        setattr(module, name, (value,))
        return
    holder, _, last = name.rpartition(".")
    if holder:
        own = copy.copy(getattr(module, holder))
        setattr(module, holder, own)
        setattr(own, last, value)
    else:
        setattr(module, name, value)


def kept_sizes(groups: Mapping[str, Group], kept: Kept) -> dict[str, list[tuple[Size, int]]]:
    """For each graph module the sizes that change, and to what."""
    left: dict[tuple[str, str, Place], tuple[Size, int]] = {}
    for name, units in kept.items():
        stay = torch.zeros(groups[name].units, dtype=torch.bool)
        stay[units] = True
        for size in groups[name].sizes:
            key = (size.path, size.node, size.place)
            value = left.get(key, (size, size.whole))[1]
            left[key] = (size, value - int(size.rows[~stay].sum()))
    found: dict[str, list[tuple[Size, int]]] = {}
    for size, value in left.values():
        found.setdefault(size.path, []).append((size, value))
    return found


def kept_rows(
    groups: Mapping[str, Group], kept: Kept, paths: Collection[str] | None = None
) -> dict[str, Rows]:
    """For each module (or each of these `paths`) what stays of its tensors: attribute -> dim ->
    ascending rows."""
    gone: dict[tuple[str, str, int], list[Tensor]] = {}
    for name, units in kept.items():
        group = groups[name]
        if len(units) == group.units:
            continue
        left = torch.ones(group.units, dtype=torch.bool)
        left[units] = False
        for member in group.members:
            for path, tensor in member.owners:
                if paths is not None and path not in paths:
                    continue
                gone.setdefault((path, tensor, member.dim), []).append(member.rows[left].flatten())
    found: dict[str, Rows] = {}
    for (path, tensor, dim), rows in gone.items():
        found.setdefault(path, {}).setdefault(tensor, {})[dim] = torch.cat(rows)
    return found


def grouped(trace: Trace) -> tuple[list[Group], dict[int, str], list[Ignored]]:
    """The groups that a trace tells, in the order in which their channels are first made.

    Also the group of every label that has one, and the layers whose outputs are never cut.
    """
    root, why = trace.labels.classes()
    averaged = _averaged(trace, root)
    attended = set(root[sorted(trace.attended)].tolist()) if trace.attended else set()
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    places = _places(trace, root, why)
    for label in sorted(places):
        found = places[label]
        alike.setdefault(tuple((i, len(rows)) for i, rows in found.items()), []).append(label)
    groups: list[Group] = []
    of: dict[int, str] = {}
    unread: list[Ignored] = []
    for signature, labels in alike.items():
        members = tuple(
            _member(trace, i, [places[label][i] for label in labels]) for i, _ in signature
        )
        made = [m for m, (i, _) in zip(members, signature, strict=True) if _produces(trace, i, m)]
        heads, mean = bool(attended & set(labels)), bool(averaged & set(labels))
        if made and len(members) == 1 and not members[0].consumed and not mean:
            unread.append(Ignored(made[0].path or made[0].tensor, "width", UNREAD))
        elif made:
            name = _unused(made[0].path or made[0].tensor, groups)
            sizes = _sizes(trace, labels)
            groups.append(Group(name, len(labels), members, heads, mean, sizes=sizes))
            of.update(dict.fromkeys(labels, name))
    return (
        groups,
        {int(x): of[int(r)] for x, r in enumerate(root) if int(r) in of},
        [*_locked(trace, why), *dict.fromkeys(unread)],
    )


def _places(trace: Trace, root: Whole, why: Whole) -> dict[int, dict[int, list[int]]]:
    """For each free class: owned dim -> rows."""
    places: dict[int, dict[int, list[int]]] = {}
    for i, owned in enumerate(trace.owned):
        span = slice(owned.start, owned.start + owned.size)
        for row in np.flatnonzero(why[span] < 0).tolist():
            places.setdefault(int(root[owned.start + row]), {}).setdefault(i, []).append(row)
    return places


def _averaged(trace: Trace, root: Whole) -> set[int]:
    found: set[int] = set()
    for field, dims in trace.averaged:
        if trace.labels.varying(field) & dims:
            found |= set(root[np.unique(field.numpy())].tolist())
    return found


def _sizes(trace: Trace, labels: Sequence[int]) -> tuple[Size, ...]:
    """The sizes in graphs that count a group's units: `labels` are their classes."""
    found: dict[tuple[str, str, Place], Size] = {}
    for read in trace.sizes:
        roots = trace.labels.find(read.labels)
        rows = torch.tensor([int((roots == label).sum()) for label in labels])
        if rows.any() and len(np.unique(roots)) > 1:  # else a dim within each unit, as of a head
            key = (read.path, read.node, read.place)
            found[key] = Size(*key, read.dim, len(read.labels), rows)
    return tuple(found.values())


def _member(trace: Trace, index: int, rows: Sequence[list[int]]) -> Member:
    owned = trace.owned[index]
    consumed = owned.start in trace.consumed
    return Member(owned.owners, owned.dim, torch.tensor(rows), consumed)


def _produces(trace: Trace, index: int, member: Member) -> bool:
    owned = trace.owned[index]
    return owned.rank > 1 and (not member.consumed or owned.start in trace.made)


def _unused(path: str, groups: Sequence[Group]) -> str:
    taken = {g.name for g in groups}
    names = [path, *(f"{path}#{i}" for i in range(2, len(taken) + 3))]
    return next(n for n in names if n not in taken)


def _locked(trace: Trace, why: Whole) -> list[Ignored]:
    """Layers none of whose outputs can be cut, and why."""
    free: set[tuple[tuple[str, str], ...]] = set()
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for owned in trace.owned:
        locks = why[owned.start : owned.start + owned.size]
        if owned.rank < 2 or (owned.start in trace.consumed and owned.start not in trace.made):
            continue
        if (locks < 0).any():
            free.add(owned.owners)
        else:
            found.setdefault(owned.owners, []).append(trace.labels.reasons[locks[0]])
    ignored = [
        Ignored(owners[0][0] or owners[0][1], "width", min(reasons, key=WEAK.__contains__))
        for owners, reasons in found.items()
        if owners not in free
    ]
    return list(dict.fromkeys(ignored))
