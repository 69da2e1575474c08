"""The record of a study: one SQLite file, written by one process, safe against being killed.

Every change is one transaction. The journal is a write-ahead log with `synchronous=NORMAL`: a
commit is handed to the operating system but not forced to the disk. A process killed at any
instant loses nothing that was committed, because the system still writes it; only a power failure
can lose the last transactions, and even then the file stays sound and the lost trials run again.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import StudyError
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study.executor import Outcome
from espalier.study.schema import APPLICATION, TABLES, VERSION, inspect
from espalier.study.trial import Trial

_BUSY_SECONDS = 5.0
_COLUMNS = (
    "id, phase, position, candidate, state, metrics, violation, seconds, attempts, error, "
    "worker, started, finished"
)


@dataclass(frozen=True)
class Ask:
    """What a strategy proposed at once, and the strategy's state right after.

    Codes `(n, d)` are lists, `violations` those of the prices (above 0: refused, no trial),
    `refused` their summary. `id` is 0 until it is read from a ledger.
    """

    codes: list[list[float]]
    violations: list[float]
    refused: dict[str, Any]
    state: dict[str, Any]
    id: int = 0


@dataclass(frozen=True)
class NewTrial:
    """A trial that is to be made: a candidate and its prices."""

    candidate: Candidate
    metrics: dict[str, Reading]
    violation: float = 0.0


class Ledger:
    """An open ledger. Errors of the disk, the lock or the file become `StudyError`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._db = connection

    # --- opening -------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, meta: dict[str, Any]) -> Ledger:
        """A new ledger. It appears whole or not at all: it is made beside and then renamed."""
        draft = path.with_name(path.name + ".new")
        with _one_line(path):
            draft.unlink(missing_ok=True)
            db = _connect(draft, "rwc")
            try:
                db.executescript(
                    f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"
                    f"BEGIN; {TABLES}"
                )
                rows = [(key, _dump(value)) for key, value in meta.items()]
                db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                db.execute("COMMIT")
            finally:
                db.close()
            os.replace(draft, path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, writable: bool = True) -> Ledger:
        """An existing ledger; it is looked at before SQLite may touch it, and checked for damage."""
        inspect(path)
        with _one_line(path):
            db = _connect(path, "rw" if writable else "ro")
            try:
                damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if damage != "ok":
                    raise sqlite3.DatabaseError(f"*** {damage}")
                if writable:
                    db.execute("PRAGMA journal_mode=WAL")
                    db.execute("PRAGMA synchronous=NORMAL")
                    db.execute("BEGIN IMMEDIATE")  # a file that can't be written is told now
                    db.execute("COMMIT")
            except BaseException:
                db.close()
                raise
        return cls(path, db, writable)

    def close(self) -> None:
        """Closes the file. The driver leaves one file without a log: it can be copied as it is, and
        read where nothing can be written."""
        with suppress(sqlite3.Error):
            if self.writable:
                self._db.execute("PRAGMA busy_timeout=0")  # a reader keeps the log: so be it
                self._db.execute("PRAGMA journal_mode=DELETE")
        with suppress(sqlite3.Error):
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is recorded, or nothing."""
        if not self.writable:
            raise StudyError(f"the study in {self.path.parent} was opened for reading only")
        with _one_line(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: Any) -> list[Any]:
        with _one_line(self.path):
            return self._db.execute(query, values).fetchall()

    # --- names and values ----------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """Everything known about the study as a whole."""
        return {k: json.loads(v) for k, v in self._all("SELECT key, value FROM meta")}

    def set_meta(self, key: str, value: Any) -> None:
        """Records or replaces one entry."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, _dump(value)))

    def recorded(self, key: str) -> tuple[Any] | None:
        """What was recorded once under a key, in a tuple; None when nothing was."""
        rows = self._all("SELECT value FROM once WHERE key = ?", key)
        return (json.loads(rows[0][0]),) if rows else None

    def recorded_all(self) -> dict[str, Any]:
        """Everything that was recorded once, by its key."""
        rows = self._all("SELECT key, value FROM once ORDER BY rowid")
        return {key: json.loads(value) for key, value in rows}

    def record(self, key: str, value: Any) -> Any:
        """Records a value under a key, once; gives it as it will be read."""
        text = _dump(value)
        with self._change() as db:
            db.execute("INSERT INTO once VALUES (?, ?, ?)", (key, text, time.time()))
        return json.loads(text)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Records that something happened now."""
        with self._change() as db:
            db.execute(
                "INSERT INTO events (time, kind, data) VALUES (?, ?, ?)",
                (time.time(), kind, _dump(data)),
            )

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened, in order."""
        rows = self._all("SELECT time, kind, data FROM events ORDER BY id")
        return [{"time": at, "kind": kind, **json.loads(data)} for at, kind, data in rows]

    # --- asks ----------------------------------------------------------------------------------

    def last_ask(self, phase: str) -> Ask | None:
        """The newest ask of a phase."""
        rows = self._all(
            "SELECT codes, violations, refused, state, id FROM asks WHERE phase = ? "
            "ORDER BY number DESC LIMIT 1",
            phase,
        )
        if not rows:
            return None
        codes, violations, refused, state = (json.loads(text) for text in rows[0][:4])
        return Ask(codes, violations, refused, state, rows[0][4])

    def add_ask(
        self, phase: str, strategy: str, ask: Ask, trials: Sequence[NewTrial]
    ) -> list[Trial]:
        """Records an ask, the strategy after it, and its trials, in one transaction."""
        with self._change() as db:
            number = db.execute(
                "SELECT COALESCE(MAX(number) + 1, 0) FROM asks WHERE phase = ?", (phase,)
            ).fetchone()[0]
            # only the newest has one; by its number it is found without reading the others
            last = (phase, number - 1)
            db.execute("UPDATE asks SET state = NULL WHERE phase = ? AND number = ?", last)
            fields = [_dump(x) for x in (ask.codes, ask.violations, ask.refused, ask.state)]
            key = db.execute(
                "INSERT INTO asks (phase, number, strategy, codes, violations, refused, state, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (phase, number, strategy, *fields, time.time()),
            ).lastrowid
            return _insert(db, phase, key, trials)

    def idle_asks(self, phase: str) -> int:
        """How many of the newest asks of a phase made no trial."""
        rows = self._all(
            "SELECT COUNT(*) FROM asks WHERE phase = ? AND id > COALESCE("
            "(SELECT MAX(ask) FROM trials WHERE phase = ?), 0)",
            phase,
            phase,
        )
        return int(rows[0][0])

    def refused(self, phase: str) -> list[dict[str, Any]]:
        """The summary of what was refused, an entry an ask."""
        rows = self._all("SELECT refused FROM asks WHERE phase = ? ORDER BY number", phase)
        return [json.loads(text) for (text,) in rows]

    # --- trials --------------------------------------------------------------------------------

    def add_trials(self, phase: str, ask: int | None, trials: Sequence[NewTrial]) -> list[Trial]:
        """Makes trials, all or none."""
        if not trials:
            return []
        with self._change() as db:
            return _insert(db, phase, ask, trials)

    def start(self, trial: int, lease: str) -> None:
        """A trial is handed to a worker."""
        with self._change() as db:
            db.execute(
                "UPDATE trials SET state = 'running', attempts = attempts + 1, lease = ?, "
                "started = ? WHERE id = ?",
                (lease, time.time(), trial),
            )

    def finish(
        self,
        trial: int,
        metrics: dict[str, Reading],
        violation: float,
        error: str,
        outcome: Outcome,
    ) -> Trial:
        """A trial ended: done, or failed where there is an error."""
        values = (outcome.seconds, outcome.attempts - 1, outcome.worker, time.time(), trial)
        with self._change() as db:
            db.execute(
                "UPDATE trials SET state = ?, metrics = ?, violation = ?, error = ?, seconds = ?, "
                "attempts = attempts + ?, worker = ?, lease = '', finished = ? WHERE id = ?",
                ("failed" if error else "done", _readings(metrics), violation, error, *values),
            )
            query = f"SELECT {_COLUMNS} FROM trials WHERE id = ?"
            return _trial(db.execute(query, (trial,)).fetchone())

    def release(self, phase: str) -> None:
        """Trials that were running wait again: their worker is gone."""
        with self._change() as db:
            db.execute(
                "UPDATE trials SET state = 'waiting', lease = '' "
                "WHERE phase = ? AND state = 'running'",
                (phase,),
            )

    def again(self, phase: str, ask: int | None) -> None:
        """Failed trials of an ask wait again."""
        with self._change() as db:
            db.execute(
                "UPDATE trials SET state = 'waiting', error = '' "
                "WHERE phase = ? AND ask IS ? AND state = 'failed'",
                (phase, ask),
            )

    def stop(self, phase: str, reason: str) -> None:
        """Decides that a phase ends here: trials that did not start are withdrawn."""
        with self._change() as db:
            db.execute("DELETE FROM trials WHERE phase = ? AND state = 'waiting'", (phase,))
            row = (f"stop/{phase}", _dump({"reason": reason, "time": time.time()}))
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", row)

    def trials(self, phase: str | None = None) -> list[Trial]:
        """The trials of a phase, or all, in the order they were made."""
        if phase is None:
            return [_trial(row) for row in self._all(f"SELECT {_COLUMNS} FROM trials ORDER BY id")]
        rows = self._all(f"SELECT {_COLUMNS} FROM trials WHERE phase = ? ORDER BY position", phase)
        return [_trial(row) for row in rows]


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = path.resolve().as_uri()
    # a folder that can't be written has no room for the log's index: read the file alone
    alone = mode == "ro" and not path.with_name(path.name + "-wal").exists()
    alone = alone and not os.access(path.parent, os.W_OK)
    return sqlite3.connect(
        f"{uri}?mode={mode}" + ("&immutable=1" if alone else ""),
        uri=True,
        isolation_level=None,
        timeout=_BUSY_SECONDS,
        check_same_thread=False,
    )


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What SQLite or the system says about a file, as one clear line."""
    try:
        yield
    except sqlite3.Error as error:
        raise StudyError(_explain(path, error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space" if full else "check the folder's permissions"
        raise StudyError(f"{path} can't be written: {reason}; {hint} and resume") from error


def _explain(path: Path, error: sqlite3.Error) -> str:
    text = " ".join(str(error).split())
    if "readonly" in text or "unable to open" in text:
        return f"{path} can't be written ({text}): make the file and its folder writable and resume"
    if "locked" in text:
        return f"{path} is locked by another program ({text}): close that and resume"
    if "full" in text or "disk I/O" in text:
        return (
            f"{path} can't be written ({text}): free some space and resume; "
            "what was recorded is kept"
        )
    if "malformed" in text or "not a database" in text or "corrupt" in text or "***" in text:
        return f"{path} is damaged ({text[:120]}); nothing was changed: restore it from a copy"
    return f"{path} can't be used: {text}"


def _insert(
    db: sqlite3.Connection, phase: str, ask: int | None, trials: Sequence[NewTrial]
) -> list[Trial]:
    query = "SELECT COALESCE(MAX(position) + 1, 0) FROM trials WHERE phase = ?"
    first = db.execute(query, (phase,)).fetchone()[0]
    rows = [
        (phase, first + i, ask, candidate_key(t.candidate), _readings(t.metrics), t.violation)
        for i, t in enumerate(trials)
    ]
    db.executemany(
        "INSERT INTO trials (phase, position, ask, candidate, state, metrics, violation) "
        "VALUES (?, ?, ?, ?, 'waiting', ?, ?)",
        rows,
    )
    made = f"SELECT {_COLUMNS} FROM trials WHERE phase = ? AND position >= ? ORDER BY position"
    return [_trial(row) for row in db.execute(made, (phase, first))]


def candidate_key(candidate: Candidate) -> str:
    """A candidate as the ledger stores it: the same text for equal candidates."""
    return json.dumps(candidate.to_json(), sort_keys=True, separators=(",", ":"))


def _readings(metrics: dict[str, Reading]) -> str:
    return _dump({name: reading.to_json() for name, reading in metrics.items()})


def _trial(row: Any) -> Trial:
    key, phase, position, candidate, state, metrics, *rest = row
    readings = {k: Reading.from_json(v) for k, v in json.loads(metrics).items()}
    made = Candidate.from_json(json.loads(candidate))
    return Trial(key, phase, position, made, state, readings, *rest)


def _dump(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """NumPy and torch numbers as plain ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"what a study records must be JSON, got a {type(value).__name__}")
