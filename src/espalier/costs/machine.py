"""How busy the machine is with other work: what decides whether a timing can be trusted."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Snapshot:
    """Seconds since some start: wall, used by all cores together, used by this process."""

    wall: float
    total: float
    own: float


def snapshot() -> Snapshot:
    """The clocks now. The system's tick in steps of about 10 ms: compare over 100 ms or more."""
    used = psutil.cpu_times()
    total = sum(used) - used.idle - getattr(used, "iowait", 0.0)
    # Linux counts guests within user time already
    total -= getattr(used, "guest", 0.0) + getattr(used, "guest_nice", 0.0)
    own = os.times()
    return Snapshot(time.perf_counter(), total, own.user + own.system)


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
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
