"""What every peer's script does: answers each message on standard input with rows to evaluate.

Messages are lines of JSON. {"begin": {"counts", "kinds", "objectives", "seed", "method"}} starts a run
over decisions with so many options each ("categorical" or "ordinal"); {"tell": [[values], ...]} gives
the values, minimised, of the rows asked last. The answer is {"ask": [[codes], ...]}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class Run(Protocol):
    """One run of a peer."""

    def ask(self) -> list[list[int]]: ...

    def tell(self, values: list[list[float]]) -> None: ...


def loaded(name: str, path: Path) -> Any:
    """A module out of a file of a checkout, without the packages around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Again(Exception):
    """A new run begins in the middle of one."""


def serve_inside(run: Callable[[dict[str, Any], Callable[[list[int]], float]], None]) -> None:
    """As `serve`, for searches that ask from within their own loop.

    `run(begin, ask)` searches for as long as it can; `ask(row)` gives one value, minimised.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin: dict[str, Any] = {}

    def heard() -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(row: list[int]) -> float:
        nonlocal begin
        answers.write(json.dumps({"ask": [[int(c) for c in row]]}) + "\n")
        answers.flush()
        message = heard()
        if "begin" in message:
            begin = message["begin"]
            raise Again
        return float(message["tell"][0][0])

    begin = heard()["begin"]
    while True:
        with suppress(Again):
            run(begin, ask)


def serve(begin: Callable[..., Run]) -> None:
    """Runs until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        if "begin" in message:
            run = begin(**message["begin"])
        else:
            run.tell(message["tell"])
        answers.write(json.dumps({"ask": [[int(c) for c in row] for row in run.ask()]}) + "\n")
        answers.flush()
