"""The options of `espalier shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="The trained model: my.py:make_model, called with nothing or with (shape, "
        "classes), or a .pt2 or .onnx file; or a Hugging Face folder: a language model (with "
        "--text), or a ViT or BERT that classifies (with --task)."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(help="A folder of a language model: a text like what it is for, UTF-8."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Its weights: a state dict as .safetensors, .npz or .pt.")
]
Trained = Annotated[str, typer.Option(help="What it was trained for: as for `search`.")]
Most = Annotated[
    list[str] | None,
    typer.Option(
        "--max",
        help="An upper limit, NAME=VALUE, as often as needed: latency_ms=0.3, bytes=200kB, "
        "macs=2M, params=60k, activation_bytes=64kB, or a share of the original's: latency_ms=60%. Of a language model: "
        "bytes, params, active_params, kv_bytes=25%@4096, prefill_ms, decode_ms.",
    ),
]
Budget = Annotated[str, typer.Option(help="The time for everything, repair included: 40s, 10min.")]
Decisions = Annotated[
    str | None,
    typer.Option(
        help="What may be cut, with commas: width, depth, bits, sparsity (width,depth by "
        "default). Settings follow a colon, parted by slashes: bits:8/4 (bits to choose from beside "
        "float), bits:weights/4 (linear layers' weights alone), sparsity:2:4/50% (patterns and shares "
        "that stay), width:multiple=8/steps=6. Of a language model: sublayers, blocks, heads, units or "
        "windows, hidden, experts or merge, active, bits or tables, sparsity, kv or growing, rank, "
        "span (what the limits ask for by default)."
    ),
]
Grouped = Annotated[
    bool, typer.Option("--grouped", help="A language model's layers all keep one shape.")
]
Context = Annotated[
    int | None, typer.Option(help="Tokens of a window of the text; 512 at most by default.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="A language model that is too large for memory: the most that may be held, 4GB. It "
        "goes through layer by layer; the limit is on bytes, all layers keep one shape, --budget "
        "is not used, --resume goes on after the last finished layer."
    ),
]
Solver = Annotated[
    str,
    typer.Option(
        help="auto; allocate: an exact program on what each option harms; search: evolution on "
        "whole candidates; relax, or relax:dsa, relax:pas, relax:bip: masks learned by gradients."
    ),
]
Harm = Annotated[
    str,
    typer.Option(help="What harm is: divergence from the original's outputs, loss, gradient."),
]
Repair = Annotated[
    bool,
    typer.Option("--repair/--no-repair", help="Least squares and fine-tuning after the cut."),
]
Tune = Annotated[
    bool,
    typer.Option("--tune/--no-tune", help="Fine-tuning, after the repair in closed form."),
]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines/--no-baselines",
        help="Cut and repair in plain ways as well: uniform, by one threshold, random.",
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Only list what can be decided, and what not and why.")
]
Reuse = Annotated[
    Path | None,
    typer.Option(help="Take over the table and the profile of this earlier shrink of the model."),
]
