"""Which tensors share memory, told for tensors that only have shapes too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def storage_of(tensor: Tensor) -> int | None:
    """A number of the memory behind a tensor, for as long as that lives; None for no memory at all.

    Tensors on torch's meta device have a storage of their own each, but no address.
    """
    storage = tensor.untyped_storage()
    found: int = storage._cdata
    return found if storage.nbytes() else None


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """The numbers of all of them."""
    return {place for t in tensors if (place := storage_of(t)) is not None}
