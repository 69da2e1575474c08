"""Language models made smaller: `espalier`'s decisions beside rules, llm-compressor and ModelOpt.

    python benchmarks/language_vs_peers.py [--models dense stories experts] [--draws 5] [--shares 0.8 ...]
                                           [--methods "espalier mix" ...] [--first 0]

On the Llama of 260,032 weights (War and Peace) and the byte models (source they have not seen): held-out
loss at shares of the bytes of the float32 folder, for draws of the calibration text. A draw deals the text
anew; every way gets its 64 calibration windows of 256 tokens and is tested once on its 64 test windows.
Nothing is trained by any of them. Writes results/language_vs_peers.json after every row; rows that it
holds are not made again. Where a way can't keep a share, the row says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import language_ways as ways
from espalier.errors import EspalierError
from espalier.recipes._parts import language, stories
from espalier.recipes._parts.stories_folder import stories_folder
from espalier.tasks.tokens import encoder, token_text
from peers.environments import PACKAGES

RESULTS = Path(__file__).parent / "results" / "language_vs_peers.json"
CACHE = Path(__file__).parents[1] / ".cache"
KEPT = CACHE / "recipes" / "cpu"  # the byte models, shared with recipes
SHARES = (0.8, 0.6, 0.4, 0.25, 0.15)
MODELS = ("dense", "stories", "experts")
_WINDOWS = (64, 32, 64)  # calibration, validation, test
_CONTEXT = 256
OURS = tuple(f"espalier {kind}" for kind in ways.KINDS)
PEERS = ("llm-compressor sparsegpt", "llm-compressor reap", "modelopt auto_quantize")
METHODS = ("untouched", *OURS, *ways.RULES, *PEERS)


def job(name: str, draw: int) -> ways.Job:
    """A model and a draw of its text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "stories":
        folder = stories_folder(KEPT)
        text = stories.read_text("text", "warandpeace", "warandpeace.txt.xz")[:1_500_000].encode()
        encode = encoder(AutoTokenizer.from_pretrained(folder))
    else:
        folder = language.byte_folder(name, 0, language.STEPS, KEPT)  # type: ignore[arg-type]
        text, encode = (folder / "fresh.txt").read_bytes(), None
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    task = token_text(text, int(model.config.vocab_size), _CONTEXT, encode, _WINDOWS, draw)
    return ways.Job(folder, model, task, draw, CACHE / "language_peers")


def rows(
    work: ways.Job, method: str, shares: list[float], told: Callable[[float, str], None]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(share, row) of one method; `told(share, why)` where it can't."""
    if method.startswith("llm-compressor"):
        done = ways.compressor(work, method.split()[1], shares)
    elif method.startswith("modelopt"):
        done = ways.modelopt(work, shares)
    else:
        yield from _here(work, method, shares, told)
        return
    left = set(shares)
    try:
        for share, row in done:
            left.discard(share)
            yield share, row
    except RuntimeError as error:
        for share in left:
            told(share, str(error))
        return
    for share in left:
        told(share, "it has no setting that keeps this share")


def _here(
    work: ways.Job, method: str, shares: list[float], told: Callable[[float, str], None]
) -> Iterator[tuple[float, dict[str, Any]]]:
    for share in shares:
        start = time.process_time()
        try:
            if method == "untouched":
                model, spent, more = work.model, work.whole, {}
            elif method in OURS:
                model, spent, more = ways.ours(work, method.partition(" ")[2], share)
            else:
                model, spent, more = ways.RULES[method](work, share)
        except EspalierError as error:
            told(share, str(error)[:300])
            continue
        seconds = time.process_time() - start
        yield share, {"loss": work.tested(model), "bytes": spent, "cpu_seconds": seconds, **more}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """For each model and share: mean loss of every method over its draws, and against ours and the mix
    in how many of the draws it is higher."""
    out: dict[str, Any] = {}
    for model in MODELS:
        for share in SHARES:
            own = [r for r in found if r["model"] == model and r["share"] == share and "loss" in r]
            mix = {r["draw"]: r["loss"] for r in own if r["method"] == OURS[0]}
            table = {}
            for method in METHODS:
                loss = {r["draw"]: r["loss"] for r in own if r["method"] == method}
                if loss:
                    both = [d for d in loss if d in mix]
                    table[method] = {
                        "loss": round(mean(loss.values()), 4),
                        "draws": len(loss),
                        "mix_is_lower": sum(mix[d] < loss[d] for d in both),
                        "of": len(both),
                        "bytes": round(mean(r["bytes"] for r in own if r["method"] == method)),
                    }
            if table:
                out.setdefault(model, {})[f"{share:.0%}"] = table
    return out


def write(found: list[dict[str, Any]]) -> None:
    """The file, whole or not at all."""
    about = {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "packages": {k: list(PACKAGES[k]) for k in ("llm-compressor", "modelopt-lm")},
        "windows": dict(zip(("calibration", "validation", "test"), _WINDOWS, strict=True)),
        "context": _CONTEXT,
    }
    data = {**about, "summary": summary(found), "rows": found}
    RESULTS.parent.mkdir(exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(RESULTS)


def main() -> None:
    """Every model, draw and method that is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = (
        json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    )
    for draw in range(args.first, args.first + args.draws):
        for name in args.models:
            work = None
            for method in args.methods:
                key = {"model": name, "draw": draw, "method": method}
                known = {r["share"] for r in found if key.items() <= r.items()}
                shares = [s for s in args.shares if s not in known]
                if not shares or (name != "experts" and method.split()[-1] in ("experts", "reap")):
                    continue
                work = work or job(name, draw)

                def add(share: float, row: dict[str, Any], key: dict[str, Any] = key) -> None:
                    found.append({**key, "share": share, **row})
                    write(found)
                    shown = row.get("loss", row.get("why"))
                    print(*key.values(), share, shown, flush=True)

                for share, row in rows(work, method, shares, lambda s, why: add(s, {"why": why})):
                    add(share, row)


if __name__ == "__main__":
    main()
