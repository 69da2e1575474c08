"""Where tensors must be rounded so that a runtime computes with integers from layer to layer.

A layer of integers rounds its input. Its output stays whole only if it is rounded too, after the
batch-norm and the rectifier that are fused with it; so do sums, pools and concatenations of rounded
tensors. A tensor that other operators read as well is rounded where it is made, once for all.
"""

from __future__ import annotations

from collections.abc import Collection

from espalier.compress.wiring import Step, Wiring

_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "batch_norm",
}
_RECTIFIERS = {"relu", "relu_", "hardtanh", "hardtanh_", "clamp_min", "clamp_min_"}  # relu6 too
_WHOLE = {  # operators that ONNX Runtime computes on integers when all they touch is rounded
    "add",
    "add_",
    "cat",
    "constant_pad_nd",
    "mean",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_avg_pool2d",
}


def outputs_to_round(wires: Wiring, layers: Collection[str], closing: Collection[str]) -> list[str]:
    """Modules (paths) whose output is to be rounded, given the layers of integers.

    `closing` are those of the layers that need a rounded output to be computed on integers.
    Tensors that no module gives, or only modules that run more than once, are left.
    """
    return _Rounding(wires, layers).run(closing)


class _Rounding:
    def __init__(self, wires: Wiring, layers: Collection[str]) -> None:
        self._wires, self._layers = wires, set(layers)
        self._readers: dict[int, list[Step]] = {}
        for step in wires.steps:
            for tensor in step.reads:
                self._readers.setdefault(tensor, []).append(step)
        self._hooked: dict[int, str] = {}

    def run(self, closing: Collection[str]) -> list[str]:
        for name in self._layers:
            self._want(self._wires.inputs[name])
        for name in closing:
            self._want(self._tail(self._wires.outputs[name]))
        for step in self._wires.steps:
            whole = step.name in _WHOLE and step.reads and step.layer not in self._layers
            if whole and all(self._rounded(tensor) for tensor in step.reads):
                self._want(self._tail(step.writes[0]))
        return list(self._hooked.values())

    def _tail(self, tensor: int) -> int:
        """The tensor behind the batch-norm and the rectifier that alone read this one."""
        for names in (_NORMS, _RECTIFIERS):
            readers = self._readers.get(tensor, [])
            if len(readers) == 1 and readers[0].name in names:
                tensor = readers[0].writes[0]
        return tensor

    def _rounded(self, tensor: int) -> bool:
        return tensor in self._hooked or self._only_layers(tensor)

    def _only_layers(self, tensor: int) -> bool:
        readers = self._readers.get(tensor, [])
        return bool(readers) and all(step.layer in self._layers for step in readers)

    def _want(self, tensor: int) -> None:
        if self._rounded(tensor) or tensor == self._wires.source:
            return
        for name in self._wires.givers.get(tensor, []):
            if name and self._wires.calls[name] == 1:
                self._hooked[tensor] = name
                return
