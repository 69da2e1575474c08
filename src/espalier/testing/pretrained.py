"""What a trained model as a family must keep, beside what any family must: see `check_family`."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from espalier.compress.pretrained import Pretrained
from espalier.costs import Counts, count
from espalier.errors import SpaceError
from espalier.export.quantisers import carries
from espalier.space import Candidate
from espalier.testing.plain import check_plain

COUNTED = ("params", "macs", "bytes")


def check_pretrained(family: Pretrained, candidates: list[Candidate], seed: int = 0) -> None:
    """The original is the model to the bit; what is built is plain, runs, can learn, shares
    nothing with the model and is built again alike; the units' counts are the network's.

    Errors: `AssertionError`, saying what is wrong with which candidate.
    """
    inputs = _inputs(family, 4, seed)
    before = copy.deepcopy(family.model.state_dict())
    _check_options(family)
    with torch.no_grad():
        wanted = family.model(inputs)
        assert torch.equal(family.build(family.original)(inputs), wanted), (
            "the original candidate does not compute what the model does"
        )
    for candidate in candidates:
        _check_built(family, candidate, inputs, tuple(wanted.shape))
    after = family.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), (
        "building changes the model"
    )
    _check_counts(family, candidates)


def _check_options(family: Pretrained) -> None:
    for decision in family.space.decisions:
        parts = decision.name.split(":")
        assert len(parts) > 1, f"{decision.name}: a decision is named kind:name"
        last = family.original.get(decision.name)
        assert last == decision.options[-1], f"{decision.name}: the last option is not the original"
    try:
        family.build({"nothing": 1})
    except SpaceError:
        return
    raise AssertionError("build takes a candidate that is not of the space")


def _check_built(
    family: Pretrained, candidate: Candidate, inputs: Tensor, shape: tuple[int, ...]
) -> None:
    network, again = family.build(candidate), family.build(candidate)
    if not carries(network):  # layers of integers are torch's when they leave: see `export`
        check_plain(network, str(candidate))
    assert not network.training, f"{candidate}: what is built is in training mode"
    one, two = network.state_dict(), again.state_dict()
    alike = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert alike, f"{candidate}: built twice, two networks"
    own = {t.data_ptr() for t in family.model.state_dict().values() if t.numel()}
    shared = own & {t.data_ptr() for t in one.values() if t.numel()}
    assert not shared, f"{candidate}: what is built shares weights with the model"
    for mode in (True, False):
        outputs = network.train(mode)(inputs)
        got = tuple(outputs.shape)
        assert got == shape, f"{candidate}: the output is {got}, the model's is {shape}"
        assert torch.isfinite(outputs).all(), f"{candidate}: the output is not finite"
    network.train()(inputs).square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients, f"{candidate}: no weight gets a gradient"


def _check_counts(family: Pretrained, candidates: list[Candidate]) -> None:
    """Sums over units are what counting the built network gives."""
    got = Counts(family).estimate_codes(np.asarray(family.space.encode(candidates)))
    for i, candidate in enumerate(candidates):
        whole = count(family.build(candidate), family.example())
        for name in COUNTED:
            value, wanted = got[name][i], getattr(whole, name)
            assert value == wanted, f"{candidate}: {name} of the units {value:g}, built {wanted}"


def _inputs(family: Pretrained, batch: int, seed: int) -> Tensor:
    """Noise, or rows of the example where the model takes whole numbers."""
    example = family.example(batch)
    if not example.is_floating_point():
        return example
    return torch.randn(example.shape, generator=torch.Generator().manual_seed(seed))
