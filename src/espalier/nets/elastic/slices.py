"""What to index a tensor with for its first channels."""

from __future__ import annotations

Cut = tuple[slice, ...] | None


def cut(full: tuple[int, ...], part: tuple[int, ...]) -> Cut:
    """What to index with to get `part` of `full`; None for all of it."""
    if full == part:
        return None
    found = [slice(None) if n == m else slice(m) for n, m in zip(full, part, strict=True)]
    while found[-1] == slice(None):
        found.pop()
    return tuple(found)
