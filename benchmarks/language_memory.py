"""Memory and time of going through a language model layer by layer, against its depth.

    python benchmarks/language_memory.py [--layers 8 16 32 64] [--memory 100]

Random Llamas of growing depth are written to disk, a layer of 9 MB in float32 each, and read back in a
process of their own: whole; layer by layer under a limit of `--memory` MB beside what the process
holds before; and layer by layer while what blocks, widths and heads harm is read, as `espalier shrink
--memory` does, without a limit. Peaks are the system's count of resident memory; seconds are the
processor's, of one thread. Goals: the limit is kept at every depth, the loss is the whole model's,
time is linear in layers. Rows that are there are kept; a row is written when it is made. Writes
results/language_memory.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULT = Path(__file__).parent / "results" / "language_memory.json"
WIDTH, UNITS, HEADS, VOCABULARY, CONTEXT = 512, 1024, 8, 1024, 128
WINDOWS = 8
MODES = ("layers", "harms", "whole")


def write(place: Path, layers: int) -> int:
    """Write a model, never holding more than a layer of it: bytes of its weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    place.mkdir(parents=True)
    LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=UNITS,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(place)
    keys = WIDTH // 2
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (keys, WIDTH),
        "self_attn.v_proj": (keys, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (UNITS, WIDTH),
        "mlp.up_proj": (UNITS, WIDTH),
        "mlp.down_proj": (WIDTH, UNITS),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    rest: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, WIDTH),
        "model.norm": (WIDTH,),
        "lm_head": (VOCABULARY, WIDTH),
    }
    draw, where, total = torch.Generator().manual_seed(0), {}, 0
    for i in range(layers + 1):
        own = {f"model.layers.{i}.{n}": s for n, s in shapes.items()} if i < layers else rest
        part = {
            f"{n}.weight": torch.empty(s).normal_(0, 0.03, generator=draw) for n, s in own.items()
        }
        name = f"part-{i:03d}.safetensors"
        save_file(part, place / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def read(place: Path, mode: str, megabytes: int) -> dict[str, Any]:
    """In a process of its own: peak, loss and time of one way to read a model."""
    from espalier.compress.language.files.folder import read_folder
    from espalier.compress.language.layer_by_layer.held import Peak
    from espalier.compress.language.layer_by_layer.layerwise import Layerwise
    from espalier.compress.language.layer_by_layer.narrow import Harms, narrow_room
    from espalier.testing.language import tiny

    torch.set_num_threads(1)
    tiny("llama")(torch.zeros(1, 2, dtype=torch.long))  # whatever is loaded once is loaded
    windows = torch.randint(
        VOCABULARY, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(1)
    )
    folder = read_folder(place)
    with Peak() as peak:
        held = peak.now()
        began, wall = time.process_time(), time.perf_counter()
        limit = held + megabytes * 1_000_000
        if mode == "whole":
            model = folder.model()
            with torch.no_grad():
                logits = model(windows, use_cache=False).logits[:, :-1]
            loss = float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            )
            most = peak.most()
        else:
            through = Layerwise(folder, limit if mode == "layers" else 1 << 40, batch=2)
            room = max(narrow_room(layer) for layer in through.pieces.own.layers)
            harms = Harms((0.75, 0.5), (0.5,)) if mode == "harms" else None
            passed = through.run(windows, harms, room=room if harms else 0)
            loss, most = passed.loss or 0.0, passed.peak
        seconds, wall = time.process_time() - began, time.perf_counter() - wall
    return {
        "peak_mb": (most - held) / 1e6,
        "held_before_mb": held / 1e6,
        "kept": most <= limit,
        "loss": loss,
        "seconds": seconds,
        "wall_seconds": wall,
    }


def main() -> None:
    """A row a depth and way, written as they are made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--memory", type=int, default=100, help="MB beside what is held before")
    parser.add_argument("--ways", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(read(Path(asked.read[0]), asked.read[1], asked.memory)))
        return
    rows: list[dict[str, Any]] = []
    if RESULT.is_file():
        rows = json.loads(RESULT.read_text())["rows"]
    made = {(row["layers"], row["way"]) for row in rows}
    for layers in asked.layers:
        left = [mode for mode in asked.ways if (layers, mode) not in made]
        with tempfile.TemporaryDirectory() as place:
            size = write(Path(place) / "model", layers) if left else 0
            for mode in left:
                words = [sys.executable, __file__, "--read", f"{place}/model", mode]
                words += ["--memory", str(asked.memory)]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({"layers": layers, "model_mb": size / 1e6, "way": mode, **found})
                print(json.dumps(rows[-1]), flush=True)
                keep(sorted(rows, key=lambda row: (row["layers"], row["way"])), asked.memory)


def keep(rows: list[dict[str, Any]], memory: int) -> None:
    """Write all rows."""
    told = {
        "width": WIDTH,
        "units": UNITS,
        "windows": WINDOWS,
        "context": CONTEXT,
        "limit_mb": memory,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
