"""`espalier shrink` of a folder of a language model: what it refuses, and the two ways it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from espalier.cli.printing import print_explained, print_found, print_json
from espalier.errors import EspalierError


def refuse(
    weights: Path | None,
    solver: str,
    text: Path | None,
    explain: bool,
    task: str = "digits",
    device: str = "cpu",
    batch: int = 1,
    tune: bool = True,
) -> None:
    """Options that a language model has no use for, and what it can't do without.

    Errors: `EspalierError`.
    """
    if weights is not None:
        raise EspalierError("a folder of a language model has its own weights: leave out --weights")
    if solver != "auto":
        raise EspalierError(
            f"a language model is solved by allocation and evolution: leave out --solver {solver}"
        )
    if not tune:
        raise EspalierError("--no-tune is for a task's models: a language model has --no-repair")
    if task != "digits":
        raise EspalierError(f"what a language model is for is --text FILE: leave out --task {task}")
    if device != "cpu":
        raise EspalierError(
            f"a language model is read and timed on the processor: leave out --device {device}"
        )
    if batch != 1:
        raise EspalierError(
            f"times of a language model are those of one sequence: leave out --batch {batch}"
        )
    if text is None and not explain:
        raise EspalierError(
            "a language model needs --text FILE, a text like what it is for: harm and repair are "
            "read on it (a BERT or ViT that classifies needs --task instead)"
        )


def in_memory(
    model: str, text: Path | None, explain: bool, as_json: bool, quiet: bool, **asked: Any
) -> None:
    """The whole job, or what it could decide; printed."""
    from espalier.flows.language.shrink import explain_language, shrink_language
    from espalier.flows.progress import display
    from espalier.problem import SearchBudget

    if explain:
        rows = explain_language(model, asked["within"], asked["decisions"], asked["grouped"])
        print_json(rows) if as_json else print_explained(rows)
        return
    assert text is not None
    spend = SearchBudget.parse(asked.pop("budget"))
    show = display(spend.seconds, quiet or as_json)
    found = shrink_language(model, text, budget=spend, progress=show, **asked)
    page = found.publish()
    if as_json:
        print_json(found.to_json())
    else:
        print_found(found.to_json(), page, "shrunk")


def refuse_in_layers(given: dict[str, Any], out: Path | None) -> None:
    """Options that going layer by layer has no use for. Errors: `EspalierError`."""
    for name in (name for name, value in given.items() if value):
        raise EspalierError(
            f"with --memory blocks, units and heads are decided, layer by layer: leave out {name}"
        )
    if out is None:
        raise EspalierError("with --memory the smaller model needs a folder to go to: --out DIR")


def in_layers(
    model: str, text: Path | None, memory: str, as_json: bool, quiet: bool, **asked: Any
) -> None:
    """One layer in memory at a time; printed."""
    from espalier.flows.language.shrink_in_layers import shrink_in_layers
    from espalier.flows.progress import display
    from espalier.problem import quantity

    assert text is not None
    _, size, share = quantity(memory, "memory_bytes")
    if share:
        raise EspalierError(f"--memory is a size, like 4GB, got {memory!r}")
    show = display(None, quiet or as_json)
    found = shrink_in_layers(model, text, memory=int(size), progress=show, **asked)
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
