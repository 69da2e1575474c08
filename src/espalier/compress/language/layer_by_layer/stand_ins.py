"""What stands in the place of a model's layers, or of all that is below its head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Stop(Exception):
    """Everything that was wanted of a forward pass is known."""


class Stand(nn.Module):
    """Stands where a layer would: hands its input on, or `answer`, and keeps how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = False
        self.hidden: Tensor | None = None
        self.answer: Tensor | None = None
        self.call: tuple[Any, Any] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden, (args, kwargs)
        if self.last:
            raise Stop
        return hidden if self.answer is None else self.answer


class Below(nn.Module):
    """Stands below a head: gives these hidden states, whatever it is asked."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = _Output(hidden)

    @property
    def decoder(self) -> Below:
        return self  # OPT's head asks for the decoder inside

    def forward(self, *_: Any, **__: Any) -> _Output:
        return self.output


class _Output:
    """A base model's output that has hidden states and nothing else: no cache, no routes."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
