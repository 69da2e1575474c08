"""The default search itself: sandwich-trained supernet, NSGA-II, measured and trained finalists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.costs import OnnxRuntime
from espalier.flows.search import search
from espalier.recipes import Recipe

# task, family, limits, budget, workers
_SCALES: dict[str, tuple[str, str, dict[str, str], str, int]] = {
    "smoke": ("digits", "mobilenet", {"latency_ms": "70%", "params": "30k"}, "30s", 2),
    "cpu": ("cifar10:size=16", "mobilenet", {"latency_ms": "0.2", "params": "120k"}, "20min", 2),
    "gpu": ("cifar10", "mobilenet", {"latency_ms": "1.0", "params": "500k"}, "60min", 4),
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Searches once; the check compares the found network with both baselines."""
    task, family, within, budget, workers = _SCALES[scale]
    found = search(
        family,
        task,
        within=within,
        on=OnnxRuntime(),
        budget=budget,
        seed=seed,
        out=out,
        workers=workers,
    )
    result = found.to_json()
    name = found.quality
    baselines = {e["name"]: e["metrics"][name]["value"] for e in result["baselines"]}
    return {
        **result,
        "check": {
            "within_limits": all(result["budget"]["kept"].values()),
            "test": result["best"]["metrics"][name]["value"],
            "baselines": baselines,
            "ahead_of": [
                k for k, v in baselines.items() if result["best"]["metrics"][name]["value"] > v
            ],
        },
    }


RECIPE = Recipe(
    name="default-search",
    title="Espalier's default search",
    source="Espalier; sandwich rule: Yu et al., 2019; NSGA-II: Deb et al., 2002",
    parts=(
        "space: any family of elastic layers",
        "estimator: one-shot accuracy on a supernet trained by the sandwich rule",
        "cost: counted, and latency predicted by a table of measured blocks",
        "strategy: NSGA-II with constraint domination",
        "repair: none; finalists are trained from the supernet and from scratch",
        "baselines: the family scaled by hand, random search at equal trials",
    ),
    works_when="The chosen network keeps every limit as measured on the runtime, and its test "
    "accuracy is reported beside the family scaled by hand and random search.",
    run=run,
    text="""
A supernet is trained once: each step updates the largest network on the labels, and the smallest
and two random ones on the largest's outputs. NSGA-II then asks for candidates; what breaks a limit
by counted or predicted cost is refused before it is scored. The best candidates are measured on the
real runtime, trained to the end from the supernet's weights and from scratch, measured again and
tested once.
""",
)
