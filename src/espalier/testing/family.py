"""The suite that any family must pass: `check_family(MyFamily())`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compress.pretrained import Pretrained
from espalier.errors import SpaceError
from espalier.nets import Family, Supernet
from espalier.space import Candidate
from espalier.testing.plain import check_plain as check_plain
from espalier.testing.pretrained import check_pretrained

RANDOM = 6  # candidates drawn at random, beside the smallest and the largest


def check_family(family: Family, seed: int = 0) -> None:
    """Checks everything that the rest of Espalier expects of a family.

    Every sampled candidate builds a plain network that gives `(batch, classes)`, is trainable and
    is decided by torch's seed. Of supernets also: the active candidate computes what its extract
    computes, extracting leaves no trace, the units add up to the whole, and mixtures are right.
    Of trained models, where no weight hangs on the seed: what `check_pretrained` says.
    Errors: `AssertionError`, saying what is wrong with which candidate.
    """
    candidates = sampled(family, seed)
    _check_face(family)
    if isinstance(family, Pretrained):
        check_pretrained(family, candidates, seed)
        return
    for candidate in candidates:
        check_network(family, candidate, seed)
    if not isinstance(family, Supernet):
        return
    _check_refusals(family, candidates[0])
    for candidate in candidates:
        check_extract(family, candidate, seed)
        check_units(family, candidate)
    check_unit_decisions(family, seed)
    check_mixing(family, seed)


def sampled(family: Family, seed: int) -> list[Candidate]:
    """The first, the last and some random candidates of a family, all valid, none twice."""
    space, rng = family.space, np.random.default_rng(seed)
    ends = np.concatenate([space.corner(False), space.corner(True)])
    codes = np.concatenate([ends[space.valid(ends)], space.sample(RANDOM, rng)])
    return list(space.decode(codes[space.unique(codes)]))


def _check_face(family: Family) -> None:
    assert len(family.space) > 0, "the space has no decisions"
    assert all(isinstance(n, int) and n > 0 for n in family.shape), f"shape is {family.shape}"
    assert isinstance(family.classes, int), f"classes is {family.classes!r}"
    example = family.example(3)
    assert tuple(example.shape) == (3, *family.shape), f"example(3) has {tuple(example.shape)}"
    assert family.name, "the family has no name"


def check_network(family: Family, candidate: Candidate, seed: int = 0) -> None:
    """One candidate builds, is plain, runs in both modes, learns, and hangs on the seed alone."""
    network = _built(family, candidate, seed)
    check_plain(network, str(candidate))
    same, other = _built(family, candidate, seed), _built(family, candidate, seed + 1)
    assert _equal(network, same), f"{candidate}: one seed gives two networks"
    assert not _equal(network, other), f"{candidate}: the seed changes no weight"
    inputs = noise(family, 4, seed)
    for mode in (True, False):
        outputs = network.train(mode)(inputs)
        got, wanted = tuple(outputs.shape), (4, family.classes)
        assert got == wanted, f"{candidate}: the output is {got}, not {wanted}"
        assert torch.isfinite(outputs).all(), f"{candidate}: the output is not finite"
    learns = any(p.requires_grad for p in network.parameters())
    assert learns, f"{candidate}: no weight can learn"
    network.train()(inputs).square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients, f"{candidate}: no weight gets a gradient"
    assert all(bool(torch.isfinite(g).all()) for g in gradients), f"{candidate}: gradients diverge"


def noise(family: Family, batch: int, seed: int) -> Tensor:
    """Normal noise of the family's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *family.shape, generator=generator)


def _built(family: Family, candidate: Candidate, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(candidate)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- supernets ---------------------------------------------------------------------------------


def _check_refusals(family: Supernet, candidate: Candidate) -> None:
    for wrong in ({**candidate, "nothing": 1}, {}):
        try:
            family.activate(wrong)
        except SpaceError:
            continue
        if len(candidate):
            raise AssertionError(f"activate takes a candidate that is not of the space: {wrong}")


def check_extract(family: Supernet, candidate: Candidate, seed: int = 0) -> None:
    """What is extracted computes what is active, and the supernet is as it was before."""
    family.activate(candidate)
    inputs = noise(family, 16, seed)
    family.train()
    with torch.no_grad():
        for _ in range(3):  # sets the statistics of batch norms for this candidate
            family(inputs)
    family.eval()
    before = {name: value.clone() for name, value in family.state_dict().items()}
    state = torch.random.get_rng_state()
    network = family.extract(candidate)
    assert torch.equal(state, torch.random.get_rng_state()), "extract draws random numbers"
    assert family.active == candidate, f"{candidate}: extract changes what is active"
    assert not family.training, f"{candidate}: extract changes the mode"
    assert not network.training, f"{candidate}: what is extracted is not in the supernet's mode"
    check_plain(network, str(candidate))
    shared = {p.data_ptr() for p in family.parameters()} & {
        p.data_ptr() for p in network.parameters()
    }
    assert not shared, f"{candidate}: what is extracted shares weights with the supernet"
    with torch.no_grad():
        expected, got = family(inputs), network(inputs)
    worst = float((expected - got).abs().max()) / max(1.0, float(expected.abs().max()))
    assert worst <= 1e-5, f"{candidate}: extracted and active differ by {worst:.2g}"
    after = family.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), f"{candidate}: weights changed"


def check_units(family: Supernet, candidate: Candidate) -> None:
    """The units' parameters add up to the network's, and each takes the input it names."""
    total = 0
    for unit in family.units():
        found = family.unit(unit.name, candidate)
        if found is None:
            continue
        module, shape = found
        check_plain(module, f"unit {unit.name}")
        total += _parameters([module])
        with torch.no_grad():
            module.eval()(torch.zeros(2, *shape))
    whole = _parameters([family.extract(candidate)])
    assert total == whole, f"{candidate}: the units have {total} parameters, the network {whole}"


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def check_unit_decisions(family: Supernet, seed: int = 0) -> None:
    """Changing decisions that a unit does not name changes neither its module nor its input."""
    rng = np.random.default_rng(seed)
    for unit in family.units():
        columns = [i for i, name in enumerate(family.space.names) if name in unit.decisions]
        codes = family.space.sample(4, rng)
        codes[:, columns] = codes[:1, columns]
        kept = family.space.decode(family.space.canonical(codes))
        # what a change made inactive may differ; compare where all that the unit names is equal
        alike = [c for c in kept if all(c.get(n) == kept[0].get(n) for n in unit.decisions)]
        found = [f for f in (family.unit(unit.name, c) for c in alike) if f is not None]
        for (one, here), (two, there) in pairwise(found):
            assert here == there, f"unit {unit.name}: input {here} or {there} for equal decisions"
            shapes = [[tuple(p.shape) for p in m.parameters()] for m in (one, two)]
            assert shapes[0] == shapes[1], f"unit {unit.name}: two modules for equal decisions"


def check_mixing(family: Supernet, seed: int = 0) -> None:
    """One-hot mixtures compute what is active, also in training; gradients of weights are right.

    The family is left as it is: copies are mixed.
    """
    missing = [name for name in family.mixable if name not in family.space.names]
    assert not missing, f"mixable names decisions that the space does not have: {missing}"
    if not family.mixable:
        return
    for candidate in sampled(family, seed)[:3]:
        check_one_hot(family, candidate, seed)
    check_mixing_gradients(family, seed)


def check_one_hot(family: Supernet, candidate: Candidate, seed: int = 0) -> None:
    """A mixture with one option of each decision is the candidate, and `activate` ends it."""
    inputs = noise(family, 6, seed)
    active, mixed = copy.deepcopy(family), copy.deepcopy(family)
    active.activate(candidate)
    mixed.activate(_fixed(family, candidate))  # what can't be mixed
    mixed.mix(one_hot(family, candidate))
    assert mixed.state_dict().keys() == active.state_dict().keys(), "a mixture is in the state"
    for mode in (True, False):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            expected = active.train(mode)(inputs)
            torch.manual_seed(seed)
            got = mixed.train(mode)(inputs)
        worst = float((expected - got).abs().max()) / max(1.0, float(expected.abs().max()))
        assert worst <= 1e-5, f"{candidate}: one-hot and active differ by {worst:.2g}"
    after = mixed.state_dict()
    for name, value in active.state_dict().items():
        same = torch.allclose(value, after[name], atol=1e-5)
        assert same, f"{candidate}: a one-hot mixture changes {name} otherwise than what is active"
    other = family.uniform(0.0)
    active.activate(other)
    mixed.activate(other)
    with torch.no_grad():
        ended = torch.allclose(active(inputs), mixed(inputs), atol=1e-5)
    assert ended, "activate does not end a mixture"


def one_hot(family: Supernet, candidate: Candidate) -> dict[str, Tensor]:
    """Weights `(options,)` that are 1 for the candidate's options; the last of what is inactive."""
    found = {}
    for name in family.mixable:
        decision = family.space[name]
        code = int(decision.code(candidate[name])) if name in candidate else decision.count - 1
        found[name] = torch.zeros(decision.count).index_fill_(0, torch.tensor(code), 1.0)
    return found


def _fixed(family: Supernet, candidate: Candidate) -> Candidate:
    """The last options of what can be mixed, and the candidate's of the rest."""
    space, mixable = family.space, set(family.mixable)
    last = dict(family.uniform(1.0))
    kept = {name: option for name, option in candidate.items() if name not in mixable}
    codes = space.encode([family.uniform(1.0)])
    for name, option in {**last, **kept}.items():
        codes[0, space.names.index(name)] = space[name].code(option)
    fixed = space.decode(space.canonical(codes))[0]
    return fixed if set(kept) <= set(fixed) else candidate


def check_mixing_gradients(family: Supernet, seed: int = 0) -> None:
    """The gradient of all weights at once, against a finite difference along a random line."""
    net = copy.deepcopy(family).double().eval()
    generator = torch.Generator().manual_seed(seed)
    inputs = noise(family, 3, seed).double()
    weights: dict[str, Tensor] = {}
    for name in family.mixable:
        count = family.space[name].count
        drawn = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
        net.mix({name: drawn})
        try:
            net(inputs)
        except SpaceError:  # options of different shapes: only one of them can have weight
            continue
        weights[name] = drawn / drawn.sum()
    lines = {n: torch.randn(w.shape, generator=generator).double() for n, w in weights.items()}
    target = torch.randn(3, family.classes, generator=generator).double()

    def loss(step: float) -> Tensor:
        net.mix({n: w + step * lines[n] for n, w in weights.items()})
        out: Tensor = (net(inputs) * target).sum()
        return out

    with torch.no_grad():  # so short a step that hardly any ReLU turns on or off in it
        expected = float(loss(1e-8) - loss(-1e-8)) / 2e-8
    for weight in weights.values():
        weight.requires_grad_()
    gradients = torch.autograd.grad(loss(0.0), list(weights.values()), allow_unused=True)
    got = sum(
        float((g * lines[n]).sum())
        for n, g in zip(weights, gradients, strict=True)
        if g is not None
    )
    off = abs(expected - got) / max(1.0, abs(expected))
    assert off <= 1e-4, f"gradients of a mixture are {got:.6g}, differences say {expected:.6g}"
