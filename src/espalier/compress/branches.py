"""Which parts of a model can be left out without a change of shape, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.compress.calls import Call, Pass
from espalier.compress.cut import Ignored
from espalier.compress.left_out import Removal, keyword, part_of

# of these zeros come out where zeros go in: they may stay in a branch that is left out
_KEEP_ZERO = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Tanh,
    nn.ELU,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)
_ZERO_TO_ZERO = {"relu", "gelu", "silu", "hardtanh", "hardswish", "leaky_relu", "elu", "tanh"}
_ZERO_TO_ZERO |= {"mul", "div", "_to_copy", "clone", "native_dropout"}
# methods that fold parallel branches into one layer, by the names that authors of such blocks use
_FOLDING = ("reparameterize", "switch_to_deploy", "fuse", "fuse_convs", "merge_branches")
_LINEAR = {"convolution", "native_batch_norm", "addmm", "mm", "add", "empty"}


def removals(model: nn.Module, run: Pass) -> tuple[list[Removal], list[Ignored]]:
    """What can be left out of a model, in the order in which it runs; and what can't, and why."""
    finder = _Finder(model, run)
    return finder.found, finder.ignored


@dataclass(frozen=True)
class _Branch:
    """Calls in a row, children of the call `owner`, whose result that adds to something.

    `alone`: what it is added to is made by no layers of the owner's."""

    owner: int
    chain: list[int]
    alone: bool


class _Finder:
    def __init__(self, model: nn.Module, run: Pass) -> None:
        self._model, self._run = model, run
        self._times: dict[int, int] = {}
        for call in run.calls:
            self._times[id(call.module)] = self._times.get(id(call.module), 0) + 1
        self._readers: dict[Any, list[int]] = {}
        for i, step in enumerate(run.steps):
            for value in set(step.reads):
                self._readers.setdefault(value, []).append(i)
        self.ignored: list[Ignored] = []
        self._folding: set[str] = set()
        branches = self._branches()
        whole = self._whole_blocks()
        found = [self._removal(run.calls[i].path, [run.calls[i]], zero=False) for i in whole]
        found += [
            removal
            for branch in branches
            if self._is_own(branch, whole) and (removal := self._of_branch(branch, branches))
        ]
        taken = {path for r in found for p in r.parts for path in self._inside(p.path)}
        found += self._equal(taken, {path for r in found for path in self._around(r.parts[0].path)})
        order = {call.path: i for i, call in reversed(list(enumerate(run.calls)))}
        self.found = sorted(found, key=lambda r: order[r.parts[0].path])

    # --- residual branches ---------------------------------------------------------------------

    def _branches(self) -> list[_Branch]:
        """Calls in a row that end in an addition."""
        found: list[_Branch] = []
        for i, step in enumerate(self._run.steps):
            if step.name == "add" and len(step.reads) == 2 and step.shapes[0] == step.shapes[1]:
                chains = [self._chain(value, i, step.call) for value in dict.fromkeys(step.reads)]
                weights = [self._weight(chain) for chain in chains]
                if any(weights):
                    chain = chains[weights.index(max(weights))]
                    found.append(_Branch(step.call, chain, alone=not all(weights[:2])))
        return found

    def _chain(self, value: Any, reader: int, owner: int) -> list[int]:
        """The calls in a row, children of `owner`, whose last result only `reader` reads."""
        chain: list[int] = []
        alone = self._readers.get(value) == [reader]
        while alone:
            made = [
                i
                for i, call in enumerate(self._run.calls)
                if call.made == value and call.parent == owner and call.taken != value
            ]
            if made:
                chain.insert(0, made[-1])
                value = self._run.calls[made[-1]].taken
                readers = self._readers.get(value, [])
                alone = all(self._run.within(self._run.steps[r].call, made[-1]) for r in readers)
            elif (step := self._made_by(value)) is not None and self._plain(step, owner):
                value = self._run.steps[step].reads[0]
                alone = self._readers.get(value) == [step]
            else:
                break
        return chain

    def _made_by(self, value: Any) -> int | None:
        return next((i for i, step in enumerate(self._run.steps) if step.made == value), None)

    def _plain(self, index: int, owner: int) -> bool:
        """A function of one value, called by `owner` itself, that makes zeros of zeros."""
        step = self._run.steps[index]
        return step.call == owner and len(step.reads) == 1 and step.name in _ZERO_TO_ZERO

    def _weight(self, chain: list[int]) -> int:
        modules = [self._run.calls[i].module for i in chain]
        return sum(p.numel() for m in modules for p in m.parameters())

    def _whole_blocks(self) -> list[int]:
        """Calls that add once, something of their own to their input, and keep its shape; within
        such a call only those that mix channels, so that a norm which adds is no decision."""
        added: dict[int, list[Any]] = {}
        for step in self._run.steps:
            if step.name == "add" and len(step.reads) == 2:
                added.setdefault(step.call, []).append(step)
        found: list[int] = []
        for i, steps in added.items():
            call = self._run.calls[i]
            fits = call.path and self._fits(call) and len(steps) == 1
            if fits and call.taken in steps[0].reads and len(set(steps[0].reads)) == 2:
                found.append(i)
        outermost = [i for i in found if not self._nested(i, found)]
        return [i for i in found if i in outermost or self._mixes([i])]

    def _nested(self, call: int, others: Iterable[int]) -> bool:
        """Whether a call runs inside another of these."""
        return any(other != call and self._run.within(call, other) for other in others)

    def _is_own(self, branch: _Branch, whole: Collection[int]) -> bool:
        """Whether a branch is a decision of its own beside those of the whole blocks: it is not the
        one of such a block, and within one it is a shortcut's, not one layer beside another."""
        if branch.owner in whole:
            return False
        within = self._nested(branch.owner, whole)
        return not within or (branch.alone and self._mixes(branch.chain))

    def _mixes(self, calls: Iterable[int]) -> bool:
        """Whether any of the weights mixes channels, as those of norms and of depthwise filters do
        not: without these next to nothing is saved."""
        modules = [self._run.calls[i].module for i in calls]
        return any(p.dim() > 1 and min(p.shape[:2]) > 1 for m in modules for p in m.parameters())

    def _of_branch(self, branch: _Branch, branches: list[_Branch]) -> Removal | None:
        owner, chain = branch.owner, branch.chain
        holder = self._run.calls[owner]
        if method := self._folds(owner):
            if holder.path not in self._folding:
                self.ignored.append(Ignored(holder.path, "depth", _folded(method)))
            self._folding.add(holder.path)
            return None
        alone = sum(other.owner == owner for other in branches) == 1
        calls = [self._run.calls[i] for i in chain]
        largest = max(chain, key=lambda i: self._weight([i]))
        name = holder.path if alone and holder.path else self._run.calls[largest].path
        shared = [c for c in calls if not self._once(c)]
        if any(not isinstance(c.module, _KEEP_ZERO) for c in shared):
            again = next(c for c in shared if not isinstance(c.module, _KEEP_ZERO))
            self.ignored.append(Ignored(name, "depth", f"{again.path} is called more than once"))
            return None
        parts = [c for c in calls if self._once(c)]
        if any(keyword(c) is None for c in parts):
            self.ignored.append(Ignored(name, "depth", "its first input is no tensor"))
            return None
        return self._removal(name, parts, zero=True)

    def _folds(self, owner: int) -> str:
        """The method that makes one layer of a block's branches, where these are linear."""
        steps = [s for s in self._run.steps if self._run.within(s.call, owner)]
        added = [i for i, s in enumerate(steps) if s.name == "add" and s.call == owner]
        holder = self._run.calls[owner]
        if not holder.path or any(s.name not in _LINEAR for s in steps[: added[-1]]):
            return ""
        return next((n for n in _FOLDING if callable(getattr(holder.module, n, None))), "")

    # --- blocks of equal shape without a shortcut ------------------------------------------------

    def _equal(self, taken: set[str], around: set[str]) -> Iterator[Removal]:
        """Innermost blocks, and convolutions and linear layers outside of them."""
        inside = {path for block in self._folding for path in self._inside(block)[1:]}
        blocks = [
            c
            for c in self._run.calls
            if c.path not in inside and self._fits(c) and self._innermost(c)
        ]
        inside |= {path for c in blocks for path in self._inside(c.path)}
        layers = [
            c
            for c in self._run.calls
            if c.path not in inside
            and self._fits(c)
            and isinstance(c.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        ]
        for call in [*blocks, *layers]:
            if call.path not in taken and call.path not in around:
                yield self._removal(call.path, [call], zero=False)

    def _fits(self, call: Call) -> bool:
        weights = any(True for _ in call.module.parameters())
        whole = call.taken is not None and call.made is not None and call.taken != call.made
        return (
            bool(call.path)
            and weights
            and whole
            and call.shape == call.out_shape
            and self._once(call)
        )

    def _innermost(self, call: Call) -> bool:
        """A module with children, of which none has children with weights; or all of its branches
        become one layer. A norm that holds its activation is no block: it is as good as free."""
        if call.path in self._folding:
            return True
        if all(p.numel() == max(p.shape, default=1) for p in call.module.parameters()):
            return False
        children = list(call.module.children())
        deep = any(any(True for _ in g.parameters()) for c in children for g in c.children())
        return bool(children) and not deep

    # --- helpers -----------------------------------------------------------------------------------

    def _once(self, call: Call) -> bool:
        return self._times[id(call.module)] == 1

    def _removal(self, name: str, calls: list[Call], zero: bool) -> Removal:
        inside = [path for call in calls for path in self._inside(call.path)]
        return Removal(name, tuple(part_of(c) for c in calls), tuple(inside), zero)

    def _inside(self, path: str) -> list[str]:
        return [name for name, _ in self._model.get_submodule(path).named_modules(prefix=path)]

    def _around(self, path: str) -> list[str]:
        steps = path.split(".")
        return [".".join(steps[:i]) for i in range(len(steps))]


def _folded(method: str) -> str:
    return f"its branches become one layer with its own {method}(): call that first"
