"""A piece that takes several rows for each of the network's: windows, frames or tokens folded into
the batch."""

from __future__ import annotations

from torch import Tensor, nn


class Rows(nn.Module):
    """A module for inputs `(b, *shape)` whose own have the batch folded into dim `dim` of `shape`.

    It runs as part of no network: what is recorded and timed is the module itself, see `unfolded`.
    """

    def __init__(self, module: nn.Module, dim: int = 0) -> None:
        super().__init__()
        self.module, self.dim = module, dim

    def folded(self, x: Tensor) -> Tensor:
        """The module's own input."""
        return x.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(self.folded(x))
        return out


def unfolded(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """What a network runs of a piece, and on what."""
    return (module.module, module.folded(x)) if isinstance(module, Rows) else (module, x)
