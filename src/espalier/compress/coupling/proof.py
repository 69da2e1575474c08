"""Does a cut model compute what the original does without those channels? Groups that don't are
left alone.

The reference is the original with zeros where layers read the channels that go. It is exact except
where a norm or a mean is taken over the channels: those groups must only run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from espalier.compress.coupling.groups import Group, Member, cut
from espalier.compress.coupling.plans import kind_of, own_numbers, plans
from espalier.compress.coupling.trial import Trial, trial_of
from espalier.compress.coupling.trial import close as close
from espalier.compress.cut import Ignored

SHARES = (0.5, 0.75)
LEAST = 8  # the least share that widths leave by default is one in so many


def proven(
    model: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], list[Ignored]]:
    """The groups that can be cut, with the numbers on modules that must follow; and the others.

    What makes one group of a kind work is tried on all of its kind; then group by group.
    """
    trial = trial_of(model, example)
    first = [next(plans(model, group)) for group in groups]
    if not _fault(trial, first) and not _doubtful(trial, first):
        return first, []
    tried: dict[tuple[str, ...], tuple[int, str]] = {}
    likely, ignored = [], []
    for group in groups:
        kind = kind_of(model, group)
        if kind not in tried:
            tried[kind] = _first_sound(trial, group)
        which, fault = tried[kind]
        if which < 0:
            ignored.append(Ignored(group.name, "width", fault))
        else:
            found = list(plans(model, group))
            likely.append(found[min(which, len(found) - 1)])
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


def _first_sound(trial: Trial, group: Group) -> tuple[int, str]:
    """The first plan with which a group can be cut alone, best one that is not doubtful; -1 and
    what is wrong where none is."""
    faults, doubtful = [], []
    for which, plan in enumerate(plans(trial.model, group)):
        fault = _fault(trial, [plan])
        if fault:
            faults.append(fault)
        elif _doubtful(trial, [plan]):
            doubtful.append(which)
        else:
            return which, ""
    return (doubtful[0], "") if doubtful else (-1, faults[0])


def _doubtful(trial: Trial, groups: Sequence[Group]) -> bool:
    """Whether a number may have to follow although the cut model runs: the divisor of a mean by
    hand. Then a half is not as the whole of two such halves, whose readers take half of each."""
    averaged = {g.name: g for g in groups if g.averaged}
    if not any(own_numbers(trial.model, g) for g in averaged.values()):
        return False
    repeated = _copied(trial.model, [m for g in averaged.values() for m in g.members])
    part = {}
    for name, group in averaged.items():
        times = next(t for t in range(2, group.units + 1) if group.units % t == 0)
        part[name] = torch.arange(group.units // times)
        for member in group.members:
            tensor, rows = _tensor(repeated, member).data, member.rows[part[name]]
            values = tensor.index_select(member.dim, rows.flatten())
            for places in member.rows.chunk(times):
                copied = values / times if member.consumed else values
                tensor.index_copy_(member.dim, places.flatten(), copied)
    try:
        return not trial.same(_outputs(trial, averaged, part), trial.run(repeated))
    except Exception:
        return True


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
