"""Memory that is watched: hidden states that go to disk when there are too many, and the peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file
from torch import Tensor

WORTHWHILE, MUCH = 1 << 20, 1 << 28


class Held:
    """Chunks of hidden states, in memory or in files of a folder; set one by one and read again."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._chunks: dict[int, Tensor] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self._count):
            yield self[index]

    def __getitem__(self, index: int) -> Tensor:
        if self._folder is None:
            return self._chunks[index]
        return load_file(self._file(index))["hidden"].clone()  # no page of the file stays

    def __setitem__(self, index: int, chunk: Tensor) -> None:
        self._count = max(self._count, index + 1)
        if self._folder is None:
            self._chunks[index] = chunk
        else:  # beside its place, because the old one may still be open
            save_file({"hidden": chunk.contiguous()}, self._file(index, "new"))
            self._file(index, "new").replace(self._file(index))

    def keep(self, folder: Path) -> None:
        """All chunks as they are now in a new folder: files that are there become theirs too, since
        a chunk that changes gets another file."""
        folder.mkdir(parents=True)
        for index in range(self._count):
            if self._folder is None:
                save_file({"hidden": self._chunks[index].contiguous()}, _named(folder, index))
                continue
            linked(self._file(index), _named(folder, index))

    def take(self, folder: Path) -> None:
        """Puts the chunks that `keep` left in a folder in the place of these."""
        for index in range(self._count):
            self[index] = load_file(_named(folder, index))["hidden"].clone()

    def _file(self, index: int, kind: str = "safetensors") -> Path:
        assert self._folder is not None
        return _named(self._folder, index, kind)


def linked(file: Path, place: Path) -> None:
    """A second name for a file that nobody writes into again; a copy, where disks know no such."""
    try:
        place.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, place)


def _named(folder: Path, index: int, kind: str = "safetensors") -> Path:
    return folder / f"hidden-{index:06d}.{kind}"


class Peak:
    """The most memory that this process holds while this is open: `now()` and `most()`, bytes.

    Resident memory, all of it: Python, libraries and pages of files too. Linux counts exactly;
    elsewhere a thread looks every 5 ms.
    """

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self._most, self._open = self.now(), True
        self._exact = _forget_peak()
        if not self._exact:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._most = self.most()
        self._open = False

    def now(self) -> int:
        """What it holds at the moment."""
        return int(self._process.memory_info().rss)

    def most(self) -> int:
        """The most so far; after closing, the most there was."""
        if self._open:
            self._most = max(self._most, self.now(), _peak() if self._exact else 0)
        return self._most

    def _watch(self) -> None:
        pause = threading.Event()
        while self._open:
            self._most = max(self._most, self.now())
            pause.wait(0.005)


def release(size: int) -> None:
    """Give `size` bytes that were freed back to the system, where its C library would keep them
    for later; little is not worth the time."""
    if size < WORTHWHILE:
        return
    gc.collect(2 if size > MUCH else 1)  # modules hold each other; looking at all objects is slow
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak() -> bool:
    """Start Linux's own count of this process's peak anew; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak() > 0
    except OSError:
        return False


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
