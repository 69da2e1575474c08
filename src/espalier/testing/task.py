"""What every task must keep; run it on your own: `check_task(task)`."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor

from espalier.tasks import Split, Task

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def check_task(task: Task) -> None:
    """Raises `AssertionError` with the rule that `task` breaks; reads every split a few times."""
    assert task.metrics, (
        "a task declares at least one metric; the first is what a search is judged by"
    )
    for split in _SPLITS:
        _check_pass(task, split)
    _check_order(task)
    _check_numbers(task)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.fingerprint == task.fingerprint, "a pickled copy has the same fingerprint"
    assert task.fingerprint == task.fingerprint, "the fingerprint is stable"


def _check_pass(task: Task, split: Split) -> None:
    size = task.size(split)
    assert size > 0, f"{split} has examples"
    x, y = _all(task, split, None)
    assert len(x) == len(y) == size, f"a pass over {split} gives each of its {size} examples once"
    assert tuple(x.shape[1:]) == tuple(task.shape), f"inputs have shape {tuple(task.shape)}"
    assert x.dtype == torch.float32, f"inputs are float32, got {x.dtype}"
    assert bool(torch.isfinite(x).all()), f"inputs of {split} are finite"
    again, _ = _all(task, split, None)
    assert torch.equal(x, again), "without a generator a pass repeats itself"


def _check_order(task: Task) -> None:
    _, ordered = _all(task, "train", None)
    first, y = _all(task, "train", 1)
    same, _ = _all(task, "train", 1)
    assert torch.equal(first, same), "a pass is a function of its generator's seed"
    assert len(ordered) - len(y) in (0, 1), "a random pass drops at most a last batch of one"
    if len(ordered) == len(y):
        assert torch.equal(ordered.sort(0).values, y.sort(0).values), (
            "a random pass gives the same targets in another order"
        )
    other, _ = _all(task, "train", 2)
    if len(ordered) > 20:
        assert not torch.equal(first, other), "another seed gives another order"
    augmented = [x for x, _ in task.batches("train", 32, _generator(1), augment=True)]
    assert augmented[0].shape[1:] == first.shape[1:], "augmentation keeps the shape"


def _check_numbers(task: Task) -> None:
    _, targets = _all(task, "validation", None)
    outputs = torch.zeros(len(targets), task.classes, requires_grad=True)
    loss = task.loss(outputs, targets)
    assert loss.ndim == 0, f"the loss is a scalar, got shape {tuple(loss.shape)}"
    assert bool(torch.isfinite(loss)), "the loss of zero outputs is finite"
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None, "the loss has a gradient"
    assert float(outputs.grad.abs().sum()) > 0, "the gradient at zero outputs is not zero"
    measured = task.measure(outputs.detach(), targets)
    declared = {m.name for m in task.metrics}
    assert set(measured) == declared, f"measure gives {declared}, got {set(measured)}"
    assert all(isinstance(v, float) for v in measured.values()), "metrics are floats"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _all(task: Task, split: Split, seed: int | None) -> tuple[Tensor, Tensor]:
    found = list(task.batches(split, 32, None if seed is None else _generator(seed)))
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
