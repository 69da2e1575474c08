"""The space of HW-GPT-Bench, its exact counts, and features of its networks.

Sukthanker et al., 2024 (https://arxiv.org/abs/2405.10299): embedding size, number of layers, bias,
and in each layer the number of heads and the ratio of the hidden layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.space import Space, choice, ordinal

Codes = NDArray[Any]
Array = NDArray[np.float64]

# embedding sizes, numbers of layers, heads a layer, tokens of the forward pass that was counted
SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "s": ((192, 384, 768), (10, 11, 12), (4, 8, 12), 8192),
    "m": ((256, 512, 1024), (22, 23, 24), (8, 12, 16), 4096),
}
RATIOS = (2, 3, 4)
# of the embedding, the same for both scales: tokens in the vocabulary and positions
_VOCABULARY, _EMBEDDED, _HEAD = 50_254, 100_510, 64


@cache
def space(scale: str) -> Space:
    """Decisions `embed_dim`, `n_layer`, `bias`, and `n_head_I`, `mlp_ratio_I` of each layer."""
    widths, depths, heads, _ = SCALES[scale]
    layers = []
    for name, options in (("n_head", heads), ("mlp_ratio", RATIOS)):
        for i in range(max(depths)):
            deep = tuple(depth for depth in depths if depth > i)
            when = {} if len(deep) == len(depths) else {"n_layer": deep}
            layers.append(ordinal(f"{name}_{i}", *options, when=when))
    return Space(
        [
            ordinal("embed_dim", *widths),
            ordinal("n_layer", *depths),
            choice("bias", False, True),
            *layers,
        ]
    )


def codes_of(scale: str, found: dict[str, NDArray[Any]]) -> Codes:
    """Codes of the file's rows. Errors: `DataError` for a value that the space does not have."""
    widths, depths, heads, _ = SCALES[scale]
    n, deepest = len(found["embed_dim"]), max(depths)
    columns = [
        _index("embed_dim", found["embed_dim"], widths),
        _index("n_layer", found["n_layer"], depths),
        found["bias"].astype(np.int64),
    ]
    for name, options in (("n_head", heads), ("mlp_ratio", RATIOS)):
        lengths = np.array([len(row) for row in found[name]])
        if (lengths != found["n_layer"]).any():
            raise DataError(f"hw_gpt: {name} has a number a layer, in some row it has not")
        values = np.full((n, deepest), options[0], dtype=np.int64)
        values[np.arange(deepest) < lengths[:, None]] = np.concatenate(list(found[name]))
        columns += list(_index(name, values, options).T)
    return np.asfortranarray(np.stack(columns, axis=1).astype(space(scale).dtype))


def _index(name: str, values: NDArray[Any], options: tuple[int, ...]) -> NDArray[np.int64]:
    out = np.minimum(np.searchsorted(options, values), len(options) - 1)
    wrong = np.asarray(options)[out] != values
    if wrong.any():
        raise DataError(f"hw_gpt: {name} is one of {options}, got {values[wrong].ravel()[0]}")
    return np.asarray(out, dtype=np.int64)


def sizes(scale: str, codes: Codes) -> tuple[Array, Array, Array, Array, Array]:
    """Embedding size, layers, bias `(n,)`; heads and ratios `(n, layers)`, 0 beyond the depth."""
    widths, depths, heads, _ = SCALES[scale]
    at, deepest = np.asarray(codes, dtype=np.int64), max(depths)
    depth = np.take(depths, at[:, 1])
    on = np.arange(deepest) < depth[:, None]
    return (
        np.take(widths, at[:, 0]).astype(np.float64),
        depth.astype(np.float64),
        at[:, 2].astype(np.float64),
        np.where(on, np.take(heads, at[:, 3 : 3 + deepest]), 0).astype(np.float64),
        np.where(on, np.take(RATIOS, at[:, 3 + deepest :]), 0).astype(np.float64),
    )


def counts(scale: str, codes: Codes) -> tuple[Array, Array]:
    """Parameters and multiply-accumulates `(n,)`, as the file has them for every row.

    Heads have 64 channels whatever the embedding; the hidden layer is gated (three matrices); the
    products within attention are not counted in the file, and so not here.
    """
    width, depth, bias, heads, ratios = sizes(scale, codes)
    head, ratio = heads.sum(axis=1), ratios.sum(axis=1)
    weights = 3 * width**2 * ratio + 4 * _HEAD * width * head
    biases = bias * (2 * width * (depth + ratio) + 3 * _HEAD * head)
    tokens = SCALES[scale][3]
    return (
        _EMBEDDED * width + weights + 4 * width * depth + biases,
        tokens * (_VOCABULARY * width + weights),
    )


def encode(scale: str, codes: Codes) -> Array:
    """Features `(n, k)`: one-hot decisions, sums over the layers, logarithms of the counts."""
    width, depth, bias, heads, ratios = sizes(scale, codes)
    sums = np.stack([np.log(width), depth, bias, heads.sum(axis=1), ratios.sum(axis=1)], axis=1)
    params, macs = counts(scale, codes)
    hot = space(scale).one_hot(codes).astype(np.float64)
    return np.concatenate([hot, sums, np.log(params)[:, None], np.log(macs)[:, None]], axis=1)


def regressors(scale: str, codes: Codes) -> Array:
    """Features of the surrogate `(n, k)`: one linear model for each embedding size.

    In each: depth, bias, sums over the layers with their squares and products, and the options of
    every layer.
    """
    widths, depths, options, _ = SCALES[scale]
    width, depth, bias, heads, ratios = sizes(scale, codes)
    head, ratio = heads.sum(axis=1), ratios.sum(axis=1)
    deep = [(depth == d).astype(np.float64) for d in depths[1:]]
    pooled = [*deep, bias, head, ratio, ratio**2, head**2, ratio * head, bias * ratio]
    pooled += [d * other for d in deep for other in (bias, ratio)]
    each = []
    for values, levels in ((heads, options), (ratios, RATIOS)):
        levelled = [(values == level).astype(np.float64) for level in levels]
        pooled += [part.sum(axis=1) for part in levelled]
        each += levelled[1:]
    flat = np.concatenate([np.stack([np.ones_like(width), *pooled], axis=1), *each], axis=1)
    return np.concatenate([flat * (width == w)[:, None] for w in widths], axis=1)
