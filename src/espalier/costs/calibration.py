"""Calibration: measures a family's pieces and a few whole networks on a runtime."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs import machine
from espalier.costs.context import Stopwatch
from espalier.costs.filler import Filler, choose
from espalier.costs.pieces import Piece, Pieces
from espalier.costs.runtime import BusyMachine, OnnxRuntime
from espalier.costs.table import Table

Array = NDArray[np.float64]
Codes = NDArray[Any]
_LEAST, _FEW = 24, 3  # pieces, and networks of each kind, measured however little time there is
_LOOKS, _SHORTEST = 3, 0.05  # timings a piece; seconds of one, at least
_TRIED, _SHORT = 6, 2.0  # after so many pieces: times what there is time for, and looks are brief
_PIECES = 0.7  # of the time, for pieces
_CERTAIN = 0.005  # relative deviations below are squared, as by least squares

Progress = Callable[[int, int, str], None]


class Calibration:
    """One run of it.

    `limit`: pieces measured at most. `fit`, `held_out`: whole networks. `seconds`: when they are spent,
    no more pieces are measured, and fewer networks.
    """

    def __init__(
        self,
        pieces: Pieces,
        runtime: OnnxRuntime,
        seed: int = 0,
        progress: Progress | None = None,
        *,
        limit: int = 250,
        fit: int = 10,
        held_out: int = 12,
        seconds: float = math.inf,
    ) -> None:
        self._pieces, self._runtime = pieces, runtime
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._limit, self._fit, self._held = limit, fit, held_out
        self._pieces_end = time.perf_counter() + _PIECES * seconds
        self._progress = progress or (lambda done, total, text: None)

    def run(self) -> Table:
        """Everything, in the order: pieces, whole networks to fit, whole networks held out."""
        begin, clocks = time.perf_counter(), machine.snapshot()
        self._progress(0, 1, "listing the pieces of the family")
        rows = self._survey()
        met = self._met(rows)
        chosen = self._stratified(met)
        total = len(chosen) + self._fit + self._held
        quick = self._quickened(len(chosen))
        self._watch = Stopwatch(quick)
        times = self._measure_pieces(chosen, total)
        work = np.array([met[key].work for key in times])
        filler, tried = "", dict[str, float]()
        if len(times) < len(met):
            filler, tried = choose(work, np.array(list(times.values())), self._seed)
        sums = Sums(self._pieces, times, {k: met[k].work for k in times}, filler)
        fit_rows, held_rows = self._networks(rows, sums)
        fit_ms = self._measure_networks(fit_rows, len(chosen), total)
        held_ms = self._measure_networks(held_rows, len(chosen) + len(fit_rows), total)
        empty = self._watch.empty_ms
        # all was timed at one pace: now it is turned into the best one met
        best = 1 / self._watch.pace.best
        times = {key: ms * best for key, ms in times.items()}
        sums = Sums(self._pieces, times, {k: met[k].work for k in times}, filler)
        fit_ms, held_ms, empty = fit_ms * best, held_ms * best, empty * best
        overhead, scale = _line(sums(fit_rows), fit_ms)
        error = self._error(held_rows, overhead + scale * sums(held_rows), held_ms)
        error |= {"overhead_ms": overhead, "scale": scale, "empty_ms": empty}
        error |= {"units": len(met), "units_measured": len(times)}
        error |= {"filler": filler, "filler_errors": tried, "fitted_on": len(fit_rows)}
        error |= {"look_seconds": quick.seconds}
        error |= self._disturbance(clocks) | {"seconds": time.perf_counter() - begin}
        entries = {k: {"ms": ms, "work": list(met[k].work)} for k, ms in times.items()}
        about = self._runtime.about()
        return Table(
            about, self._pieces.space.fingerprint, entries, empty, overhead, scale, filler, error
        )

    # --- what to measure -----------------------------------------------------------------------

    def _quickened(self, pieces: int) -> OnnxRuntime:
        """The runtime with shorter looks, where there is no time for long ones at so many pieces: many
        pieces that are known roughly tell more of a network than a few that are known well."""
        left = self._pieces_end - time.perf_counter()
        look = max(left / max(_LOOKS * pieces, 1), _SHORTEST)
        return replace(self._runtime, seconds=min(self._runtime.seconds, look))

    def _survey(self) -> Codes:
        space = self._pieces.space
        rows = space.sample(self._pieces.survey, self._rng)
        rows = np.concatenate([space.corner(False), space.corner(True), rows])
        rows = rows[space.valid(rows)]
        return rows[space.unique(rows)]

    def _met(self, rows: Codes) -> dict[str, Piece]:
        return {p.key: p for part in self._pieces.parts(rows) for p in part.pieces}

    def _stratified(self, met: dict[str, Piece]) -> list[Piece]:
        """All pieces, or as many as the limit allows: the same number of each unit, at random."""
        order = [list(met.values())[i] for i in self._rng.permutation(len(met))]
        turn: dict[str, int] = {}
        ranked = []
        for piece in order:
            turn[piece.unit] = turn.get(piece.unit, 0) + 1
            ranked.append((turn[piece.unit], piece))
        taken = sorted(range(len(ranked)), key=lambda i: ranked[i][0])[: self._limit]
        # the first of every unit, the second of every unit: no unit falls into one disturbance whole,
        # and where time runs out there are some of each
        return [ranked[i][1] for i in taken]

    def _networks(self, rows: Codes, sums: Sums) -> tuple[Codes, Codes]:
        """Rows to fit on, spread evenly from small to large, and random rows held out."""
        space = self._pieces.space
        late = time.perf_counter() > self._pieces_end
        count, fit = (_FEW, _FEW) if late else (self._held, self._fit)
        pool = rows[self._rng.permutation(len(rows))[:400]]
        held, rest = pool[:count], pool[count:]
        ends = np.concatenate([space.corner(False), space.corner(True)])
        rest = np.concatenate([rest, ends[space.valid(ends)]])
        keys = {row.tobytes() for row in np.ascontiguousarray(held)}
        rest = rest[[row.tobytes() not in keys for row in np.ascontiguousarray(rest)]]
        if len(rest) == 0:  # a space so small that everything is held out
            rest = held
        order = np.argsort(sums(rest), kind="stable")
        even = np.unique(np.linspace(0, len(order) - 1, fit).round().astype(int))
        return rest[order[even]], held

    # --- measuring -----------------------------------------------------------------------------

    def _measure_pieces(self, chosen: list[Piece], total: int) -> dict[str, float]:
        found = {}
        began = time.perf_counter()
        for done, piece in enumerate(chosen):
            now = time.perf_counter()
            if done >= _LEAST and now > self._pieces_end:
                break
            if done >= _TRIED and (now - began) / done * len(chosen) > _SHORT * (
                self._pieces_end - began
            ):
                self._watch.brief = True
            if done % 25 == 0:
                self._progress(done, total, "measuring pieces")
            found[piece.key] = self._watch.piece(*self._pieces.make(piece))
        return found

    def _measure_networks(self, rows: Codes, done: int, total: int) -> Array:
        found = []
        for i, candidate in enumerate(self._pieces.space.decode(rows)):
            self._progress(done + i, total, "measuring whole networks")
            x = self._pieces.family.example(1)
            found.append(self._watch.whole(self._pieces.network(candidate), x))
        self._progress(done + len(rows), total, "measuring whole networks")
        return np.array(found)

    # --- how good it is --------------------------------------------------------------------------

    def _error(self, rows: Codes, predicted: Array, measured: Array) -> dict[str, Any]:
        from scipy.stats import spearmanr

        varied = len(rows) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
        off = np.abs(predicted / measured - 1)
        pairs = zip(self._pieces.space.decode(rows), predicted, measured, strict=True)
        return {
            "spearman": float(spearmanr(predicted, measured).statistic) if varied else None,
            "within_10_percent": float(np.mean(off <= 0.1)),
            "median_error": float(np.median(off)),
            "held_out": [
                {"candidate": c.to_json(), "predicted": float(p), "measured": float(m)}
                for c, p, m in pairs
            ],
        }

    def _disturbance(self, start: machine.Snapshot) -> dict[str, Any]:
        load = machine.load_between(start, machine.snapshot())
        reason = self._runtime.disturbed(load)
        if reason and self._runtime.strict:
            raise BusyMachine(
                f"the machine is too busy to calibrate: {reason}; stop other work and try again, "
                "or allow it with strict=False"
            )
        return {
            "load": load,
            "busy": bool(reason),
            "reason": reason,
            "repeated": self._watch.repeated,
            "corrected": self._watch.pace.corrected,
        }


def _line(sums: Array, measured: Array) -> tuple[float, float]:
    """Overhead (0 or more) and scale that fit best: least relative deviations, so that a network
    whose timing was disturbed does not bend the line."""
    from scipy.optimize import nnls

    if np.ptp(sums) <= 1e-9 * max(float(np.max(sums)), 1e-12):  # one point: no slope to be seen
        return max(float(np.median(measured - sums)), 0.0), 1.0
    columns = np.column_stack([np.ones(len(sums)), sums]) / measured[:, None]
    weights = np.ones(len(sums))
    for _ in range(30):  # deviations as squares, weighted anew until nothing changes
        found = nnls(columns * weights[:, None], weights)[0]
        weights = 1 / np.sqrt(np.maximum(np.abs(columns @ found - 1), _CERTAIN))
    overhead, scale = found
    return float(overhead), float(scale)


class Sums:
    """Sums of the times of networks' pieces: measured, or filled in by the regression `filler`
    (where all pieces met had been measured it is '', and chosen should another one turn up)."""

    def __init__(
        self,
        pieces: Pieces,
        times: dict[str, float],
        work: dict[str, tuple[float, ...]],
        filler: str,
    ) -> None:
        self._pieces = pieces
        self._known = dict(times)
        measured = np.array([work[key] for key in times]), np.array(list(times.values()))
        self._fill = Filler(filler, *measured)

    def __call__(self, codes: Codes) -> Array:
        """Milliseconds `(n,)` of code rows `(n, d)`."""
        total = np.zeros(len(codes))
        for part in self._pieces.parts(codes):
            total += part.values(np.array([self.of(p) for p in part.pieces], dtype=float))
        return total

    def of(self, piece: Piece) -> float:
        """Milliseconds of one piece."""
        if piece.key not in self._known:
            self._known[piece.key] = self._fill(piece.work)
        return self._known[piece.key]
