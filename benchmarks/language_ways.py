"""The ways to make a language model smaller that language_vs_peers.py compares.

Ours: decisions of some kinds under one limit on bytes, by harm of every option, the exact program, and
evolution from its answer; closed forms only, nothing is trained. Beside it the rules that people use.
Peers run in environments of their own and are asked over a file of windows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from espalier.compress import Cut
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.experts.decisions import Experts
from espalier.compress.language.family import Language
from espalier.compress.language.repair.refit import refit
from espalier.compress.language.shape.structure import Blocks, Heads, SubLayers, Units
from espalier.compress.language.weights.bits import WeightBits
from espalier.compress.language.weights.places import places
from espalier.compress.language.weights.rounding import packed_bytes
from espalier.compress.language.weights.sparse import SparseWeights
from espalier.costs.language import LanguageCounts
from espalier.errors import BudgetError
from espalier.flows.language.building import early, late, reshaped
from espalier.flows.language.harm import LanguageHarm, loss_of
from espalier.problem import Limit
from espalier.recipes._parts.sublayers import influence
from espalier.solvers.allocate import Factor, Profile, Program, profile
from espalier.tasks.tokens import TokenText
from peers.environments import HERE, python

STORED = 4  # bytes of a number in the folders
BITS = (2, 3, 4, 5, 6, 8)  # what ModelOpt is offered, too
HARM, ORDER = 8, 32  # windows of calibration for harm, and for orders and scales
_JUDGED, _EACH, _STALE = (
    60,
    6,
    3,
)  # candidates that evolution judges, a generation of them, patience
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


@dataclass
class Job:
    """One model and one draw of the text, as every way gets them; test is read by `tested` alone."""

    folder: Path
    model: Any
    task: TokenText
    seed: int
    scratch: Path
    profiles: dict[str, tuple[Language, Profile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = float(STORED * sum(p.numel() for p in self.model.parameters()))
        self.train = self.task.windows("train")
        self.maps = [
            shape for place in places(anatomy(self.model)).values() for shape in place.shapes(self.model)
        ]  # fmt: skip
        self.in_maps = float(sum(int(np.prod(shape)) for shape in self.maps))

    def tested(self, model: Any) -> float:
        """The loss on held-out windows, in nats a token."""
        return loss_of(model, self.task.windows("test"))

    def bytes(self, model: Any) -> float:
        """Bytes of a model whose numbers are as they were stored."""
        return float(STORED * sum(p.numel() for p in model.parameters()))

    def kept_in_maps(self, share: float) -> float:
        """Share of the weights in the layers' maps that may stay, everything else staying."""
        rest = self.whole / STORED - self.in_maps
        return (share * self.whole / STORED - rest) / self.in_maps

    @property
    def mixture(self) -> bool:
        """Whether there are experts."""
        return any(hasattr(layer.feed, "router") for layer in anatomy(self.model).layers)


# --- ours --------------------------------------------------------------------------------------

KINDS = ("mix", "sub-layers", "widths", "bits", "experts")


def cuts(kind: str, mixture: bool) -> Sequence[Cut]:
    """The decisions of a kind; those of "mix" are all of them."""
    found: dict[str, list[Cut]] = {
        "sub-layers": [SubLayers()],
        "widths": [Heads(), Units(steps=8)],
        "experts": [Experts()] if mixture else [],
        "bits": [WeightBits(BITS, inputs="original")],
    }
    if kind == "mix":
        return [cut for own in found.values() for cut in own]
    return found[kind]


def ours(job: Job, kind: str, share: float) -> tuple[Any, float, dict[str, Any]]:
    """The model, its bytes, and what was chosen. Errors: `BudgetError` where the kind can't."""
    if kind not in job.profiles:
        order = job.train[:ORDER, :-1]
        family = Language(job.model, order, cuts(kind, job.mixture), name=job.folder.name)
        harm = LanguageHarm(family, job.train[:HARM], "divergence")
        job.profiles[kind] = family, profile(family, harm.harm).smoothed(family.space)
    family, known = job.profiles[kind]
    counts = LanguageCounts(family, stored=STORED)
    costs = {"bytes": [Factor(t.decisions, t.values, name=t.name) for t in counts.tables("bytes")]}
    limits = (Limit("bytes", share * job.whole),)
    solver = Program(family.space, known.factors, costs, limits)
    judge = LanguageHarm(family, job.train[:HARM], "divergence")
    candidate = evolved(solver, family, judge, job.seed)
    model = mended(job, family, candidate)
    spent = float(counts.estimate_codes(family.space.encode([candidate]))["bytes"][0])
    changed = {n: v for n, v in candidate.items() if v != family.space[n].options[-1]}
    return model, spent, {"chosen": changed}


def evolved(solver: Program, family: Language, judge: LanguageHarm, seed: int) -> Any:
    """The program's answer, and what steps from it and from its rivals find within the limit."""
    answers: list[Any] = []
    for _ in range(_EACH):
        try:
            answers.append(solver.solve(seconds=10, seed=seed, forbidden=answers).candidate)
        except BudgetError:
            if not answers:
                raise
            break
    space, rng = family.space, np.random.default_rng([seed, 0xB5])
    harm = {c: judge.judged(c)["divergence"] for c in answers}
    stale = 0
    while len(harm) < _JUDGED and stale < _STALE:
        best = sorted(harm, key=harm.__getitem__)[:_EACH]
        rows = np.repeat(space.encode(best), 60, axis=0)
        for row in rows:  # one to four decisions move by a step
            for j in rng.choice(len(row), size=int(rng.integers(1, 5)), replace=False):
                row[j] = np.clip(
                    row[j] + rng.choice([-1, 1]), 0, (space.decisions[j].count or 1) - 1
                )
        rows = space.canonical(rows)
        rows = np.concatenate([rows, space.cross(rows, rows[rng.permutation(len(rows))], rng)])
        rows = rows[space.valid(rows)]
        rows = rows[space.unique(rows)]
        expected, over, _ = solver.judge(rows)
        rows, expected = rows[over <= 0], expected[over <= 0]
        order = np.argsort(expected * rng.uniform(0.9, 1.1, len(expected)), kind="stable")
        new = [c for c in space.decode(rows[order]) if c not in harm][:_EACH]
        if not new:
            break
        before = min(harm.values())
        harm |= {c: judge.judged(c)["divergence"] for c in new}
        stale = 0 if min(harm.values()) < before else stale + 1
    return min(harm, key=harm.__getitem__)


def mended(job: Job, family: Language, candidate: Any) -> Any:
    """The model as chosen; its outputs are fitted to the original's hidden states, layer by layer,
    where that is better on validation windows."""
    shape = early(family, candidate)
    found = [late(family, shape, candidate)]
    if reshaped(family, candidate):
        refit(shape, job.model, job.train[:ORDER, :-1])
        found.append(late(family, shape, candidate))
    return min(found, key=lambda m: loss_of(m, job.task.windows("validation")))


# --- rules -------------------------------------------------------------------------------------


def uniform(job: Job, share: float) -> tuple[Any, float, dict[str, Any]]:
    """All layers keep equally many heads and units, those of largest outputs."""
    common = {"compensate": False}
    steps = [Heads(**common), Units(steps=20, **common)]
    family = Language(job.model, job.train[:ORDER, :-1], steps, grouped=True, name="uniform")
    rows = family.space.enumerate()
    cost = LanguageCounts(family, stored=STORED).estimate_codes(rows)["bytes"]
    fits = rows[cost <= share * job.whole]
    if len(fits) == 0:
        raise BudgetError("one group of heads and the fewest units are still above the limit")
    # for each number of heads the widest that fits; the better on calibration
    names = family.space.names
    column = next((j for j, n in enumerate(names) if n.startswith("heads")), None)
    spent = {tuple(row): c for row, c in zip(rows.tolist(), cost, strict=True)}
    best: dict[Any, Any] = {}
    for row in fits:
        key = 0 if column is None else int(row[column])
        if key not in best or spent[tuple(row.tolist())] > spent[tuple(best[key].tolist())]:
            best[key] = row
    models = [family.build(family.space.decode(row[None])[0]) for row in best.values()]
    model = min(models, key=lambda m: loss_of(m, job.train[:HARM]))
    return model, job.bytes(model), {}


def shallower(job: Job, share: float, order: Sequence[int]) -> tuple[Any, float, dict[str, Any]]:
    """Blocks go in this order until the rest fits."""
    family = Language(job.model, job.train[:1, :-1], [Blocks()], name="blocks")
    layers = [layer.path for layer in anatomy(job.model).layers]
    for count in range(1, len(layers)):
        gone = {f"block:{layers[i]}": 0 for i in order[:count]}
        model = family.build({**family.original, **gone})
        if job.bytes(model) <= share * job.whole:
            return model, job.bytes(model), {"gone": sorted(int(i) for i in order[:count])}
    raise BudgetError("one block is still above the limit")


def last_layers(job: Job, share: float) -> tuple[Any, float, dict[str, Any]]:
    """The last blocks go first."""
    return shallower(job, share, list(reversed(range(len(anatomy(job.model).layers)))))


def block_influence(job: Job, share: float) -> tuple[Any, float, dict[str, Any]]:
    """The blocks that turn the hidden states least go first (Men et al., ShortGPT, 2024)."""
    _, turned = influence(job.model, job.train[:HARM, :-1])
    return shallower(job, share, sorted(range(len(turned)), key=turned.__getitem__))


def sparse(job: Job, share: float, method: str) -> tuple[Any, float, dict[str, Any]]:
    """Single weights go, the same share of every map; where they were is not counted."""
    kept = job.kept_in_maps(share)
    if kept <= 0:
        raise BudgetError("without any weight in its layers it is still above the limit")
    cut = SparseWeights(patterns=(), shares=(kept,), method=method)
    family = Language(job.model, job.train[:ORDER, :-1], [cut], name=method)
    model = family.build(family.space.decode(family.space.corner(last=False))[0])
    gone = sum(int((p == 0).sum()) for n, p in model.named_parameters() if ".layers." in n)
    return model, job.whole - STORED * gone, {"kept": kept}


RULES = {
    "uniform slicing": uniform,
    "last layers": last_layers,
    "block influence": block_influence,
    "magnitude": lambda job, share: sparse(job, share, "magnitude"),
    "wanda": lambda job, share: sparse(job, share, "wanda"),
}


# --- peers -------------------------------------------------------------------------------------


def asked(environment: str, script: str, *arguments: str) -> dict[str, Any]:
    """What a peer's script says. Errors: `RuntimeError` with the end of what it wrote."""
    done = subprocess.run(
        [str(python(environment)), str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **_ONE_THREAD},
    )
    if done.returncode != 0:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-3:])[-400:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def windows_file(job: Job) -> str:
    """Calibration and test windows, where a peer reads them."""
    path = job.scratch / f"windows-{job.folder.name}-{job.seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration = job.train[:, :-1].numpy()
        np.savez(path, calibration=calibration, test=job.task.windows("test").numpy())
    return str(path)


def compressor(job: Job, method: str, shares: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """llm-compressor: (share, row) for each share that it can be asked for."""
    amounts: dict[float, float] = {}
    for share in shares:
        amount = experts_gone(job, share) if method == "reap" else 1 - job.kept_in_maps(share)
        if amount is not None and 0 < amount < 1:
            amounts[share] = round(amount, 6)
    if not amounts:
        return
    text = ",".join(map(str, amounts.values()))
    found = asked("llm-compressor", "llm_compressor_peer.py", str(job.folder), windows_file(job), method, text)  # fmt: skip
    for share, amount in amounts.items():
        row = found[str(amount)]
        gone = row["zeros"] * job.in_maps
        spent = job.whole - STORED * gone
        if method == "reap":
            spent = STORED * row["params"]
        yield share, {**row, "bytes": spent, "untouched": found["untouched"]}


def experts_gone(job: Job, share: float) -> float | None:
    """The least share of experts whose removal fits; None where two would not stay."""
    feeds = [layer.feed for layer in anatomy(job.model).layers if hasattr(layer.feed, "router")]
    if not feeds:
        return None
    first: Any = feeds[0]
    each = 3 * first.width * anatomy(job.model).width + anatomy(job.model).width
    for kept in range(first.count - 1, first.active - 1, -1):
        if job.whole - STORED * each * len(feeds) * (first.count - kept) <= share * job.whole:
            return 1 - kept / first.count
    return None


def modelopt(job: Job, shares: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """ModelOpt's auto_quantize: (share, row). It is asked for the effective bits that come to the same
    bytes, scales counted as ours are; more than 8 can't be used. It counts the head, which it is told
    to leave alone, with 16 bits."""
    budgets: dict[float, float] = {}
    rest = job.whole - STORED * job.in_maps
    head = float(anatomy(job.model).vocabulary * anatomy(job.model).width)
    scales = sum(packed_bytes(s, 8) for s in job.maps) - job.in_maps
    for share in shares:
        bits = (share * job.whole - rest - scales) * 8 / job.in_maps
        if bits >= min(BITS):
            maps = min(bits, max(BITS)) * job.in_maps
            budgets[share] = round((maps + 16 * head) / (job.in_maps + head), 3)
    if not budgets:
        return
    text = ",".join(map(str, dict.fromkeys(budgets.values())))
    found = asked("modelopt-lm", "modelopt_lm_peer.py", str(job.folder), windows_file(job), text)
    for share, bits in budgets.items():
        row = {k: v for k, v in found[str(bits)].items() if k != "picks"}
        spent = rest + scales + row["bits"] * job.in_maps / 8
        yield share, {**row, "bytes": spent, "asked": bits, "untouched": found["untouched"]}
