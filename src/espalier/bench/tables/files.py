"""The files that tables are read from: where they are looked for, and whether they are the ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError, MissingExtra

UNVERIFIED = "ESPALIER_UNVERIFIED"


@dataclass(frozen=True)
class Source:
    """One published file: its folder and name under ESPALIER_DATA, its SHA-256, where it is from."""

    folder: str
    name: str
    sha256: str
    published: str

    def path(self) -> Path:
        """Where it is. Errors: `DataError` says what to put where."""
        root = os.environ.get("ESPALIER_DATA", "")
        wanted = f"{self.folder}/{self.name} ({self.published})"
        if not root:
            raise DataError(f"set ESPALIER_DATA to a folder that holds {wanted}")
        path = Path(root).expanduser() / self.folder / self.name
        if not path.is_file():
            raise DataError(
                f"no file {str(path)!r}: the folder of ESPALIER_DATA must hold {wanted}"
            )
        return path

    def columns(self) -> tuple[str, ...]:
        """The names of a Parquet file's columns. Errors: as `read`."""
        parquet = _parquet()
        path = self.path()
        verify(path, self.sha256, self.published)
        try:
            return tuple(parquet.read_schema(path).names)
        except Exception as error:  # pyarrow raises its own kinds
            raise DataError(f"can't read {str(path)!r} as a Parquet table: {error}") from error

    def read(self, columns: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Some columns of a Parquet file; a column of lists is an array of arrays.

        Errors: `DataError` for an absent file, another checksum, or a column that is missing;
        `MissingExtra` without pyarrow.
        """
        wanted, present = list(columns), self.columns()
        path = self.path()
        missing = [name for name in wanted if name not in present]
        if missing:
            raise DataError(
                f"{str(path)!r} lacks the columns {', '.join(missing)}; it has "
                f"{', '.join(present[:8])}{', ...' if len(present) > 8 else ''}"
            )
        table = _parquet().read_table(path, columns=wanted)
        return {n: np.asarray(table.column(n).to_numpy(zero_copy_only=False)) for n in wanted}


@cache
def checksum(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file; `size` and `changed` say when it must be read again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(path: Path, sha256: str, published: str) -> None:
    """Refuses a file that is not the one expected. Errors: `DataError`.

    With ESPALIER_UNVERIFIED=1 any file will do: for one that the user has made.
    """
    if os.environ.get(UNVERIFIED) == "1":
        return
    about = path.stat()
    found = checksum(path, about.st_size, about.st_mtime_ns)
    if found != sha256:
        raise DataError(
            f"{str(path)!r} is damaged or another version: its SHA-256 is {found[:16]}..., expected "
            f"{sha256[:16]}.... Fetch it again ({published}), or set {UNVERIFIED}=1 to take a file "
            f"of the same columns that you made"
        )


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "tables") from error
    return parquet
