"""Weights in a study's folder: where they stand, written whole or not at all, and seeds for them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from espalier.nets import Family
from espalier.space import Candidate


def derive(seed: int, *names: str) -> int:
    """A seed for a part of the work, the same for the same names (63 bits)."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def weights_path(folder: Path, candidate: Candidate, start: str) -> Path:
    """Where the trained weights of a candidate stand."""
    return folder / "weights" / f"{candidate.id}-{start}.safetensors"


def save_weights(network: Any, path: Path) -> None:
    """Writes every parameter and buffer; a reader sees the old file or the whole new one."""
    state = {k: v.detach().clone().contiguous() for k, v in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    save_file(state, temporary)
    temporary.replace(path)


def load_weights(network: Any, path: Path) -> None:
    """Reads what `save_weights` wrote, in place."""
    network.load_state_dict(load_file(path))


def trained_network(family: Family, candidate: Candidate, weights: Path) -> nn.Module:
    """The plain network of a candidate with trained weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = family.build(candidate)
    load_weights(network, weights)
    return network.eval()
