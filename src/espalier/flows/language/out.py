"""A smaller language model as files: a folder of `transformers` where a configuration can say it,
else ONNX with cache inputs and outputs; bits are packed in ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.files.folder import expressible, save_folder
from espalier.compress.language.shape.surgery import empty
from espalier.export.cached import export_cached
from espalier.flows.language.building import early
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.repairing import model_of
from espalier.space import Candidate

_PROMPT = (2, 48)  # windows and tokens of validation that files are compared on
_HALF = 16


@dataclass
class Written:
    """What was written. `files`: what it is -> path; `differences`: of logits from the model in
    memory, relative to the largest; `tokens`: greedy tokens that were equal; `bytes` of weights."""

    files: dict[str, Path] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "files": {k: str(v) for k, v in self.files.items()}}


def write_model(job: LanguageJob, candidate: Candidate, folder: Path) -> Written:
    """Writes the repaired model of a candidate, weights as the original's folder stores them.

    Errors: `ExportError` where a file, loaded again, computes something else.
    """
    model: Any = model_of(job, candidate)
    out = Written()
    reason = expressible(model)
    packed = packed_weights(job, candidate, model)
    if reason is None:
        _transformers(job, model, folder, out)
    else:
        out.notes.append(f"No configuration of transformers can say this model: {reason}.")
    if packed or reason is not None:
        _onnx(job, model, folder, packed, reason is not None, out)
    policy = job.family.cache(candidate)
    if policy is not None:
        out.files["cache policy"] = policy.save(folder)
        out.notes.append(
            "The cache is made by espalier.compress.language.cache.policy.Policy.load(folder)(), to be "
            "given to model.generate as past_key_values."
        )
        if reason is not None:
            out.notes.append("ONNX keeps the whole cache: its policy is for the model in memory.")
    return out


def _transformers(job: LanguageJob, model: Any, folder: Path, out: Written) -> None:
    stored = model if job.folder.stored == model.dtype else model.to(job.folder.stored)
    saved = save_folder(stored, folder, job.folder.path, was=job.folder.config)
    model.to(job.folder.dtype)
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
    if packed and not alone:
        out.notes.append(
            "The folder of transformers holds the rounded weights as plain floats; model.onnx holds "
            "them packed, in the bytes that are counted."
        )


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
