"""What a race has run, on disk: a line a run, so that a race that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.bench.trace import Trace
from espalier.errors import StudyError

if TYPE_CHECKING:
    from espalier.bench.table import Table

NAME = "runs.jsonl"
_FORMAT = 1
Key = tuple[str, int]


def fingerprint(table: Table) -> str:
    """16 hex digits of a table's candidates and numbers."""
    digest = hashlib.sha256(table.space.fingerprint.encode())
    digest.update(np.ascontiguousarray(table.codes).tobytes())
    for name in sorted(table.columns):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(table.columns[name], dtype=float).tobytes())
    return digest.hexdigest()[:16]


class Record:
    """The finished runs of a race in `folder/runs.jsonl`; in memory only without a folder.

    The first line is what the race is about; `entrants` says of each name what runs under it.
    Errors: `StudyError` where the folder holds another race, or another strategy of one of these
    names, or can't be written. A last line that was cut off by a kill is dropped, and so is run
    again.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        folder: Path | None = None,
        entrants: Mapping[str, str] | None = None,
    ) -> None:
        self.about = {"format": _FORMAT, **about}
        self.entrants = dict(entrants or {})
        self.path = None if folder is None else folder / NAME
        self.done: dict[Key, Trace] = {}
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.exists() else ""
        except OSError as error:
            raise StudyError(f"can't use {path.parent}: {error.strerror or error}") from error
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if whole:
            self._check(path, whole[0])
        for number, line in enumerate(whole[1:], 2):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise StudyError(f"line {number} of {path} is damaged: delete that line") from None
            here = self.entrants.get(row["strategy"])
            there = row.get("entrant", here)
            if here is not None and there != here:
                raise StudyError(
                    f"{path.parent} holds runs of {row['strategy']!r} as {there}, now it is {here}: "
                    "give it another name, or name another folder with --out"
                )
            self.done[(row["strategy"], row["seed"])] = _trace(row)
        if "".join(whole) != text or not whole:
            kept = whole or [json.dumps(self.about) + "\n"]
            path.write_text("".join(kept))

    def _check(self, path: Path, first: str) -> None:
        try:
            there = json.loads(first)
        except json.JSONDecodeError:
            raise StudyError(f"{path} is no record of a race: name another folder") from None
        for key in dict.fromkeys([*self.about, *there]):
            if there.get(key) != self.about.get(key):
                raise StudyError(
                    f"{path.parent} holds a race with {key}={there.get(key)!r}, this one has "
                    f"{self.about.get(key)!r}: name another folder with --out"
                )

    def add(self, key: Key, trace: Trace) -> None:
        """Keeps a finished run."""
        self.done[key] = trace
        if self.path is None:
            return
        row: dict[str, Any] = {"strategy": key[0], "seed": key[1], **trace.to_json()}
        if key[0] in self.entrants:
            row["entrant"] = self.entrants[key[0]]
        if (trace.rows < 0).any():  # predicted by the table: no row to look the values up in
            row["values"] = trace.values.tolist()
            row["violations"] = trace.violations.tolist()
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise StudyError(f"can't write {self.path}: {reason}; what is there stays") from error


def _trace(row: Mapping[str, Any]) -> Trace:
    rows = np.array(row["rows"], dtype=np.int64)
    values = np.array(row.get("values", np.zeros((len(rows), 0))), dtype=float)
    violations = np.array(row.get("violations", np.zeros(len(rows))), dtype=float)
    return Trace(rows, values, violations, np.array(row["times"], dtype=float), row["overhead"])
