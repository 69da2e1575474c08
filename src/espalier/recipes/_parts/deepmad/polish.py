"""The last steps of a design: exact gains from one or two changes at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import combinations

from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes._parts.deepmad.entropy import Wanted

Choices = Mapping[str, int]


def polished(wanted: Wanted, choices: Choices, seconds: float) -> dict[str, int]:
    """A design that no single or double change betters, as far as the time goes.

    A change is a step of 8 or 16 channels, one or two blocks, another kernel, another stem.
    """
    end = time.perf_counter() + seconds
    best, score = dict(choices), deepmad.measured(wanted, choices)["score"]
    while time.perf_counter() < end:
        found = _better(wanted, best, score, end)
        if found is None:
            break
        best, score = found
    return best


def _better(
    wanted: Wanted, choices: dict[str, int], score: float, end: float
) -> tuple[dict[str, int], float] | None:
    """The best of the single changes; where none helps, the first double one that does."""
    changes = list(_changes(wanted, choices))
    best: tuple[dict[str, int], float] | None = None
    for name, value in changes:
        best = _gain(wanted, {**choices, name: value}, best[1] if best else score) or best
    if best is not None:
        return best
    for (a, x), (b, y) in combinations(changes, 2):
        if a != b and (found := _gain(wanted, {**choices, a: x, b: y}, score)):
            return found
        if time.perf_counter() > end:
            return None
    return None


def _gain(
    wanted: Wanted, choices: dict[str, int], score: float
) -> tuple[dict[str, int], float] | None:
    if not fits(wanted, choices):
        return None
    numbers = deepmad.measured(wanted, choices)
    better = numbers["score"] > score * (1 + 1e-9) and deepmad.kept(wanted, numbers)
    return (choices, numbers["score"]) if better else None


def _changes(wanted: Wanted, choices: Choices) -> Iterator[tuple[str, int]]:
    for name, value in choices.items():
        part = name.rpartition(".")[2]
        options: tuple[int, ...]
        if part == "stem":
            options = wanted.stems
        elif part == "kernel":
            options = wanted.kernels
        elif part == "depth":
            options = (value - 2, value - 1, value + 1, value + 2)
        else:
            options = (value - 16, value - 8, value + 8, value + 16)
        yield from ((name, option) for option in options if option != value)


def fits(wanted: Wanted, choices: Choices) -> bool:
    """Whether widths go with one another and nothing is out of range."""
    before = choices["stem"]
    for n, name in enumerate(wanted.layout.groups):
        out, inner, depth = (choices[f"{name}.{part}"] for part in ("out", "inner", "depth"))
        if not (8 <= out <= min(wanted.widest, 4 * before) and inner >= 8):
            return False
        if not 1 <= depth <= (3 if n == 0 else wanted.deepest):
            return False
        if wanted.layout.depthwise:
            if out < before or not 1.5 * out <= inner <= 6 * out:
                return False
        elif not out / 10 <= inner <= out:
            return False
        before = out
    return True
