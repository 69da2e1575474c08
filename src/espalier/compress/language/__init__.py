"""Decisions on `transformers` models: what they are made of, folders, and cuts on their parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "KINDS": "anatomy",
    "Anatomy": "anatomy",
    "Attention": "anatomy",
    "Experts": "anatomy",
    "Feed": "anatomy",
    "Layer": "anatomy",
    "Weights": "anatomy",
    "anatomy": "anatomy",
    "Folder": "files.folder",
    "Saved": "files.folder",
    "expressible": "files.folder",
    "Blocks": "shape.structure",
    "Heads": "shape.structure",
    "Hidden": "shape.structure",
    "Language": "family",
    "SubLayers": "shape.structure",
    "Units": "shape.structure",
    "greedy": "files.folder",
    "read_folder": "files.folder",
    "save_folder": "files.folder",
    "ActiveExperts": "experts.decisions",
    "Adapters": "adapters.decisions",
    "ExpertCount": "experts.decisions",
    "SparseWeights": "weights.sparse",
    "WeightBits": "weights.bits",
    "in_layers": "layer_by_layer.weights",
    "CacheBits": "cache.cuts",
    "CacheRank": "cache.cuts",
    "Plan": "cache.plan",
    "Policy": "cache.policy",
    "Span": "cache.plan",
    "Spans": "cache.cuts",
    "give": "cache.policy",
    "teacher_forced": "evaluate",
    "tokens_a_second": "evaluate",
}
_THERE = {"ExpertCount": "Experts"}  # its name there; here that is the part of the anatomy


def __getattr__(name: str) -> Any:
    if name in _HOME:  # lazy, so that one part does not import all of them
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), _THERE.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
