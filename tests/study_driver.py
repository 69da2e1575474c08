"""A driver that the kill test starts: makes or resumes a study, searches, prints the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import study_toys as toys
from espalier.study import Study


def main(folder: Path, workers: int) -> None:
    """Goes on with what is in the folder, to the end."""
    if (folder / "ledger.sqlite").exists():
        study = Study.resume(folder, toys.IDENTITY)
    else:
        study = Study.create(folder, toys.IDENTITY)
    with study:
        work = toys.Logged(folder.with_suffix(".search"))
        table = study.once("table", lambda: [1, 2, 3])
        trials = toys.search(study, work, workers=workers)
        work = toys.Logged(folder.with_suffix(".final"))
        finals = study.map("final", toys.candidates(4), work, executor=toys.executor(workers))
    found = {
        "table": table,
        "search": toys.result(trials),
        "final": toys.result(finals),
        "front": toys.front_of(trials),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
