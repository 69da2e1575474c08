"""What every peer's script does: answers each message on standard input with rows to evaluate.

Messages are lines of JSON. {"begin": {"counts", "kinds", "objectives", "seed", "method"}} starts a run
over decisions with so many options each ("categorical" or "ordinal"); {"tell": [[values], ...]} gives
the values, minimised, of the rows asked last. The answer is {"ask": [[codes], ...]}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Run(Protocol):
    """One run of a peer."""

    def ask(self) -> list[list[int]]: ...

    def tell(self, values: list[list[float]]) -> None: ...


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
