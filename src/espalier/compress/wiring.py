"""Which tensor goes where in a model: one pass written down, tensors told apart by their writes.

What `bits` needs to know: which operators read a tensor, and which module gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.errors import EspalierError
from espalier.export import deployed


@dataclass
class Step:
    """One operator: its name, the tensors it reads and writes, the layer (path) it belongs to."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    layer: str = ""


@dataclass
class Wiring:
    """One pass. Tensors are numbers; a tensor written over in place is another one, a view the same.

    `inputs`, `outputs`: module path -> first tensor it took and gave, last call; `givers`: tensor ->
    modules that gave it, innermost first; `calls`: how often each module ran.
    """

    steps: list[Step] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    givers: dict[int, list[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    source: int = -1
    result: int = -1

    def readers(self, tensor: int) -> list[Step]:
        """The steps that read a tensor."""
        return [step for step in self.steps if tensor in step.reads]


def wiring(model: nn.Module, example: Tensor) -> Wiring:
    """Runs the model once on the first input of `example` and gives how its tensors go.

    Errors: `EspalierError` when the model does not run on it.
    """
    listener = _Listener(model)
    try:
        with deployed(model), listener.listening(model), listener:
            listener.found.source = listener.number(example[:1])
            output = model(example[:1])
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise EspalierError(
            f"the model does not run on an example of shape {tuple(example.shape)}: {first}"
        ) from error
    given = _tensors(output)
    if given:
        listener.found.result = listener.number(given[0])
    return listener.found


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Wiring()
        self._weights = {_place(t) for t in (*model.parameters(), *model.buffers())}
        self._now: dict[int, int] = {}  # storage -> the tensor that lies in it now
        self._alive: list[Tensor] = []  # held, so that no storage's address is used twice
        self._running: list[str] = []
        self._count = 0

    def number(self, tensor: Tensor, written: bool = False) -> int:
        """The tensor's number; a new one where it is new or has just been written over."""
        place = _place(tensor)
        if written or place not in self._now:
            self._now[place] = self._count
            self._count += 1
            self._alive.append(tensor)
        return self._now[place]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = [t for t in _tensors((args, kwargs)) if _place(t) not in self._weights]
        reads = tuple(dict.fromkeys(self.number(t) for t in taken))
        out = func(*args, **(kwargs or {}))
        made = [t for t in _tensors(out) if _place(t) not in self._weights]
        changed = func._schema.is_mutable
        writes = tuple(dict.fromkeys(self.number(t, changed) for t in made))
        if set(writes) - set(reads):  # not a mere view
            layer = self._running[-1] if self._running else ""
            self.found.steps.append(Step(func.overloadpacket.__name__, reads, writes, layer))
        return out

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Notes what every module takes and gives."""
        handles = []
        for name, module in model.named_modules(remove_duplicate=True):
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(name)
            self.found.calls[name] += 1
            given = _tensors((args, kwargs))
            if given:
                self.found.inputs[name] = self.number(given[0])

        return enter

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            if isinstance(output, Tensor):
                number = self.number(output)
                self.found.outputs[name] = number
                self.found.givers.setdefault(number, []).append(name)

        return leave


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
