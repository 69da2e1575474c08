"""What a worker process does: evaluate what it is sent, and end when its driver is gone.

The pipe carries pickles between processes that the driver itself started; nothing from disk.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

from espalier.study.executor import call
from espalier.study.threads import limit_torch

_WATCH_SECONDS = 0.5

# Whether this process is a worker that is still loading the driver's main script.
loading_main = False


def serve(handle: int, driver: int) -> None:
    """Evaluates candidates read from a pipe until it closes."""
    # Ctrl-C is for the driver: it ends its workers and says how to go on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(handle, False)
    threading.Thread(target=_watch, args=(driver,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(handle)
    with suppress(EOFError, OSError):  # the driver closed the pipe or is gone
        _work(pipe)
    # no clean-up of libraries: the driver waits, and there is nothing to keep
    os._exit(0)


def _watch(driver: int) -> None:
    """Ends this process soon after its driver died, whatever it computes."""
    while os.getppid() == driver:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _work(pipe: Connection[Any, Any]) -> None:
    try:
        evaluate = _load(pipe.recv())
        limit_torch()
    except (EOFError, OSError):
        raise
    except BaseException:
        pipe.send(("broken", traceback.format_exc()))
        return
    pipe.send(("ready", ""))
    while True:
        candidate = pipe.recv()
        limit_torch()
        started = time.perf_counter()
        readings, error = None, ""
        try:
            readings = call(evaluate, candidate)
        except Exception:
            error = traceback.format_exc()
        pipe.send(("result", (readings, error, time.perf_counter() - started)))


def _load(message: dict[str, Any]) -> Any:
    """Unpickles `evaluate`; first loads the driver's script where it is defined there."""
    global loading_main
    if message["main"]:
        loading_main = True
        try:
            spawn.prepare(message["main"])
        finally:
            loading_main = False
    return pickle.loads(message["evaluate"])
