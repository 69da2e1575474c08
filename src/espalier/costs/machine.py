"""How busy the machine is with other work: what decides whether a timing can be trusted."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Snapshot:
    """Seconds since some start: wall, used on all cores that are ours, used by this process."""

    wall: float
    total: float
    own: float


def snapshot() -> Snapshot:
    """The clocks now. The system's tick in steps of about 10 ms: compare over 100 ms or more."""
    own = os.times()
    each = psutil.cpu_times(percpu=True)
    # what runs on cores that we may not use does not disturb us
    ours = _allowed() or range(len(each))
    total = sum(_used(each[i]) for i in ours if i < len(each))
    return Snapshot(time.perf_counter(), total, own.user + own.system)


def _used(core: Any) -> float:
    """Seconds that a core was not idle. Linux counts guests within user time already."""
    idle = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(core) - sum(getattr(core, name, 0.0) for name in idle))


def _allowed() -> set[int]:
    """The cores that this process may use; empty where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def load_between(start: Snapshot, end: Snapshot) -> float:
    """Cores that other processes kept busy on average from `start` to `end`."""
    wall = max(end.wall - start.wall, 1e-9)
    return max(0.0, (end.total - start.total - (end.own - start.own)) / wall)


def load_now(seconds: float = 0.1) -> float:
    """Cores that other processes keep busy, watched for `seconds` in which this one sleeps."""
    start = snapshot()
    time.sleep(seconds)
    return load_between(start, snapshot())


def cores() -> int:
    """Cores that this process may use."""
    return len(_allowed()) or os.cpu_count() or 1


def processor() -> str:
    """The processor's name; of boards that do not tell it, the board's."""
    told = _read("/proc/cpuinfo").splitlines()
    named = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
    found = [*named[:1], _read("/proc/device-tree/model").strip("\0\n "), _brand()]
    return next(filter(None, found), platform.processor() or platform.machine())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _brand() -> str:
    """What macOS calls the processor: all of one maker have the same machine type."""
    if platform.system() != "Darwin":
        return ""
    try:
        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
