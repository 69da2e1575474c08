"""Laws that every space keeps: `check_space(space)` raises `AssertionError` with the one broken."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import Candidate, Real, Space

Codes = NDArray[Any]
_ROWS = 64
_LISTED = 20_000


def check_space(space: Space, seed: int = 0) -> None:
    """Asserts the laws of a space on rows drawn from it; the space must have a valid candidate."""
    rng = np.random.default_rng(seed)
    codes = space.sample(_ROWS, rng)
    check_shape(space, codes)
    check_canonical(space, codes, rng)
    check_varied(space, codes, rng)
    check_border(space, codes)
    check_keys(space, np.concatenate([codes, space.mutate(codes, rng), codes]))
    check_json(space, seed)
    check_features(space, codes)
    check_neighbours(space, codes[0])
    check_listing(space)


def _law(holds: object, law: str, *values: Any) -> None:
    if not holds:
        raise AssertionError(f"{law}; got {', '.join(repr(v) for v in values)}")


def check_shape(space: Space, codes: Codes) -> None:
    """Rows have a column a decision, the space's dtype, and are valid and canonical."""
    d = len(space.decisions)
    _law(codes.shape == (_ROWS, d), f"sample({_ROWS}) has shape ({_ROWS}, {d})", codes.shape)
    _law(len(space) == len(space.names) == d, "len(space) counts the decisions", len(space))
    _law(codes.dtype == space.dtype, "sample has the space's dtype", codes.dtype, space.dtype)
    real = any(isinstance(x, Real) for x in space.decisions)
    _law((space.dtype.kind == "f") == real, "dtype is float only with a real decision", space.dtype)
    _law(len(space.sample(0, np.random.default_rng(0))) == 0, "sample(0) is empty")
    for name, decision in zip(space.names, space.decisions, strict=True):
        _law(name in space and space[name] is decision, "space[name] is the decision", name)
    for last in (False, True):
        corner = space.corner(last)
        _law(corner.shape == (1, d), "corner is one row", corner.shape)
        _canonical(space, corner, "corner")


def check_canonical(space: Space, codes: Codes, rng: np.random.Generator) -> None:
    """canonical is idempotent, keeps active columns, and does not change what a row means."""
    _good(space, codes, "sample")
    mixed = np.array(codes)
    for j in range(len(space)):
        # every column from some other row: active ones may be anything in range
        mixed[:, j] = rng.permutation(codes[:, j])
    once = space.canonical(mixed)
    on = space.active(once)
    _law(np.array_equal(space.canonical(once), once), "canonical is idempotent")
    _law(np.array_equal(space.active(mixed), on), "canonical keeps what is active")
    _law(np.array_equal(once[on], mixed[on]), "canonical keeps active columns")
    _law(np.array_equal(space.valid(mixed), space.valid(once)), "canonical keeps what is valid")
    _law(space.decode(mixed) == space.decode(once), "canonical keeps the candidate")
    first = np.array([x.low if isinstance(x, Real) else 0 for x in space.decisions])
    blank = np.broadcast_to(first, once.shape)
    _law(np.array_equal(once[~on], blank[~on]), "inactive columns are at their first code")


def check_varied(space: Space, codes: Codes, rng: np.random.Generator) -> None:
    """mutate, cross and repair give valid canonical rows and leave their input alone."""
    before = codes.copy()
    other = space.sample(len(codes), rng)
    for rate in (None, 0.0, 0.3, 1.0):
        _good(space, space.mutate(codes, rng, rate), f"mutate(rate={rate})")
    _law(np.array_equal(space.mutate(codes, rng, 0.0), codes), "mutate with rate 0 changes nothing")
    _good(space, space.cross(codes, other, rng), "cross")
    _law(np.array_equal(space.cross(codes, codes, rng), codes), "cross with itself changes nothing")
    _law(np.array_equal(space.repair(codes, rng), codes), "repair leaves valid rows as they are")
    mixed = np.array(codes)
    for j in range(len(space)):
        mixed[:, j] = rng.permutation(codes[:, j])
    _good(space, space.repair(mixed, rng), "repair")
    _law(np.array_equal(codes, before), "operations leave their input alone")
    first, second = np.random.default_rng(7), np.random.default_rng(7)
    again = (
        space.mutate(space.sample(8, first), first),
        space.mutate(space.sample(8, second), second),
    )
    _law(np.array_equal(again[0], again[1]), "the same generator gives the same rows")


def check_border(space: Space, codes: Codes) -> None:
    """decode and encode are inverse; candidates hold the active decisions and go through JSON."""
    candidates = space.decode(codes)
    _law(np.array_equal(space.encode(candidates), codes), "encode(decode(codes)) is codes")
    for candidate, on in zip(candidates, space.active(codes), strict=True):
        names = {n for n, a in zip(space.names, on, strict=True) if a}
        _law(set(candidate) == names, "a candidate holds the active decisions", candidate, names)
        _law(
            space.candidate(candidate) == candidate, "space.candidate keeps a candidate", candidate
        )
        back = Candidate.from_json(json.loads(json.dumps(candidate.to_json())))
        same = back == candidate and back.id == candidate.id and hash(back) == hash(candidate)
        _law(same, "a candidate goes through JSON", candidate, back)
        _law(len(candidate.id) == 12, "a candidate's id has 12 digits", candidate.id)


def check_keys(space: Space, codes: Codes) -> None:
    """Equal rows, equal keys and equal candidates are the same thing; unique keeps the first."""
    rows = [tuple(row) for row in codes.tolist()]
    keys, candidates = space.keys(codes).tolist(), space.decode(codes)
    _law(len(keys) == len(rows), "a key a row", len(keys))
    kinds = len(set(rows))
    _law(
        len(set(zip(rows, keys, strict=True))) == len(set(keys)) == kinds,
        "equal rows <-> equal keys",
    )
    pairs = len(set(zip(rows, candidates, strict=True)))
    _law(pairs == len(set(candidates)) == kinds, "equal rows <-> equal candidates")
    first = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())
    _law(space.unique(codes).tolist() == first, "unique gives the first of each kind", first)


def check_json(space: Space, seed: int) -> None:
    """JSON both ways gives an equal space: the same fingerprint and the same rows."""
    back = Space.from_json(json.loads(json.dumps(space.to_json(), sort_keys=True)))
    same = back.fingerprint == space.fingerprint and back == space and hash(back) == hash(space)
    _law(same, "JSON keeps the fingerprint", space.fingerprint, back.fingerprint)
    _law(len(space.fingerprint) == 16, "a fingerprint has 16 digits", space.fingerprint)
    a, b = (s.sample(16, np.random.default_rng(seed)) for s in (space, back))
    _law(np.array_equal(a, b), "JSON keeps what is sampled")


def check_features(space: Space, codes: Codes) -> None:
    """one_hot has a named column each, 0..1, and tells rows apart; distance is a distance."""
    features = space.one_hot(codes)
    names = space.one_hot_names
    _law(
        features.shape == (len(codes), len(names)), "one_hot is (n, k)", features.shape, len(names)
    )
    _law(features.dtype == np.float32, "one_hot is float32", features.dtype)
    _law(len(set(names)) == len(names), "one_hot_names differ", names)
    _law(bool(((features >= 0) & (features <= 1)).all()), "one_hot is within 0..1")
    gap = space.distance(codes, codes)
    _law(gap.shape == (len(codes), len(codes)), "distance is (n, m)", gap.shape)
    _law(bool(((gap >= 0) & (gap <= 1 + 1e-12)).all()), "distance is within 0..1", gap.max())
    _law(np.array_equal(gap, gap.T), "distance is symmetric")
    equal = (codes[:, None, :] == codes[None, :, :]).all(-1)
    _law(np.array_equal(gap == 0, equal), "distance is 0 for equal rows, and only for them")


def check_neighbours(space: Space, row: Codes) -> None:
    """Neighbours are valid, canonical, all different, and one active decision away."""
    near = space.neighbours(row)
    _law(near.ndim == 2 and near.shape[1] == len(space), "neighbours are rows", near.shape)
    _good(space, near, "neighbours")
    _law(len(space.unique(near)) == len(near), "neighbours are all different")
    here = space.active(row[None])[0]
    for other in near:
        both = here & space.active(other[None])[0]
        apart = int((row != other)[both].sum())
        _law(apart == 1, "a neighbour differs in one active decision", row.tolist(), other.tolist())


def check_listing(space: Space) -> None:
    """A space that can be listed is listed once each; without constraints, `size` rows of it."""
    if math.isinf(space.size):
        _law(any(isinstance(d, Real) for d in space.decisions), "only a real decision is endless")
        return
    _law(isinstance(space.size, int) and space.size >= 1, "size is a whole number", space.size)
    if space.size > _LISTED:
        return
    rows = space.enumerate(_LISTED)
    _good(space, rows, "enumerate")
    _law(len(space.unique(rows)) == len(rows), "enumerate lists each candidate once")
    exact = not space.constraints
    fits = len(rows) == space.size if exact else 1 <= len(rows) <= space.size
    _law(fits, "enumerate agrees with size", len(rows), space.size)
    listed = [tuple(r) for r in rows.tolist()]
    _law(listed == sorted(listed), "enumerate is in lexicographic order")


def _canonical(space: Space, codes: Codes, what: str) -> None:
    _law(np.array_equal(space.canonical(codes), codes), f"{what} gives canonical rows", codes)


def _good(space: Space, codes: Codes, what: str) -> None:
    _law(codes.dtype == space.dtype, f"{what} gives the space's dtype", codes.dtype)
    ok = space.valid(codes)
    _law(ok.shape == (len(codes),), "valid tells one thing a row", ok.shape)
    _law(bool(ok.all()), f"{what} gives valid rows", codes[~ok][:1].tolist())
    _canonical(space, codes, what)
