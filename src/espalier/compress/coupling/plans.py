"""The numbers that modules keep, which may have to follow a group that is cut: what a proof tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from espalier.compress.coupling.groups import Group, Scaled
from espalier.compress.narrow import unsure

SIZES = ("dim", "size", "channel", "feature", "embed", "width", "inner", "hidden", "planes")


def plans(model: nn.Module, group: Group) -> Iterator[Group]:
    """The group with the likely sets of numbers that follow it, the likeliest first."""
    every, sizes = _numbers(model, group)
    heads = [n for n in every if "group" not in n.name]  # queries per key: seldom changes
    mine = [n for n in heads if "." not in n.name], [n for n in sizes if "." not in n.name]
    likely = [[], mine[1], mine[0], mine[0] + mine[1], heads, heads + sizes]
    if group.heads:
        likely = [mine[0], [], mine[0] + mine[1], mine[1], heads, every, heads + sizes]
    seen: list[list[Scaled]] = []
    for more in _more(own_numbers(model, group), group.heads):
        for some in likely:
            plan = list(dict.fromkeys([*some, *more]))
            if plan not in seen:
                seen.append(plan)
                yield replace(group, numbers=(*group.numbers, *plan))


def _more(own: list[Scaled], heads: bool) -> Iterator[list[Scaled]]:
    """Sets of the numbers beside a group's own tensors: none, all, those of one name."""
    yield []
    if heads:  # as many channels a head as heads: a tensor of the module's own has a row a head
        yield [n for n in own if "head" in n.name and "dim" not in n.name]
    yield own
    for name in dict.fromkeys(n.name for n in own):
        yield [n for n in own if n.name == name]


def own_numbers(model: nn.Module, group: Group) -> list[Scaled]:
    """Whole numbers on the modules that hold a group's tensors, as large as a dim that is cut: a
    size, or a number that is as large by chance."""
    sizes: dict[str, set[int]] = {}
    for member in group.members:
        for path, name in member.owners:
            size = getattr(model.get_submodule(path), name).shape[member.dim]
            if (
                size == member.rows.numel()
            ):  # where other groups cut the dim, too, it is no multiple
                sizes.setdefault(path, set()).add(size)
    return [
        Scaled(path, name, value)
        for path, some in sizes.items()
        for name, value in unsure(model.get_submodule(path)).items()
        if value in some
    ]


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


def kind_of(model: nn.Module, group: Group) -> tuple[str, ...]:
    """Groups of one kind have the same parts in the same sorts of modules, beside the same numbers."""
    modules = [(model.get_submodule(m.path.rpartition(".")[0]), m) for m in group.members]
    parts = {f"{type(p).__name__}.{m.path.rpartition('.')[2]}.{m.tensor}" for p, m in modules}
    parts |= {f"own {n.name}" for n in own_numbers(model, group)}
    return (str(group.heads), str(group.averaged), *sorted(parts))
