"""The tables of a ledger, and what tells a ledger from any other file without opening it."""

from __future__ import annotations

from pathlib import Path

from espalier.errors import StudyError

NAME = "ledger.sqlite"
VERSION = 1
APPLICATION = 0x45535041  # "ESPA", in the header of every ledger

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE asks (
    id INTEGER PRIMARY KEY,
    phase TEXT NOT NULL,
    number INTEGER NOT NULL,     -- counts within the phase
    strategy TEXT NOT NULL,
    codes TEXT NOT NULL,         -- every row that was asked, as JSON
    violations TEXT NOT NULL,    -- of the prices; above 0: refused, no trial
    refused TEXT NOT NULL,       -- how many were refused, by which limit
    state TEXT,                  -- the strategy after this ask; kept for the newest only
    created REAL NOT NULL,
    UNIQUE (phase, number)
);
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    phase TEXT NOT NULL,
    position INTEGER NOT NULL,
    ask INTEGER REFERENCES asks (id),
    candidate TEXT NOT NULL,
    state TEXT NOT NULL,         -- waiting, running, done, failed
    metrics TEXT NOT NULL,       -- prices first, all readings when done
    violation REAL NOT NULL,
    seconds REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    worker TEXT NOT NULL DEFAULT '',
    lease TEXT NOT NULL DEFAULT '',
    started REAL,
    finished REAL,
    UNIQUE (phase, position),
    UNIQUE (phase, candidate)
);
CREATE TABLE once (key TEXT PRIMARY KEY, value TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL,
                     data TEXT NOT NULL);
"""


def inspect(path: Path) -> None:
    """Refuses a file that is not a ledger, or a newer one. Reads its header; changes nothing.

    (SQLite database file format, section 1.3: user version at byte 60, application id at 68.)
    """
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        raise StudyError(f"{path.parent} holds no study: there is no {path.name} in it") from None
    except OSError as error:
        raise StudyError(f"{path} can't be read: {error.strerror or error}") from error
    number = int.from_bytes(header[68:72], "big")
    if len(header) < 100 or header[:16] != b"SQLite format 3\0" or number != APPLICATION:
        raise StudyError(
            f"{path} is not a study of Espalier (a foreign or damaged file); nothing was changed: "
            "choose another folder, or move the file away"
        )
    version = int.from_bytes(header[60:64], "big")
    if version > VERSION:
        raise StudyError(
            f"{path} was written by a newer Espalier (ledger version {version}, this one reads "
            f"{VERSION}); nothing was changed: upgrade espalier"
        )
