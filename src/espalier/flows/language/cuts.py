"""Kinds of decision on a language model by name, and which are taken when none are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from espalier.compress import Cut
from espalier.compress.language.anatomy import Anatomy, Experts
from espalier.errors import EspalierError, unknown
from espalier.flows.shrink_identity import settings_of
from espalier.problem import Limit

_ROOM = "espalier.compress.language"
_BITS = (4, 8)  # what ONNX Runtime's kernels have: files keep what is counted
_CUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sublayers": ("shape.structure", "SubLayers", {}),
    "blocks": ("shape.structure", "Blocks", {}),
    "heads": ("shape.structure", "Heads", {}),
    "units": ("shape.structure", "Units", {}),
    "hidden": ("shape.structure", "Hidden", {}),
    "windows": ("shape.structure", "Units", {"windows": 3}),
    "experts": ("experts.decisions", "Experts", {}),
    "merge": ("experts.decisions", "Experts", {"merge": True}),
    "active": ("experts.decisions", "ActiveExperts", {}),
    "sparsity": ("weights.sparse", "SparseWeights", {"inputs": "original"}),
    "bits": ("weights.bits", "WeightBits", {"inputs": "original", "options": _BITS}),
    "tables": (
        "weights.bits",
        "WeightBits",
        {"inputs": "original", "options": _BITS, "tables": True},
    ),
    "kv": ("cache.cuts", "CacheBits", {}),
    "growing": ("cache.cuts", "CacheBits", {}),
    "rank": ("cache.cuts", "CacheRank", {}),
    "span": ("cache.cuts", "Spans", {}),
}
NAMES = tuple(_CUTS)
# beside the name on the right, the one on the left is enough: it decides that and more
_INSTEAD = {"tables": "bits", "windows": "units", "merge": "experts", "growing": "kv"}


def language_cuts(
    decisions: str | Iterable[str | Cut] | None,
    anatomy: Anatomy,
    limits: Sequence[Limit],
    grouped: bool,
    length: int = 0,
) -> tuple[Cut, ...]:
    """Cuts by name, as they are, or those that the limits ask for where None is given.

    By default: sub-layers, heads, units, experts where there are, bits of weights where bytes are
    limited and bits of the cache where kv_bytes is. Grouped: whole blocks and widths common to all
    layers, so that a configuration can say the result. `length`: tokens that a growing cache is for,
    by default the model's context. Errors: `EspalierError` for an unknown name.
    """
    if decisions is None:
        decisions = _defaults(anatomy, [x.metric for x in limits], grouped)
    names = decisions.split(",") if isinstance(decisions, str) else decisions
    asked = [item if isinstance(item, Cut) else item.strip() for item in names]
    for more, less in _INSTEAD.items():
        if more in asked and less in asked:
            asked.remove(less)
    out: list[Cut] = []
    for item in asked:
        if isinstance(item, Cut):
            out.append(item)
        elif item not in _CUTS:
            raise EspalierError(unknown("kind of decision", item, _CUTS))
        else:
            out.append(_made(item, length or anatomy.context))
    kinds = [cut.kind for cut in out]
    twice = next((k for k in kinds if kinds.count(k) > 1), None)
    if twice is not None or not out:
        got = f"{twice} twice" if twice else "none"
        raise EspalierError(f"a shrink needs kinds of decision, each once, got {got}")
    return tuple(out)


def further(
    cuts: Sequence[Cut], anatomy: Anatomy, length: int, grouped: bool
) -> tuple[list[str], list[Cut]]:
    """Names of kinds beside these cuts that could make a model smaller, and cuts of all together."""
    here = {cut.kind for cut in cuts}
    alike = {"sublayer", "block"}
    names, wide = [], [cut for cut in cuts if cut.kind != "bits"]
    for name in NAMES:
        if name in ("bits", *_INSTEAD) and name != "tables":
            continue  # sizes are those of the plainer or the wider kind
        made = _made(name, length)
        given: Any = next((cut for cut in cuts if cut.kind == made.kind), None)
        if name == "tables":
            names += [] if getattr(given, "tables", False) else [name]
            wide.append(made if given is None else replace(given, tables=True))
        elif given is None and not (made.kind in alike and here & alike):
            names.append(name)
            wide.append(made)
    mixed = any(isinstance(layer.feed, Experts) for layer in anatomy.layers)
    gone = (() if mixed else ("experts", "active")) + (("sublayers",) if grouped else ())
    return [n for n in names if n not in gone], wide


def name_of(cut: Cut, length: int) -> str:
    """The name that stands for a cut with these settings at a length; '' where none does."""
    own = settings_of(cut)
    found = (n for n in NAMES if type(m := _made(n, length)) is type(cut) and settings_of(m) == own)
    return next(found, "")


def _made(name: str, length: int) -> Cut:
    module, kind, settings = _CUTS[name]
    if name == "growing":
        settings = {**settings, "capacity": length}
    cut: Cut = getattr(import_module(f"{_ROOM}.{module}"), kind)(**settings)
    return cut


def _defaults(anatomy: Anatomy, limited: Sequence[str], grouped: bool) -> list[str]:
    names = ["blocks", "heads", "units"] if grouped else ["sublayers", "heads", "units"]
    if any(isinstance(layer.feed, Experts) for layer in anatomy.layers):
        names.append("experts")
        if "active_params" in limited or "decode_ms" in limited:
            names.append("active")
    if "bytes" in limited and not grouped:
        names.append("bits")
    if "kv_bytes" in limited:
        names.append("kv")
    return names
