"""What commands share: options, and what is read from their words."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.errors import EspalierError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the answer.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same study, on the same machine.")]
Device = Annotated[str, typer.Option(help="Where ONNX Runtime runs: cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that ONNX Runtime may use.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size that latency is measured at.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the study; a new one under runs/ if not given.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the study in --out.")]


@contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """A user's error is one line on standard error and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except EspalierError as error:
        print(f"espalier: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        if stop.args:
            hint = f" Go on with the same command, --out {stop.args[0]} and --resume."
        print(f"\nespalier: stopped; nothing finished is lost.{hint}", file=sys.stderr)
        raise typer.Exit(130) from None


def limits(texts: list[str]) -> dict[str, str]:
    """Limits by name. Errors: `BudgetError` for a word without a number, or a name given twice."""
    from espalier.errors import BudgetError

    within: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise BudgetError(
                f"--max reads NAME=VALUE, like latency_ms=0.3 or params=60k, got {text!r}"
            )
        if name in within:
            raise BudgetError(f"--max {name} is given twice: {within[name]} and {value}")
        within[name] = value
    return within


def runtime(device: str, threads: int, batch: int) -> Any:
    """ONNX Runtime as asked for."""
    from espalier.costs import OnnxRuntime

    return OnnxRuntime(device=device, threads=threads, batch=batch)


def loaded(text: str, defaults: bool = False) -> Any:
    """A name as it is, or the object that `file.py:name` points to: the user's own file.

    A function that takes nothing is called; with `defaults` one that needs nothing, too.
    """
    path, _, name = text.partition(":")
    if not path.endswith(".py"):
        return text
    import importlib.util

    if not Path(path).is_file():
        raise EspalierError(f"no file {path!r}: write my.py:name, a file and a name in it")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module
    sys.path.insert(0, str(Path(path).parent.resolve()))  # so that workers find the module too
    try:
        spec.loader.exec_module(module)
    except EspalierError:
        raise
    except Exception as error:
        raise EspalierError(f"{path} can't be loaded: it raised {_said(error)}") from error
    if not hasattr(module, name):
        raise EspalierError(f"{path!r} has no {name!r}: write my.py:name, a file and a name in it")
    made = getattr(module, name)
    try:
        return made() if callable(made) and _takes_nothing(made, defaults) else made
    except EspalierError:
        raise
    except Exception as error:
        raise EspalierError(f"{path}:{name} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    """The kind of an error and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _takes_nothing(made: Any, defaults: bool) -> bool:
    import inspect

    parameters = inspect.signature(made).parameters.values()
    return all(defaults and p.default is not p.empty for p in parameters)


def loaded_task(text: str) -> Any:
    """A task's name, or the task of the user's own file; the report tells the line that names it."""
    found = loaded(text, defaults=True)
    if isinstance(found, str):
        return found
    if isinstance(found, type) or not hasattr(found, "batches"):
        raise EspalierError(f"{text!r} must give a task, got {type(found).__name__}")
    found = copy.copy(found)  # the file's own object may be in use elsewhere
    found.text = text
    return found
