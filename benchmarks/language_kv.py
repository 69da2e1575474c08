"""Caches of keys and values within bytes: a mix of decisions beside uniform bits, windows, eviction.

Subjects are a small byte model that has learned to copy (held-out source, and strings that stood up to 480
bytes before), the byte model of six blocks (the same source) and the Llama of 260,032 weights (War and
Peace); the last two hardly use what lies far back. A cache may hold a share of the bytes of an exact one of 16 bits when 512
tokens have gone through it; of each entrant's settings the largest that keeps them is taken, and what is
held is measured. "mix" chooses bits, rank and spans by layer and head: divergence of the outputs on a few
calibration windows is profiled for each option once, then the exact program is solved for each budget, and
of its best answers the one that calibration likes best is taken. "mix, bits", "mix, rank" and "mix, spans"
may decide one kind only. Caches of fewer bits begin at 16 and go down as they fill; "uniform, at once" do
not. Five draws of calibration and held-out windows. Decoding is measured in tokens a second.

    python benchmarks/language_kv.py --quick                # 1 draw, two budgets
    python benchmarks/language_kv.py [--subject looking bytes stories] [--draws 5] [--speed]

Rows are written as they are made, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from espalier.compress.language.cache.cuts import CacheBits, CacheRank, Spans, held
from espalier.compress.language.cache.evict import Evicting
from espalier.compress.language.cache.plan import Plan, Span
from espalier.compress.language.cache.policy import Policy
from espalier.compress.language.evaluate import scored, stretches, tokens_a_second
from espalier.compress.language.family import Language
from espalier.costs.language import LanguageCounts
from espalier.errors import BudgetError
from espalier.flows.machine import machine
from espalier.problem import Limit
from espalier.recipes._parts import language, looking, stories
from espalier.solvers.allocate import Factor, Program, profile

RESULTS = Path(__file__).parent / "results" / "language_kv.json"
KEPT = Path(__file__).parents[1] / ".cache" / "recipes" / "cpu"
LENGTH = 512
BUDGETS = (0.5, 0.35, 0.27, 0.18)
WINDOW, SINKS, BLOCK = 16, 4, 32
EXACT = Plan(window=WINDOW, sinks=SINKS, block=BLOCK, half=True)
SETTINGS: dict[str, Any] = {"window": WINDOW, "sinks": SINKS, "block": BLOCK, "half": True}
KINDS: dict[str, Callable[[], Any]] = {
    "bits": lambda: CacheBits((2, 3, 4, 8), capacity=LENGTH, **SETTINGS),
    "rank": lambda: CacheRank((0.25, 0.5, 0.75), **SETTINGS),
    "spans": lambda: Spans(
        (Span(32), Span(64), Span(128), Span(0, 0.5)), sinks=SINKS, half=True, at=LENGTH
    ),
}
STEP = 8  # tokens that go through an evicting cache at once
TRIED = 2  # answers of the program that calibration chooses among


@dataclass
class Subject:
    """A model and its texts: calibration and held-out windows of a draw; windows with answers."""

    name: str
    model: Any
    calibration: Callable[[int], Tensor]
    held: Callable[[int], Tensor]
    bytes_a_token: float
    tables: Callable[[int], tuple[Tensor, Tensor]] | None = None  # windows, and what is asked


def byte_subject() -> Subject:
    """The byte model of six blocks."""
    return Subject(
        "bytes",
        language.byte_model("dense", 0, out=KEPT),
        lambda draw: language.windows("train", 4, draw, LENGTH),
        lambda draw: language.windows("fresh", 16, draw, LENGTH),
        1.0,
    )


def looking_subject() -> Subject:
    """The smaller byte model that has learned to copy; what comes again is asked."""
    return Subject(
        "looking",
        looking.looking_model(KEPT),
        lambda draw: torch.cat(
            [language.windows("train", 2, draw, LENGTH), looking.copies(4, draw, LENGTH)[0]]
        ),
        lambda draw: language.windows("fresh", 16, draw, LENGTH),
        1.0,
        lambda draw: looking.copies(16, 1000 + draw, LENGTH),
    )


def stories_subject() -> Subject:
    """The Llama of 260,032 weights on War and Peace, as in the recipe apt-prune."""
    from espalier.recipes._parts.stories_folder import stories_model

    text = stories.read_text("text", "warandpeace", "warandpeace.txt.xz")
    tokens = stories.Tokens.read()
    parts = [text[100_000:600_000], text[1_200_000:1_700_000]]
    ids = [torch.tensor(tokens.encode(part)) for part in parts]
    rows = [own[: len(own) // LENGTH * LENGTH].reshape(-1, LENGTH) for own in ids]

    def drawn(part: int, count: int, draw: int) -> Tensor:
        order = torch.randperm(len(rows[part]), generator=torch.Generator().manual_seed(draw))
        return rows[part][order[:count]]

    size = len(parts[1].encode()) / len(ids[1])
    return Subject("stories", stories_model(), partial(drawn, 0, 4), partial(drawn, 1, 16), size)


SUBJECTS = {"looking": looking_subject, "bytes": byte_subject, "stories": stories_subject}


# --- ours ----------------------------------------------------------------------------------------


class Harm:
    """Divergence of the next token from the original's, token by token through the cache."""

    measure = "divergence through the cache"

    def __init__(self, family: Language, windows: Tensor) -> None:
        self.family, self.windows, self.samples = family, windows, len(windows)
        self._before = self._logits(family.model, None)

    def harm(self, candidates: Any) -> Any:
        """Nats a token `(n,)`."""
        return np.array([self.one(candidate) for candidate in candidates])

    @torch.no_grad()
    def one(self, candidate: Any) -> float:
        """Of one candidate."""
        after = self._logits(self.family.build(candidate), self.family.cache(candidate))
        return float((self._before.exp() * (self._before - after)).sum(-1).mean())

    @torch.no_grad()
    def _logits(self, model: Any, make: Any) -> Tensor:
        cache = None if make is None else make()
        parts = [
            model(
                input_ids=self.windows[:, first:last],
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits
            for first, last in stretches(self.windows.shape[1], cache, 0)
        ]
        return log_softmax(torch.cat(parts, 1).float(), -1)


def mixes(subject: Subject, draw: int, budgets: list[float]) -> dict[tuple[str, float], Any]:
    """(entrant, share) -> (model, policy): the mix, and each kind alone, from one profile."""
    windows = subject.calibration(draw)
    family = Language(subject.model, windows, [make() for make in KINDS.values()])
    judge = Harm(family, windows)
    start = time.perf_counter()
    found = profile(family, judge.harm).smoothed(family.space)
    seconds = time.perf_counter() - start
    counts = LanguageCounts(family, context=LENGTH, held=held(family.cuts, 2, LENGTH), cached=2)
    factors = [Factor(t.decisions, t.values, name=t.name) for t in counts.tables("kv_bytes")]
    whole = Policy.uniform(subject.model, EXACT).bytes(LENGTH)
    out: dict[tuple[str, float], Any] = {("profile", 0.0): seconds}
    heads = {"mix": "", "mix, bits": "kv:", "mix, rank": "rank:", "mix, spans": "span:"}
    for name, only in heads.items():
        barred = [d for d in family.space.decisions if not d.name.startswith(only)]
        more = [f for d in barred for f in fixed(d)]
        for share in budgets:
            answers: list[Any] = []
            for _ in range(TRIED):
                limits = [Limit("kv_bytes", share * whole)]
                program = Program(
                    family.space, [*found.factors, *more], {"kv_bytes": factors}, limits
                )
                try:
                    answers.append(program.solve(seconds=10, forbidden=answers).candidate)
                except BudgetError:
                    break
            if answers:
                best = min(answers, key=judge.one)
                out[name, share] = (family.build(best), in_half(subject, family.cache(best)), best)
    return out


def in_half(subject: Subject, policy: Any) -> Policy:
    """The policy with the layers that nothing was decided on in 16 bits, too."""
    found: Policy = Policy.of(subject.model) if policy is None else policy
    return replace(found, plans={s.path: found.plans.get(s.path, EXACT) for s in found.shapes})


def fixed(decision: Any) -> list[Any]:
    """A factor that leaves a decision at the original."""
    values = np.full(decision.count, math.inf)
    values[-1] = 0.0
    return [Factor((decision.name,), values)]


# --- what they are compared with ------------------------------------------------------------------


def rivals(subject: Subject, budget: float) -> dict[str, tuple[Any, int, bool]]:
    """Entrant -> (what makes its cache, tokens that go in at once, whether attention is looked at)."""
    model, found = subject.model, {}
    whole = Policy.uniform(model, EXACT)
    layers = len(whole.shapes)
    for name, capacity in (("uniform bits", LENGTH), ("uniform, at once", 0)):
        for bits in (8, 4, 3, 2):
            policy = Policy.uniform(model, replace(EXACT, bits=bits, capacity=capacity))
            if policy.bytes(LENGTH) <= budget:
                found[name] = (policy, 0, False)
                break
    tokens = int(budget / whole.bytes(LENGTH) * LENGTH) - STEP
    for name, by in (("sliding window", "recent"), ("key norm", "norm"), ("H2O", "attention")):
        make = partial(Evicting, layers, tokens, by, SINKS, half=True)
        found[name] = (make, STEP, by == "attention")
    return found


def reads(
    subject: Subject, model: Any, make: Any, draw: int, chunk: int, eager: bool
) -> dict[str, float]:
    """Bits a byte of held-out text, loss and share right of what is asked, bytes held."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else kernel)
    text = scored(model, subject.held(draw), make, chunk)
    row = {
        "bits_per_byte": text.loss / math.log(2) / subject.bytes_a_token,
        "cache_bytes": text.peak,
    }
    if subject.tables is not None:
        ids, answers = subject.tables(draw)
        table = scored(model, ids, make, chunk, where=answers)
        row |= {"answer_loss": table.loss, "answers_right": table.right}
    model.set_attn_implementation(kernel)
    return row


# --- running ---------------------------------------------------------------------------------------


def run(subject: Subject, draws: int, budgets: list[float], data: dict[str, Any]) -> None:
    """Every row that is not there yet."""
    rows = data.setdefault("rows", {})
    whole = Policy.uniform(subject.model, EXACT)
    size = whole.bytes(LENGTH)
    for draw in range(draws):
        key = f"{subject.name}/{draw}"
        own = rows.setdefault(key, {})
        if "exact" not in own:
            own["exact"] = reads(subject, subject.model, whole, draw, 0, False)
        for share in budgets:
            for name, (make, chunk, eager) in rivals(subject, share * size).items():
                if f"{name}@{share}" not in own:
                    own[f"{name}@{share}"] = reads(subject, subject.model, make, draw, chunk, eager)
                    write(data)
        left = [s for s in budgets if f"mix@{s}" not in own]
        for (name, share), made in (mixes(subject, draw, left) if left else {}).items():
            if name == "profile":
                own["profile_seconds"] = made
                continue
            model, policy, chosen = made
            row = reads(subject, model, policy, draw, 0, False)
            assert row["cache_bytes"] <= share * size, (name, share, row["cache_bytes"], size)
            changed = {n: o for n, o in chosen.items() if o not in (16, 1.0, "all")}
            own[f"{name}@{share}"] = row | {"chosen": changed}
            write(data)
        print(
            key, json.dumps({n: r["bits_per_byte"] for n, r in own.items() if "@" in n}), flush=True
        )


def speeds(subject: Subject, repeats: int) -> dict[str, Any]:
    """Tokens a second of decoding 64 tokens behind 384, the ways in turn."""
    prompt = subject.held(0)[:1, :384]
    ways: dict[str, Any] = {"transformers' own": None}
    for bits in (8, 4, 2):
        ways[f"{bits} bits"] = Policy.uniform(subject.model, replace(EXACT, bits=bits))
    layers = len(Policy.of(subject.model).shapes)
    ways["sliding window of 128"] = partial(Evicting, layers, 128, "recent", SINKS, half=True)
    runs: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, make in ways.items():
            runs[name].append(tokens_a_second(subject.model, prompt, 64, make, repeats=1))
    return {
        name: {
            "tokens_a_second": sorted(r.tokens_a_second for r in own)[len(own) // 2],
            "runs": [r.tokens_a_second for r in own],
            "bytes": own[0].bytes,
        }
        for name, own in runs.items()
    }


def summary(rows: dict[str, Any], draws: int) -> dict[str, Any]:
    """Means over draws, and in how many the mix has the lowest loss of those that fit."""
    out: dict[str, Any] = {}
    for subject in {key.split("/")[0] for key in rows}:
        own = [row for key, row in rows.items() if key.startswith(subject + "/")]
        keys = ("bits_per_byte", "answer_loss", "answers_right", "cache_bytes")
        out[subject] = {
            name: {k: float(np.mean([r[name][k] for r in own])) for k in keys if k in own[0][name]}
            for name in own[0]
            if isinstance(own[0][name], dict) and all(name in r for r in own)
        }
        for share in sorted({n.split("@")[1] for n in out[subject] if "@" in n}):
            others = [
                n for n in out[subject] if n.endswith("@" + share) and not n.startswith("mix")
            ]
            singles = [n for n in out[subject] if n.endswith("@" + share) and n.startswith("mix, ")]
            mix = f"mix@{share}"
            if mix not in out[subject]:
                continue
            for what, rivals_ in (("rivals", others), ("single kinds", singles)):
                for key in ("bits_per_byte", "answer_loss"):
                    if key in own[0][mix] and rivals_:
                        ahead = sum(r[mix][key] < min(r[n][key] for n in rivals_) for r in own)
                        out[subject][f"ahead of {what}@{share}, {key}"] = f"{ahead} of {len(own)}"
    return out


def write(data: dict[str, Any]) -> None:
    """The file, as far as it is."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    """Subjects, draw after draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--subject", nargs="*", choices=sorted(SUBJECTS), default=["looking", "bytes"]
    )
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--speed", action="store_true", help="measure decoding, and nothing else")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    data["machine"] = machine()
    data.pop("note", None)
    budgets = [0.5, 0.27] if args.quick else list(BUDGETS)
    for name in args.subject:
        subject = SUBJECTS[name]()
        if args.speed:
            data.setdefault("speed", {})[name] = speeds(subject, 3 if args.quick else 7)
        else:
            run(subject, 1 if args.quick else args.draws, budgets, data)
        data["summary"] = summary(data.get("rows", {}), args.draws)
        write(data)
    print(json.dumps(data["summary"], indent=1))


if __name__ == "__main__":
    main()
