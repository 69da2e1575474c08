"""What recipes on the cache of keys and values share: the subject, its texts, what is read of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from espalier.compress.language.evaluate import MakeCache, Score, scored
from espalier.recipes._parts import language, looking


@dataclass(frozen=True)
class Texts:
    """Windows for calibration and windows that are read, held-out source and tables to look up."""

    calibration: Tensor
    held: Tensor
    tables: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Subject:
    """One of two byte models, and how much of its texts is read: draws, length, windows.

    "bytes" has six blocks and reads source and tables (which it has not learned to look up);
    "looking" is smaller and has learned to go on with strings that stood far before. `steps` of
    training and `sizes` are others in a smoke run.
    """

    name: str
    draws: int = 5
    length: int = 512
    calibration: int = 16
    held: int = 24
    tables: int = 16
    steps: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Steps that the model is trained for."""
        return self.steps or (language.STEPS if self.name == "bytes" else looking.STEPS)

    def model(self, out: Path | None) -> Any:
        """The model, the same for every seed."""
        if self.name == "bytes":
            return language.byte_model("dense", 0, self.trained, out, **self.sizes)
        return looking.looking_model(out, self.trained, 0, **self.sizes)

    def asked(self, draw: int, length: int) -> tuple[Tensor, Tensor]:
        """Windows whose marked tokens only what stands far before tells."""
        make = language.lookups if self.name == "bytes" else looking.copies
        return make(self.tables, draw, length)

    def texts(self, draw: int, length: int = 0, short: int = 0) -> Texts:
        """Windows of a draw; calibration ones of `short` tokens where that is given."""
        size = length or self.length
        return Texts(
            language.windows("train", self.calibration, draw, short or size),
            language.windows("fresh", self.held, draw, size),
            *self.asked(1000 + draw, size),
        )


_TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
SMALL = (Subject("looking", 1, 64, 2, 2, 2, 5, {**_TINY, "head_dim": 8}),)
BOTH = (Subject("bytes", 1), Subject("looking", 5))
MANY = (Subject("bytes", 5, 512, 64, 128, 64), Subject("looking", 5, 512, 64, 128, 64))


def judged(
    subjects: tuple[Subject, ...], one: Callable[[Subject, Any, int], dict[str, Any]], out: Path | None,
    seed: int, verdict: Callable[[Subject, list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Every draw of every subject, and the verdicts: the check holds where all do."""
    found: dict[str, Any] = {}
    for subject in subjects:
        model = subject.model(out)
        draws = [one(subject, model, subject.draws * seed + i) for i in range(subject.draws)]
        found[subject.name] = {"length": subject.length, "draws": draws}
        found[subject.name]["check"] = verdict(subject, draws)
    checks = {name: row["check"] for name, row in found.items()}
    holds = all(check["holds"] for check in checks.values())
    return {"subjects": found, "check": {**checks, "holds": holds}}


def read(
    model: Any, texts: Texts, cache: MakeCache | None = None, chunk: int = 0
) -> dict[str, float]:
    """Bits a byte of held-out source; loss (nats) and share right of the answers; bytes of one
    window's cache at its peak."""
    text: Score = scored(model, texts.held, cache, chunk)
    table = scored(model, texts.tables, cache, chunk, where=texts.answers)
    return {
        "bits_per_byte": text.loss / math.log(2),
        "answer_loss": table.loss,
        "answers_right": table.right,
        "cache_bytes": max(text.peak, table.peak),
    }


def wins(rows: list[dict[str, Any]], better: str, worse: str, key: str) -> int:
    """In how many draws one is below the other."""
    return sum(row[better][key] < row[worse][key] for row in rows)


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean over draws of every number of every way."""
    return {
        way: {
            key: sum(row[way][key] for row in rows) / len(rows)
            for key, value in rows[0][way].items()
            if isinstance(value, (int, float))
        }
        for way in rows[0]
    }
