"""A smaller language model as files: a folder of `transformers` where a configuration can say it,
else ONNX with cache inputs and outputs; bits are packed in ONNX."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.cache.policy import Policy, give
from espalier.compress.language.cache.spans import release
from espalier.compress.language.files.folder import expressible, greedy, save_folder, store_as
from espalier.compress.language.shape.surgery import empty
from espalier.errors import ExportError
from espalier.export import disk
from espalier.export.cached import TOKENS, TOLERANCE, export_cached
from espalier.flows.language.building import LATE, early
from espalier.flows.language.harm import logits
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.repairing import model_of
from espalier.space import Candidate

_PROMPT = (2, 48)  # windows and tokens of validation that files are compared on
_HALF = 16


@dataclass
class Written:
    """What was written. `files`: what it is -> path; `differences`: of logits from the model in
    memory, relative to the largest; `tokens`: greedy tokens that were equal; `bytes` that files have,
    `counted` those that limits are kept by."""

    files: dict[str, Path] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "files": {k: str(v) for k, v in self.files.items()}}


def write_model(job: LanguageJob, candidate: Candidate, folder: Path) -> Written:
    """Writes the repaired model of a candidate, weights as the original's folder stores them.

    Errors: `ExportError` where a file, loaded again, computes something else.
    """
    whole: Any = model_of(job, candidate)
    policy: Any = job.family.cache(candidate)
    model = whole
    if policy is not None:  # files hold weights: heads with spans are told so when they are loaded
        model = copy.deepcopy(whole)
        release(model)
    out = Written()
    reason = expressible(model)
    packed = packed_weights(job, candidate, model)
    if packed or reason is not None:
        _onnx(job, model, folder, packed, reason is not None, out)
    if reason is None:  # last: it rounds the model to what the folder stores
        _transformers(job, model, folder, out)
    else:
        out.notes.append(f"No configuration of transformers can say this model: {reason}.")
    out.counted = round(job.price(candidate)["bytes"].value)
    bound = next((x.bound for x in job.limits if x.metric == "bytes"), None)
    out.notes += told_bytes(out, bool(packed), as_floats(job, candidate), bound)
    if policy is not None:
        if reason is None:  # the folder's model has the folder's numbers, in the cache too
            store_as(whole, job.folder.stored)
            policy = policy.in_numbers(job.folder.stored.itemsize)
        _policy(job, whole, policy, folder, out)
        if "onnx" in out.files:
            out.notes.append(
                "ONNX keeps the whole cache and looks at all of it: the policy is for the model in "
                "memory."
            )
    return out


def told_bytes(out: Written, packed: bool, floats: list[str], bound: float | None) -> list[str]:
    """Where files are larger than what is counted, and why."""
    sizes = {name: out.bytes[name] for name in ("transformers", "onnx") if name in out.bytes}
    notes = []
    if packed and len(sizes) > 1:
        notes.append(
            "The folder of transformers holds the rounded weights as plain floats; model.onnx holds "
            f"them packed, in {sizes['onnx']:,} bytes with its graph ({out.counted:,} are counted)."
        )
    if floats:
        notes.append(f"Written as floats, though counted as packed: {', '.join(floats)}.")
    if bound is not None and sizes and min(sizes.values()) > bound:
        name, size = min(sizes.items(), key=lambda pair: pair[1])
        notes.append(
            f"The limit of {bound:,.0f} bytes is kept by counting, {out.counted:,}, and not by files: "
            f"the smallest that was written, {out.files[name].name}, has {size:,} bytes."
        )
    return notes


def as_floats(job: LanguageJob, candidate: Candidate) -> list[str]:
    """What files hold unpacked of the bits and zeros that were decided, in words."""
    own, found = job.family.anatomy, set()
    now = _places_now(job, candidate)
    aware = any(
        getattr(getattr(c, "bound", c), "kind", "") == "bits" and _cut(c).method == "aware"
        for c in job.family.cuts
    )
    for decision in job.family.space.decisions:
        kind, _, place = decision.name.partition(":")
        option = candidate.get(decision.name, decision.options[-1])
        if kind not in LATE or option == decision.options[-1] or not now(place):
            continue
        if kind == "sparsity":
            found.add("zeros of sparse weights")
        elif place == own.embedding:
            found.add("bits of the table of tokens")
        elif place.endswith(".experts"):
            found.add("bits of experts")
        elif aware or option >= _HALF:
            found.add("bits of other weights")
    return sorted(found)


def _cut(bound: Any) -> Any:
    return getattr(bound, "bound", bound).cut


def _policy(job: LanguageJob, model: Any, policy: Any, folder: Path, out: Written) -> None:
    """Writes the policy of a model's cache, once it was read again and wrote the same text."""
    name = "cache policy"
    with disk.staging(folder) as stage:
        file = policy.save(stage)
        loaded = Policy.load(stage)
        out.differences[name], out.tokens[name] = same_text(model, policy, loaded, job.windows[:1])
        disk.settle(stage, folder)
    out.files[name] = folder / file.name
    first = "after give(model, make.plans), so that heads see no further than their spans; both are"
    spans = any(any(plan.spans) for plan in loaded.plans.values())
    out.notes.append(
        "The cache is made by make = Policy.load(folder), and model.generate takes make() as "
        f"past_key_values{', ' + first if spans else '; Policy is'} of espalier.compress.language."
    )


def same_text(model: Any, policy: Any, loaded: Any, ids: torch.Tensor) -> tuple[float, int]:
    """Compares a model and its cache with the same model that only knows what was read from a file,
    which it then keeps: the largest relative difference of logits, and how many greedy tokens were
    equal.

    Errors: `ExportError` where they differ.
    """
    most = int(getattr(model.config, "max_position_embeddings", 0) or ids.shape[1] + TOKENS)
    most = min(most, policy.capacity or most)
    prompt = ids[:, : max(1, min(_PROMPT[1], ids.shape[1], most) // 2)]
    count = max(1, min(TOKENS, most - prompt.shape[1]))
    with torch.inference_mode():
        wanted, text = logits(model, ids[:, :most], policy), greedy(model, prompt, count, policy())
    release(model)
    give(model, loaded.plans)
    with torch.inference_mode():
        found, again = logits(model, ids[:, :most], loaded), greedy(model, prompt, count, loaded())
    gap = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    if not gap <= TOLERANCE or not torch.equal(text, again):
        raise ExportError(
            "the cache policy, read again, makes the model write another text: logits differ by "
            f"{gap:.2g}, {int((text == again).sum())} of {count} tokens are equal; it was not written"
        )
    return gap, count


def _transformers(job: LanguageJob, model: Any, folder: Path, out: Written) -> None:
    store_as(model, job.folder.stored)
    saved = save_folder(model, folder, job.folder.path, was=job.folder.config)
    store_as(model, job.folder.dtype)
    out.files["transformers"] = next(f for f in saved.files if f.suffix == ".safetensors")
    out.differences["transformers"] = saved.difference
    out.tokens["transformers"] = saved.tokens
    out.bytes["transformers"] = saved.bytes


def _onnx(
    job: LanguageJob, model: Any, folder: Path, packed: dict[str, Any], alone: bool, out: Written
) -> None:
    groups = [(x.attention.groups, x.attention.head) for x in anatomy(model).layers if x.attention]
    rows, tokens = _PROMPT
    done = export_cached(
        model,
        groups,
        folder,
        prompt=job.windows[:rows, :tokens],
        packed=packed,
        pt2=alone,
    )
    out.files |= done.files
    out.differences |= done.differences
    out.tokens |= done.tokens
    out.bytes |= done.bytes


def packed_weights(job: LanguageJob, candidate: Candidate, model: Any) -> dict[str, Any]:
    """Parameter of the built model -> whole numbers and scales, of matrices that bits were decided
    for. Experts, in one tensor a layer, and tables that are looked up are not packed."""
    from espalier.compress.language.weights.bits import BoundWeightBits, pack

    now = _places_now(job, candidate)
    found: dict[str, Any] = {}
    for cut in job.family.cuts:
        inner: Any = getattr(cut, "bound", cut)
        if not isinstance(inner, BoundWeightBits) or inner.cut.method == "aware":
            continue
        bits: dict[str, int] = {}
        for decision in cut.decisions:
            place, own = decision.name.partition(":")[2], candidate.get(decision.name)
            if isinstance(own, int) and own < _HALF and (name := now(place)):
                bits[name] = own
        found |= pack(model, bits, inner.cut)
    table = f"{job.family.anatomy.embedding}.weight"
    return {n: codes for n, codes in found.items() if codes.codes.dim() == 2 and n != table}


def _places_now(job: LanguageJob, candidate: Candidate) -> Any:
    """Place in the original -> its name in the built model; '' where its block is gone."""
    gone = set(empty(early(job.family, candidate)))
    kept = [x.path for i, x in enumerate(job.family.anatomy.layers) if i not in gone]
    stack = kept[0].rpartition(".")[0] if kept else ""
    names = {path: f"{stack}.{i}" for i, path in enumerate(kept)}

    def now(place: str) -> str:
        layer, _, part = place.rpartition(".")
        if not layer.startswith(stack + ".") or not stack:
            return place
        return f"{names[layer]}.{part}" if layer in names else ""

    return now
