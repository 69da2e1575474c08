"""Does a cut model compute what the original does without those channels? Groups that don't are
left alone.

The reference is the original with zeros where layers read the channels that go. It is exact except
where a norm or a mean is taken over the channels: those groups must only run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from espalier.compress.coupling.groups import Group, Member, Scaled, cut
from espalier.compress.coupling.trial import Trial, trial_of
from espalier.compress.coupling.trial import close as close
from espalier.compress.cut import Ignored

SHARES = (0.5, 0.75)
LEAST = 8  # the least share that widths leave by default is one in so many
SIZES = ("dim", "size", "channel", "feature", "embed", "width", "inner", "hidden", "planes")


def proven(
    model: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], list[Ignored]]:
    """The groups that can be cut, with the numbers on modules that must follow; and the others.

    What makes one group of a kind work is tried on all of its kind; then group by group.
    """
    trial = trial_of(model, example)
    first = [next(_plans(model, group)) for group in groups]
    if not _fault(trial, first):
        return first, []
    tried: dict[tuple[str, ...], tuple[int, str]] = {}
    likely, ignored = [], []
    for group in groups:
        kind = _kind(model, group)
        if kind not in tried:
            tried[kind] = _first_sound(trial, group)
        which, fault = tried[kind]
        if which < 0:
            ignored.append(Ignored(group.name, "width", fault))
        else:
            plans = list(_plans(model, group))
            likely.append(plans[min(which, len(plans) - 1)])
    if not _fault(trial, likely):
        return likely, ignored
    sound: list[Group] = []
    for half in _halves(likely):
        ignored += _added(trial, sound, half)
    return sound, ignored


def _added(trial: Trial, sound: list[Group], more: Sequence[Group]) -> list[Ignored]:
    """Adds to `sound` the groups that can be cut beside it; the others, and why not. Few are at
    fault as a rule, so halves are tried before single groups."""
    fault = _fault(trial, [*sound, *more])
    if not fault:
        sound += more
        return []
    if len(more) == 1:
        return [Ignored(more[0].name, "width", fault)]
    return [row for half in _halves(more) for row in _added(trial, sound, half)]


def _halves(groups: Sequence[Group]) -> list[Sequence[Group]]:
    """The groups in two parts, in order; those without any are left out."""
    middle = len(groups) // 2
    return [half for half in (groups[:middle], groups[middle:]) if half]


def _kind(model: nn.Module, group: Group) -> tuple[str, ...]:
    """Groups of one kind have the same parts in the same sorts of modules."""
    modules = [(model.get_submodule(m.path.rpartition(".")[0]), m) for m in group.members]
    parts = {f"{type(p).__name__}.{m.path.rpartition('.')[2]}.{m.tensor}" for p, m in modules}
    return (str(group.heads), str(group.averaged), *sorted(parts))


def _first_sound(trial: Trial, group: Group) -> tuple[int, str]:
    """The first plan with which a group can be cut alone; -1 and what is wrong where none is."""
    faults = []
    for which, plan in enumerate(_plans(trial.model, group)):
        fault = _fault(trial, [plan])
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


def _fault(trial: Trial, groups: Sequence[Group]) -> str:
    """What is wrong with cutting all these groups to about half and three quarters, or to the
    least, in one line; "" for nothing."""
    named = {g.name: g for g in groups}
    averaged = [g for g in groups if g.averaged]
    least = {g.name: torch.arange(-(-g.units // LEAST)) for g in groups}
    try:
        for seed in range(2):
            kept = _drawn(groups, seed)
            exact = {name: units for name, units in kept.items() if not named[name].averaged}
            fault = _differs(trial, named, exact)
            if not fault and averaged:
                fault = _misshapen(_outputs(trial, named, kept), trial.given)
            if fault:
                return fault
        fault = _misshapen(_outputs(trial, named, least), trial.given)
        return fault or (_moves(trial, averaged) if averaged else "")
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        return f"a cut model does not run: {line[:150] or type(error).__name__}"


def _drawn(groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
    """Units that stay, of each group about half or three quarters. No two groups keep the same
    share: shapes that only fit by such a chance would pass."""
    rng = torch.Generator().manual_seed(seed)
    kept = {}
    for i, group in enumerate(groups):
        share = SHARES[(i + seed) % 2] + 0.2 * float(torch.rand((), generator=rng)) - 0.1
        units = torch.randperm(group.units, generator=rng)[: max(1, int(group.units * share))]
        kept[group.name] = units.sort().values
    return kept


def _outputs(trial: Trial, groups: dict[str, Group], kept: dict[str, Tensor]) -> list[Tensor]:
    network = _copied(trial.model)
    cut(network, groups, kept)
    return trial.run(network)


def _differs(trial: Trial, groups: dict[str, Group], kept: dict[str, Tensor]) -> str:
    if not kept:
        return ""
    expected = trial.run(without(trial.model, groups, kept))
    found = _outputs(trial, groups, kept)
    fault = _misshapen(found, expected)
    if fault or trial.same(found, expected):
        return fault
    return "a cut model computes something else than the original without these channels"


def _misshapen(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return f"a cut model gives the shape {tuple(a.shape)} for {tuple(b.shape)}"
    return ""


def _moves(trial: Trial, groups: Sequence[Group]) -> str:
    """Whether the model computes the same with the units of these groups in another order: what
    holds of coupled channels where means are taken over them, too."""
    moved = _copied(trial.model, [m for group in groups for m in group.members])
    rng = torch.Generator().manual_seed(0)
    for group in groups:
        order = torch.randperm(group.units, generator=rng)
        for member in group.members:
            tensor = _tensor(moved, member).data
            rows, to = member.rows.flatten(), member.rows[order].flatten()
            tensor.index_copy_(member.dim, rows, tensor.index_select(member.dim, to))
    if trial.same(trial.run(moved), trial.given):
        return ""
    return "its channels are not alike: the model changes when they trade places"


def without(model: nn.Module, groups: dict[str, Group], kept: dict[str, Tensor]) -> nn.Module:
    """A copy of the model of full size in which nothing reads the units that go; what stays as it
    was is shared with the model."""
    readers = {name: _readers(groups[name]) for name in kept}
    network = _copied(model, [m for some in readers.values() for m in some])
    for name, units in kept.items():
        gone = torch.ones(groups[name].units, dtype=torch.bool)
        gone[units] = False
        for member in readers[name]:
            tensor = _tensor(network, member)
            with torch.no_grad():
                tensor.index_fill_(member.dim, member.rows[gone].flatten().to(tensor.device), 0)
    return network


def _readers(group: Group) -> list[Member]:
    return [m for m in group.members if m.consumed] or list(group.members)


def _tensor(model: nn.Module, member: Member) -> Tensor:
    tensor: Tensor = getattr(model.get_submodule(member.path), member.tensor)
    return tensor


def _copied(model: nn.Module, members: Iterable[Member] = ()) -> nn.Module:
    """A copy that shares all parameters with the model but those of `members`."""
    own = {id(_tensor(model, member)) for member in members}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
