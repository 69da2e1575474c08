"""The latency table: what was measured when a predictor was calibrated, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from espalier.costs.work import FEATURES
from espalier.errors import DataError

_VERSION = 3  # in 2 rounding was another operator, so pieces in integers had other fingerprints
_INTEGER = [FEATURES.index(name) for name in ("integer_macs_16", "integer_elements")]


@dataclass(frozen=True)
class Table:
    """One calibration on one machine.

    - `runtime`: what `OnnxRuntime.about` said.
    - `space`: fingerprint of the family's space.
    - `pieces`: a piece's fingerprint to the milliseconds that it adds to a network, and its work.
    - `empty_ms`: a run of a model that does nothing.
    - `overhead_ms`, `scale`: a network takes `overhead_ms + scale * sum of its pieces`.
    - `filler`: the regression for pieces that were not measured; '' where all were.
    - `error`: how well held-out networks are predicted, and how the calibration went.
    """

    runtime: dict[str, Any]
    space: str
    pieces: dict[str, dict[str, Any]]
    empty_ms: float
    overhead_ms: float
    scale: float
    filler: str
    error: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON."""
        return {"format": "espalier latency table", "version": _VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """The table that `to_json` wrote. Errors: `DataError` for anything else."""
        version = data.get("version")
        if data.get("format") != "espalier latency table" or version not in (2, _VERSION):
            raise DataError(
                f"not a latency table of version {_VERSION}: give what calibrate() returned"
            )
        if version == 2 and any(p["work"][i] for p in data["pieces"].values() for i in _INTEGER):
            raise DataError(
                "a latency table with integers from an earlier version: calibrate again"
            )
        try:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
        except KeyError as missing:
            raise DataError(f"the latency table lacks {missing}: calibrate again") from None

    def check(self, runtime: Mapping[str, Any], space: str) -> None:
        """Refuses a table of another space or of a runtime set otherwise. Errors: `DataError`."""
        if self.space != space:
            raise DataError(
                f"the latency table is of another space ({self.space}, this one is {space}): "
                "calibrate again"
            )
        for name in ("runtime", "device", "threads", "batch"):
            if self.runtime.get(name) != runtime.get(name):
                raise DataError(
                    f"the latency table was measured with {name}={self.runtime.get(name)!r}, the "
                    f"runtime has {name}={runtime.get(name)!r}: calibrate again"
                )
