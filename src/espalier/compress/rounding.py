"""Where tensors must be rounded so that a runtime computes with integers from layer to layer.

A layer of integers rounds its input. Its output stays whole only if it is rounded too, after the
batch-norm and the rectifier that are fused with it; so do sums, pools and concatenations of rounded
tensors. A tensor that other operators read as well is rounded where it is made, once for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import Tensor

from espalier.compress.calls import Pass, Step, Value

_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
}
_RECTIFIERS = {"relu", "hardtanh", "clamp_min"}  # relu6 is a hardtanh
_WHOLE = {  # operators that ONNX Runtime computes on integers when all they touch is rounded
    "add",
    "cat",
    "constant_pad_nd",
    "mean",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
}


def outputs_to_round(run: Pass, layers: Collection[str], closing: Collection[str]) -> list[str]:
    """Modules (paths) whose output is to be rounded, given the layers of integers, each run once.

    `closing` are those of the layers that need a rounded output to be computed on integers.
    Tensors that no module gives alone, or only modules that run more than once, are left.
    """
    return _Rounding(run, layers).run(closing)


class _Rounding:
    def __init__(self, run: Pass, layers: Collection[str]) -> None:
        self._run, self._layers = run, set(layers)
        self._source = run.calls[0].taken
        self._often = Counter(call.path for call in run.calls)
        self._calls = {call.path: call for call in run.calls}
        self._readers: dict[Value, list[Step]] = {}
        for step in run.steps:
            for value in step.reads:
                self._readers.setdefault(value, []).append(step)
        self._found: dict[Value, str] = {}

    def run(self, closing: Collection[str]) -> list[str]:
        """All modules, in a fixed order."""
        for name in sorted(self._layers):
            self._want(self._calls[name].taken)
        for name in sorted(closing):
            self._want(self._tail(self._calls[name].made))
        for step in self._run.steps:
            whole = step.name in _WHOLE and step.reads and not self._inside(step)
            if whole and all(self._rounded(value) for value in step.reads):
                self._want(self._tail(step.made))
        return list(self._found.values())

    def _inside(self, step: Step) -> bool:
        return step.call >= 0 and self._run.calls[step.call].path in self._layers

    def _tail(self, value: Value | None) -> Value | None:
        """The tensor behind the batch-norm and the rectifier that alone read this one."""
        for names in (_NORMS, _RECTIFIERS):
            readers = self._readers.get(value, []) if value else []
            if len(readers) == 1 and readers[0].name in names:
                value = readers[0].made
        return value

    def _rounded(self, value: Value) -> bool:
        readers = self._readers.get(value, [])
        return value in self._found or (bool(readers) and all(map(self._inside, readers)))

    def _want(self, value: Value | None) -> None:
        if value is None or value == self._source or self._rounded(value):
            return
        # of a tuple or a dictionary there is no one tensor to round
        calls = [c for c in reversed(self._run.calls) if isinstance(c.output, Tensor)]
        givers = [c for c in calls if c.made == value and c.path]
        # innermost first; what only passes the tensor on rounds it for its own readers alone
        for call in sorted(givers, key=lambda c: c.taken == value):
            if self._often[call.path] == 1:
                self._found[value] = call.path
                return
