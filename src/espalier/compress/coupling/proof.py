"""Does a cut model compute what the original does without those channels? Groups that don't are
left alone.

The reference is the original with zeros where layers read the channels that go. It is exact except
where a norm or a mean is taken over the channels: those groups must only run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from espalier.compress.coupling.groups import Group, Scaled, cut
from espalier.compress.coupling.labelling import evaluated, outputs
from espalier.compress.cut import Ignored

SIZES = ("dim", "size", "channel", "feature", "embed", "width", "inner", "hidden", "planes")


def proven(
    model: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], list[Ignored]]:
    """The groups that can be cut, with the numbers on modules that must follow; and the others.

    What makes one group of a kind work is tried on all of its kind; then group by group.
    """
    first = [next(_plans(model, group)) for group in groups]
    if not _fault(model, example, first):
        return first, []
    tried: dict[tuple[str, ...], tuple[int, str]] = {}
    likely, ignored = [], []
    for group in groups:
        kind = _kind(model, group)
        if kind not in tried:
            tried[kind] = _first_sound(model, example, group)
        which, fault = tried[kind]
        if which < 0:
            ignored.append(Ignored(group.name, "width", fault))
        else:
            plans = list(_plans(model, group))
            likely.append(plans[min(which, len(plans) - 1)])
    if not _fault(model, example, likely):
        return likely, ignored
    sound: list[Group] = []
    for half in _halves(likely):
        ignored += _added(model, example, sound, half)
    return sound, ignored


def _added(
    model: nn.Module, example: Tensor, sound: list[Group], more: Sequence[Group]
) -> list[Ignored]:
    """Adds to `sound` the groups that can be cut beside it; the others, and why not. Few are at
    fault as a rule, so halves are tried before single groups."""
    fault = _fault(model, example, [*sound, *more])
    if not fault:
        sound += more
        return []
    if len(more) == 1:
        return [Ignored(more[0].name, "width", fault)]
    return [row for half in _halves(more) for row in _added(model, example, sound, half)]


def _halves(groups: Sequence[Group]) -> list[Sequence[Group]]:
    """The groups in two parts, in order; those without any are left out."""
    middle = len(groups) // 2
    return [half for half in (groups[:middle], groups[middle:]) if half]


def _kind(model: nn.Module, group: Group) -> tuple[str, ...]:
    """Groups of one kind have the same parts in the same sorts of modules."""
    modules = [(model.get_submodule(m.path.rpartition(".")[0]), m) for m in group.members]
    parts = {f"{type(p).__name__}.{m.path.rpartition('.')[2]}.{m.tensor}" for p, m in modules}
    return (str(group.heads), str(group.averaged), *sorted(parts))


def _first_sound(model: nn.Module, example: Tensor, group: Group) -> tuple[int, str]:
    """The first plan with which a group can be cut alone; -1 and what is wrong where none is."""
    faults = []
    for which, plan in enumerate(_plans(model, group)):
        fault = _fault(model, example, [plan])
        if not fault:
            return which, ""
        faults.append(fault)
    return -1, faults[0]


def _plans(model: nn.Module, group: Group) -> Iterator[Group]:
    """The group with the likely sets of numbers that follow it, the likeliest first."""
    every, sizes = _numbers(model, group)
    heads = [n for n in every if "group" not in n.name]  # queries per key: seldom changes
    mine = [n for n in heads if "." not in n.name], [n for n in sizes if "." not in n.name]
    plans = [[], mine[1], mine[0], mine[0] + mine[1], heads, heads + sizes]
    if group.heads:
        plans = [mine[0], [], mine[0] + mine[1], mine[1], heads, every, heads + sizes]
    seen: list[list[Scaled]] = []
    for plan in plans:
        if plan not in seen:
            seen.append(plan)
            yield replace(group, numbers=(*group.numbers, *plan))


def _numbers(model: nn.Module, group: Group) -> tuple[list[Scaled], list[Scaled]]:
    """Whole numbers on the modules around a group's layers: counts of heads, counts of channels."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = {path for m in group.members for path, _ in m.owners}
    around = sorted(
        {p.rpartition(".")[0] for p in paths if p} | {p for p in paths if _owner(modules[p])}
    )
    # one place a head, as in a bias by heads, counts heads and no channels
    wide = [m for m in group.members if m.rows.shape[1] > 1 or not group.heads]
    totals = {m.rows.numel() for m in wide}
    heads, sizes = [], []
    for path in around:
        for name, value in _whole_numbers(modules[path]):
            if ("head" in name or name.endswith("_groups")) and not any(
                s in name for s in ("dim", "size")
            ):
                if value % group.units == 0:
                    heads.append(Scaled(path, name, value))
            elif value in totals and any(s in name for s in SIZES):
                sizes.append(Scaled(path, name, value))
    return heads, sizes


def _whole_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's numbers above 1, and those of its configuration."""
    config = getattr(module, "config", None)
    for prefix, holder in (("", module), ("config.", config)):
        for name, value in getattr(holder, "__dict__", {}).items():
            if type(value) is int and not name.startswith("_") and value > 1:
                yield prefix + name, value


def _owner(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _fault(model: nn.Module, example: Tensor, groups: Sequence[Group]) -> str:
    """What is wrong with cutting all these groups to about half and three quarters, in one line;
    "" for nothing."""
    named = {g.name: g for g in groups}
    try:
        for seed, share in enumerate((0.5, 0.75)):
            kept = _drawn(groups, share, seed)
            exact = {name: units for name, units in kept.items() if not named[name].averaged}
            fault = _differs(model, example, named, exact)
            if fault:
                return fault
            if len(exact) < len(kept):
                _outputs(model, example, named, kept)
        moved = [g for g in groups if g.averaged]
        return _moves(model, example, moved) if moved else ""
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        return f"a cut model does not run: {line[:150] or type(error).__name__}"


def _drawn(groups: Sequence[Group], share: float, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.randperm(g.units, generator=rng)[: max(1, int(g.units * share))].sort().values
        for g in groups
    }


def _outputs(
    model: nn.Module, example: Tensor, groups: dict[str, Group], kept: dict[str, Tensor]
) -> list[Tensor]:
    network = copy.deepcopy(model)
    cut(network, groups, kept)
    with evaluated(network), torch.no_grad():
        return outputs(network(example))


def _differs(
    model: nn.Module, example: Tensor, groups: dict[str, Group], kept: dict[str, Tensor]
) -> str:
    if not kept:
        return ""
    wanted = without(model, groups, kept)
    with evaluated(wanted), torch.no_grad():
        expected = outputs(wanted(example))
    for a, b in zip(_outputs(model, example, groups, kept), expected, strict=True):
        if a.shape != b.shape:
            return f"a cut model gives the shape {tuple(a.shape)} for {tuple(b.shape)}"
        if not close(a, b):
            return "a cut model computes something else than the original without these channels"
    return ""


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if not a.is_floating_point() or not b.numel():
        return True
    margin = 10 * torch.finfo(a.dtype).eps ** 0.5 * b.abs().nan_to_num().max().item() + 1e-30
    return torch.allclose(a, b, rtol=0, atol=margin, equal_nan=True)


def _moves(model: nn.Module, example: Tensor, groups: Sequence[Group]) -> str:
    """Whether the model computes the same with the units of these groups in another order: what
    holds of coupled channels where means are taken over them, too."""
    with evaluated(model), torch.no_grad():
        expected = outputs(model(example))
    moved = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(0)
    for group in groups:
        order = torch.randperm(group.units, generator=rng)
        for member in group.members:
            tensor = getattr(moved.get_submodule(member.path), member.tensor).data
            rows, to = member.rows.flatten(), member.rows[order].flatten()
            tensor.index_copy_(member.dim, rows, tensor.index_select(member.dim, to))
    with evaluated(moved), torch.no_grad():
        found = outputs(moved(example))
    if all(close(a, b) for a, b in zip(found, expected, strict=True)):
        return ""
    return "its channels are not alike: the model changes when they trade places"


def without(model: nn.Module, groups: dict[str, Group], kept: dict[str, Tensor]) -> nn.Module:
    """A copy of the model of full size in which nothing reads the units that go."""
    network = copy.deepcopy(model)
    for name, units in kept.items():
        group = groups[name]
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[units] = False
        readers = [m for m in group.members if m.consumed] or list(group.members)
        for member in readers:
            tensor = getattr(network.get_submodule(member.path), member.tensor)
            with torch.no_grad():
                tensor.index_fill_(member.dim, member.rows[gone].flatten().to(tensor.device), 0)
    return network
