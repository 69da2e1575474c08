"""Architectures of NAS-Bench-Graph: which compute the same, their features and their graphs.

Two rows are of one kind when their trees of operators are the same but for the order of brothers
and the place of skips that do nothing. The rule is the benchmark's (Qin et al., 2022); that it
gives as many kinds as the benchmark has architectures, 26,206 and 2,021 on proteins, is a test.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.nets.graphs import Graphs
from espalier.space import Forbid, Space, choice

# the father of each of the four nodes; 0 is the input
LINKS = ("0000", "0001", "0011", "0012", "0013", "0111", "0112", "0122", "0123")
OPERATORS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
_PROTEINS = ("gcn", "sage", "arma", "fc", "skip")
_NODES = 4
Codes = NDArray[Any]
Array = NDArray[np.float64]
Tree = tuple[int, ...]  # the father of each node, 0 for the input, i + 1 for node i


def space(operators: tuple[str, ...] = OPERATORS) -> Space:
    """Which tree, and the operator of each node; four skips alone compute nothing."""
    nodes = [f"op{i}" for i in range(_NODES)]
    decisions = [choice("link", *LINKS), *(choice(name, *operators) for name in nodes)]
    return Space(decisions, [Forbid(dict.fromkeys(nodes, "skip"))])


SPACE, PROTEINS = space(), space(_PROTEINS)


def kinds(domain: Space, codes: Codes) -> NDArray[np.int64]:
    """A number for each row, equal for rows that compute the same.

    It is the tree after its skips were moved, in the numbering of nodes that makes it smallest.
    """
    skip = domain["op0"].options.index("skip")
    base = len(domain["op0"].options)
    operators = np.asarray(codes[:, 1:], dtype=np.int64)
    idle = operators == skip
    out = np.full(len(codes), np.iinfo(np.int64).max)
    for link, pattern in product(range(len(LINKS)), product((False, True), repeat=_NODES)):
        rows = np.flatnonzero((codes[:, 0] == link) & (idle == pattern).all(axis=1))
        if not len(rows):
            continue
        fathers = settled(tuple(int(c) for c in LINKS[link]), pattern)
        for order in permutations(range(_NODES)):
            place = {0: 0, **{node + 1: i + 1 for i, node in enumerate(order)}}
            moved = [place[fathers[node]] for node in order]
            if all(father <= i for i, father in enumerate(moved)):
                digits = operators[rows][:, order] @ (base ** np.arange(_NODES)[::-1])
                shape = int(np.dot(moved, 5 ** np.arange(_NODES)[::-1]))
                out[rows] = np.minimum(out[rows], shape * base**_NODES + digits)
    return out


def settled(fathers: Tree, idle: tuple[bool, ...]) -> Tree:
    """The tree with its skips in their place.

    A skip that something reads, that is alone under its father, or that gives the bare input to the
    output, changes nothing where it stands: it moves to the top, between the input and the rest.
    """
    tree = list(fathers)
    for node in (i for i in range(_NODES) if idle[i]):
        me, above = node + 1, tree[node]
        read = me in tree
        alone = not any(tree[i] == above for i in range(_NODES) if i != node)
        if read or alone or _bare(tree, idle, node):
            tree = [above if father == me else father for father in tree]
            tree = [me if father == 0 else father for father in tree]
            tree[node] = 0
    return tuple(tree)


def _bare(tree: list[int], idle: tuple[bool, ...], node: int) -> bool:
    """Whether only skips are between the input and what `node` gives."""
    me = node + 1
    while me:
        if not idle[me - 1]:
            return False
        me = tree[me - 1]
    return True


# --- features ------------------------------------------------------------------------------------


def encode(codes: Codes) -> Array:
    """Features `(n, 92)`: one-hot tree and operators; how many nodes of each operator there are,
    and at each depth, with skips in their place; depth and number of outputs."""
    return _encode(SPACE, codes)


def encode_proteins(codes: Codes) -> Array:
    """As `encode`, for the operators of proteins."""
    return _encode(PROTEINS, codes)


def _encode(domain: Space, codes: Codes) -> Array:
    operators, fathers = np.asarray(codes[:, 1:], dtype=np.int64), _fathers(domain, codes)
    depth = _depths(fathers)
    kinds_of = len(domain["op0"].options)
    at = np.zeros((len(codes), _NODES, kinds_of))
    for node in range(_NODES):
        at[np.arange(len(codes)), depth[:, node] - 1, operators[:, node]] += 1
    leaves = (fathers[:, None, :] != np.arange(1, _NODES + 1)[:, None]).all(axis=2).sum(axis=1)
    shape = np.stack([depth.max(axis=1), leaves], axis=1)
    hot = domain.one_hot(codes).astype(np.float64)
    return np.concatenate([hot, at.sum(axis=1), at.reshape(len(codes), -1), shape], axis=1)


def _depths(fathers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many nodes are on the way from the input to each, itself included."""
    rows = np.arange(len(fathers))[:, None]
    depth, here = np.zeros_like(fathers), np.tile(np.arange(1, _NODES + 1), (len(fathers), 1))
    for _ in range(_NODES):
        depth += here > 0
        here = np.where(here > 0, fathers[rows, here - 1], 0)
    return depth


def _fathers(domain: Space, codes: Codes) -> NDArray[np.int64]:
    """The settled tree of each row `(n, 4)`."""
    skip = domain["op0"].options.index("skip")
    idle = (np.asarray(codes[:, 1:]) == skip) @ (1 << np.arange(_NODES)[::-1])
    found: NDArray[np.int64] = _SETTLED[np.asarray(codes[:, 0], dtype=np.int64), idle]
    return found


_SETTLED = np.array(
    [
        [settled(tuple(int(c) for c in link), p) for p in product((False, True), repeat=_NODES)]
        for link in LINKS
    ]
)


def graphs(codes: Codes) -> Graphs:
    """Operator graphs: input, four operators with skips in their place, output."""
    return _graphs(SPACE, codes)


def graphs_proteins(codes: Codes) -> Graphs:
    """As `graphs`, for the operators of proteins."""
    return _graphs(PROTEINS, codes)


def _graphs(domain: Space, codes: Codes) -> Graphs:
    n, rows = len(codes), np.arange(len(codes))
    names = tuple(str(option) for option in domain["op0"].options)
    fathers = _fathers(domain, codes)
    # a father stands before its sons
    order = np.argsort(_depths(fathers), axis=1, kind="stable")
    place = np.zeros((n, _NODES + 1), dtype=np.int64)
    place[rows[:, None], order + 1] = np.arange(1, _NODES + 1)
    operators = np.full((n, _NODES + 2), 1, dtype=np.int64)
    adjacency = np.zeros((n, _NODES + 2, _NODES + 2), dtype=np.bool_)
    for node in range(_NODES):
        here = place[:, node + 1]
        operators[rows, here] = np.asarray(codes[:, node + 1], dtype=np.int64) + 2
        adjacency[rows, place[rows, fathers[:, node]], here] = True
    adjacency[:, 1:-1, -1] = ~adjacency[:, 1:-1].any(axis=2)
    operators[:, -1] = len(names) + 2
    return Graphs(operators, adjacency, ("", "input", *names, "output"))
