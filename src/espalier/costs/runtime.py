"""Latency as measured in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, nn

from espalier.costs import machine
from espalier.costs.session import bind, make_inputs, open_session, provider
from espalier.costs.timing import Timing, clock
from espalier.errors import EspalierError
from espalier.export import to_onnx

# Beyond these a timing is flagged: what an idle machine never shows.
_SPREAD, _STOLEN = 0.05, 0.05


class BusyMachine(EspalierError):
    """A timing was refused because other work disturbed it."""


@dataclass(frozen=True)
class OnnxRuntime:
    """Where and how latency is measured.

    - `device`: "cpu", or another that this build of onnxruntime runs on ("cuda", "coreml" ...).
    - `threads`: threads inside an operator; operators run one after the other.
    - `batch`: inputs a run.
    - `precision`: runs are repeated until the 95% interval of the median is this narrow,
      relative to the median ...
    - `seconds`: ... or for this long.
    - `spinning`: whether waiting threads spin (matters with several threads: faster on idle
      cores, ruinous on shared ones).
    - `strict`: a busy machine is an error (`BusyMachine`) instead of a flag.
    """

    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    precision: float = 0.02
    seconds: float = 1.0
    spinning: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        provider(self.device)
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EspalierError(f"{name} must be a whole number from 1, got {value!r}")
        for name in ("precision", "seconds"):
            if not getattr(self, name) > 0:
                raise EspalierError(f"{name} must be above 0, got {getattr(self, name)!r}")

    @property
    def name(self) -> str:
        """The runtime in words, for texts."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"ONNX Runtime {ort.__version__} on {self.device}, {threads}, batch {self.batch}"

    def about(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON."""
        return {
            "name": self.name,
            "runtime": "onnxruntime",
            "version": ort.__version__,
            "device": self.device,
            "provider": provider(self.device),
            "threads": self.threads,
            "batch": self.batch,
            "spinning": self.spinning,
            "execution": "sequential, inputs and outputs bound in host memory",
            "precision": self.precision,
            "seconds": self.seconds,
            "processor": machine.processor(),
            "cores": machine.cores(),
        }

    def measure(
        self, model: bytes | str | Path | nn.Module, example: Tensor | None = None
    ) -> Timing:
        """Times one run of a network or of an ONNX model (bytes or path).

        A network needs `example` `(b, ...)`, whose first input is repeated to the runtime's
        batch; a model's inputs are made up where no example is given. The machine is watched for
        0.1 s before and during the runs. Errors: `ExportError`, `DataError` for what can't be
        exported, loaded or run; `BusyMachine` when strict.
        """
        if isinstance(model, nn.Module):
            if example is None:
                raise EspalierError("measuring a network needs an example input: measure(net, x)")
            example = self.batched(example)
            if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
                model = copy.deepcopy(model).cpu()  # where it is exported; the caller's stays
            model = to_onnx(model, example, fast=True)
        load = machine.load_now()
        start = machine.snapshot()
        timing = self.quick(model, example, least_seconds=min(0.05, self.seconds))
        end = machine.snapshot()
        if end.wall - start.wall > 0.1:
            load = max(load, machine.load_between(start, end))
        return self._judged(replace(timing, load=load))

    def quick(
        self, model: bytes | str | Path, example: Tensor | None = None, least_seconds: float = 0.0
    ) -> Timing:
        """`measure` without watching the machine: for timing hundreds of pieces in a row."""
        return self.look(self.opened(model, example), least_seconds)

    def opened(
        self, model: bytes | str | Path, example: Tensor | None = None
    ) -> Callable[[], object]:
        """A model with its inputs, ready to run again and again."""
        session = open_session(model, self.device, self.threads, self.spinning)
        array = None if example is None else example.detach().cpu().contiguous().numpy()
        return bind(session, make_inputs(session, self.batch, array))

    def look(self, run: Callable[[], object], least_seconds: float = 0.0) -> Timing:
        """Times what is `opened`."""
        return clock(
            run, precision=self.precision, seconds=self.seconds, least_seconds=least_seconds
        )

    def batched(self, example: Tensor) -> Tensor:
        """The example with the runtime's batch; zeros become noise, as data is never all zero."""
        x = example[:1].detach().cpu()
        if x.is_floating_point() and not x.any():
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        return x.repeat(self.batch, *[1] * (x.dim() - 1)).contiguous()

    def disturbed(self, load: float, spread: float = 0.0, stolen: float = 0.0) -> str:
        """Why timings taken under this load can't be trusted, or '' where they can."""
        cores, reasons = machine.cores(), []
        if cores - load < min(self.threads, cores) - 0.1:
            reasons.append(f"other processes use {load:.1f} of {cores} cores")
        if spread > _SPREAD:
            reasons.append(f"the median is only known within {spread:.0%}")
        # with one thread the process must have run all the time; with more, threads wait
        if self.device == "cpu" and self.threads == 1 and stolen > _STOLEN:
            reasons.append(f"the process did not run for {stolen:.0%} of the time")
        return "; ".join(reasons)

    def _judged(self, timing: Timing) -> Timing:
        reason = self.disturbed(timing.load, timing.spread, timing.stolen)
        if reason and self.strict:
            raise BusyMachine(
                f"the machine is too busy to measure: {reason}; stop other work and measure again, "
                "or allow it with strict=False"
            )
        return replace(timing, busy=bool(reason), reason=reason)
