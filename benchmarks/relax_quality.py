"""The table of the differentiable searches on NAS-Bench-201, beside the figures published.

    python benchmarks/recipes.py darts pc-darts gdas rarts darts-pt sd-darts --scale cpu --seeds 5
    python benchmarks/relax_quality.py [--results benchmarks/results]

Reads recipe_<name>.json of those runs, prints a table in Markdown and writes relax_quality.json
beside them: mean and standard deviation over seeds of the test accuracies of the cells found, with
random search of the same time, and how often the search was ahead of it. A recipe that has no file
yet is named. The published figures are of searches with 25,000 to 50,000 images of 32x32 and 15
cells of 16 channels; ours are of the small task that each recipe's page names. Both are
looked up in the same table, of networks trained for 200 epochs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATASETS = ("cifar10", "cifar100")


@dataclass(frozen=True)
class Row:
    """A search: its name, the recipe that runs it and its name there, figures as published in %."""

    name: str
    recipe: str
    search: str
    published: tuple[float | None, float | None] = (None, None)


# As published for CIFAR-10 and CIFAR-100; DARTS-PT's are 100 less the errors that its paper gives.
ROWS = (
    Row("DARTS, first order", "darts", "darts", (54.30, 15.61)),
    Row("DARTS, second order", "darts", "darts-2nd", (54.30, 15.61)),
    Row("PC-DARTS", "pc-darts", "pc-darts", (93.41, 67.48)),
    Row("GDAS", "gdas", "gdas", (93.61, 70.70)),
    Row("RARTS", "rarts", "rarts"),
    Row("DARTS-PT", "darts-pt", "darts-pt", (88.11, None)),
    Row("DARTS-PT, frozen", "darts-pt", "darts-pt-frozen", (93.80, None)),
    Row("its supernets by magnitude", "darts-pt", "magnitude", (54.30, None)),
    Row("SD-DARTS", "sd-darts", "sd-darts"),
)
# not run here, or not a differentiable search: what they are measured against
OTHERS = (
    ("random search", 93.70, None),
    ("REINFORCE", 93.85, 71.71),
    ("regularised evolution", 93.92, 71.84),
    ("ENAS", 54.30, 15.61),
    ("SETN", 87.64, 59.05),
    ("SNAS", 92.77, 69.34),
    ("DrNAS", 94.36, 73.51),
    ("TE-NAS", 93.90, 71.24),
    ("RMI-NAS", 94.28, 73.36),
    ("the best cell of all", 94.37, 73.51),
)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of numbers, and the numbers."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0, "all": values}


def measured(row: Row, folder: Path, scale: str) -> dict[str, Any] | None:
    """What a recipe's file says of one search, None where there is no such file or search."""
    file = folder / f"recipe_{row.recipe.replace('-', '_')}.json"
    if not file.exists():
        return None
    data = json.loads(file.read_text())
    if data["scale"] != scale:
        return None
    checks = [run["check"] for run in data["runs"]]
    checks = [c for c in checks if c["test"].get(row.search) is not None]
    if not checks:
        return None
    tests = [c["test"] for c in checks]
    first = DATASETS[0]
    return {
        "seeds": len(checks),
        **{d: spread([t[row.search][d] for t in tests]) for d in DATASETS},
        "random_search": {d: spread([t["random search"][d] for t in tests]) for d in DATASETS},
        "one_random_cell": {d: mean(t["one random cell"][d] for t in tests) for d in DATASETS},
        "ahead_of_random_search": sum(
            t[row.search][first] > t["random search"][first] for t in tests
        ),
        "parameterless": spread([float(c["parameterless"][row.search]) for c in checks]),
        "seconds": spread([c["seconds"][row.search] for c in checks]),
    }


def shown(value: dict[str, Any]) -> str:
    """Mean and spread in a cell of the table."""
    return f"{value['mean']:.2f} ± {value['sd']:.2f}"


def figure(value: float | None) -> str:
    """A published figure in a cell of the table."""
    return "" if value is None else f"{value:.2f}"


def lines(found: dict[str, dict[str, Any] | None]) -> list[str]:
    """The table in Markdown."""
    out = [
        "| search | published C10 / C100 | C10 here | C100 here | random search, same time "
        "(C10) | ahead of it | edges without parameters | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        one = found[row.name]
        published = " / ".join(figure(v) for v in row.published).strip(" /")
        if one is None:
            out.append(f"| {row.name} | {published} | not run | | | | | |")
            continue
        out.append(
            f"| {row.name} | {published} | {shown(one['cifar10'])} | {shown(one['cifar100'])} "
            f"| {shown(one['random_search']['cifar10'])} "
            f"| {one['ahead_of_random_search']} of {one['seeds']} "
            f"| {one['parameterless']['mean']:.1f} of 6 | {one['seconds']['mean']:.0f} |"
        )
    for name, first, second in OTHERS:
        published = " / ".join(figure(v) for v in (first, second)).strip(" /")
        out.append(f"| {name} | {published} | | | | | | |")
    cells = [one["one_random_cell"] for one in found.values() if one is not None]
    if cells:
        both = " / ".join(f"{cells[0][d]:.2f}" for d in DATASETS)
        out.append(f"| one random cell (mean of the table) | {both} | | | | | | |")
    return out


def main() -> None:
    """Collects, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scale", default="cpu")
    args = parser.parse_args()
    found = {row.name: measured(row, args.results, args.scale) for row in ROWS}
    table = lines(found)
    print("\n".join(table))
    absent = sorted({row.recipe for row in ROWS if found[row.name] is None})
    if absent:
        print(
            f"\nnothing of the scale {args.scale!r} (or not every search) of: {', '.join(absent)}; "
            f"run: python benchmarks/recipes.py {' '.join(absent)} --scale {args.scale} --seeds 5"
        )
    out = {"scale": args.scale, "searches": found, "not_run": absent, "table": table}
    (args.results / "relax_quality.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
