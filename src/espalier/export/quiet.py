"""Exporters talk much: silence them where they are called, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_TALKERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir", "torch.fx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back warnings, log lines and prints of torch's exporters while inside."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    # A log record is judged by the nearest logger that has a level of its own, so every named
    # descendant that set one would speak on: a filter at `disable` level is the sure way.
    before = logging.root.manager.disable
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        logging.disable(max(before, logging.ERROR))
        # torch.export prints the graph it failed on to stderr
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
