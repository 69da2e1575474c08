"""A network as files that need no Espalier: written, loaded back, compared, described."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import ExportError, unknown
from espalier.export import check, disk
from espalier.export.card import card as to_card
from espalier.export.card import how_to_load
from espalier.export.modes import frozen
from espalier.export.onnx import program_to_onnx, to_onnx
from espalier.export.program import Program, program_to_pt2, to_program
from espalier.export.quantisers import carries
from espalier.export.weights import to_safetensors

FORMATS = ("onnx", "pt2", "safetensors")


@dataclass(frozen=True)
class Exported:
    """What was written. `files`: format (and "card") to path. `differences`: format to the largest
    difference from torch over random and real inputs, relative to the largest output (or to 1)."""

    files: dict[str, Path]
    differences: dict[str, float]


def export(
    network: nn.Module,
    example: Tensor,
    folder: str | Path,
    stem: str = "network",
    formats: Iterable[str] = FORMATS,
    inputs: Tensor | None = None,
    card: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes `stem.onnx`, `stem.pt2`, `stem.safetensors` and the card `stem.json` into `folder`.

    `example` is one input `(b, ...)`, `inputs` real ones `(n, ...)`, `card` plain JSON for the
    card: candidate, classes, normalisation (mean and std). Every file is loaded back and compared
    with the network on random and on the real inputs; nothing appears in the folder unless all
    agree within 1e-4. The network is left as it was. One with quantised layers gives an ONNX file of
    integers, whose outputs may be off by 10% (root mean square) where sums fall between two levels.

    Errors: `ExportError` for an unknown format, a network that can't be exported or computes NaN,
    a file that computes something else, a folder that can't be written or is full.
    """
    wanted = tuple(dict.fromkeys(formats))
    for name in wanted:
        if name not in FORMATS:
            raise ExportError(unknown("export format", name, FORMATS))
    twin, example = frozen(network), example.detach().cpu()
    output = _output(twin, example)
    program = to_program(twin, example) if {"onnx", "pt2"} & set(wanted) else None
    dynamic = program.dynamic if program else True
    folder = Path(folder)
    with disk.staging(folder) as stage:
        paths = {
            name: _write(name, twin, example, program, stage / f"{stem}.{name}") for name in wanted
        }
        found = {n: _compared(n, p, twin, example, inputs, dynamic) for n, p in paths.items()}
        files = {n: _entry(n, p, found[n], example) for n, p in paths.items()}
        disk.write(stage / f"{stem}.json", to_card(example, output, dynamic, files, card or {}))
        disk.settle(stage, folder)
    places = {name: folder / path.name for name, path in paths.items()}
    return Exported(
        {**places, "card": folder / f"{stem}.json"},
        {name: max(gaps.values()) for name, gaps in found.items()},
    )


def _output(network: nn.Module, example: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            output = network(example)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ExportError(
            f"the network does not run on an example of shape {tuple(example.shape)}: {first}"
        ) from error
    if not isinstance(output, Tensor):
        raise ExportError(
            f"a network must return one tensor, got {type(output).__name__}: wrap it in a module "
            "that returns the part that is wanted"
        )
    return output


def _write(
    form: str, network: nn.Module, example: Tensor, program: Program | None, path: Path
) -> Path:
    if form == "safetensors":
        return disk.write(path, to_safetensors(network))
    assert program is not None
    if form == "pt2":
        return disk.write(path, program_to_pt2(program))
    whole = carries(network)
    return disk.write(path, to_onnx(network, example) if whole else program_to_onnx(program))


def _compared(
    form: str,
    path: Path,
    network: nn.Module,
    example: Tensor,
    inputs: Tensor | None,
    dynamic: bool,
) -> dict[str, float]:
    """The largest differences on random and on real inputs, by their name."""
    whole = form == "onnx" and carries(network)
    compare, allowed = (
        (check.deviation, check.INTEGERS) if whole else (check.difference, check.TOLERANCE)
    )
    with _running(form):
        if form == "onnx":
            forward = check.open_onnx(path)
        elif form == "pt2":
            forward = check.open_pt2(path)
        else:
            forward = check.open_safetensors(path, network)
        sets = {"random": check.trials(example, dynamic)}
        if inputs is not None:
            sets["real"] = check.chunks(inputs, example, dynamic)
        gaps = {name: compare(forward, network, batches) for name, batches in sets.items()}
    for name, gap in gaps.items():
        if not gap <= allowed:
            raise ExportError(
                f"the {form} file computes something else than the network: on {name} inputs they "
                f"differ by {gap:.2g}, at most {allowed:g} is allowed; nothing was written"
            )
    return gaps


@contextmanager
def _running(form: str) -> Iterator[None]:
    """What goes wrong while a written file is read back and run is an `ExportError`."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the {form} file does not run as the network does: {first}; nothing was written"
        ) from error


def _entry(form: str, path: Path, gaps: Mapping[str, float], example: Tensor) -> dict[str, Any]:
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "difference": dict(gaps),
        "load": how_to_load(form, path.name, example.dtype),
    }
