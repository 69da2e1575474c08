"""Makes the table "digits" that ships with the package: every network of `DigitsCells`, trained.

    python benchmarks/digits_table.py train     # all networks, 3 seeds, rows are kept as they come
    python benchmarks/digits_table.py measure   # latency, seconds of an epoch
    python benchmarks/digits_table.py pack      # writes src/espalier/bench/data/digits.npz
    python benchmarks/digits_table.py           # trains a few again, and compares with the table

Each step goes on where it was stopped; --most bounds how many networks it takes. One training is
what `train.fit` gives with RECIPE and the seed of `estimators.Trained(seed=s)`, but for the order in
which floats are added: the three seeds of a network run as the groups of one grouped network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional

from espalier.bench.tables import load
from espalier.costs import OnnxRuntime
from espalier.export import to_onnx
from espalier.nets.digits_cells import DigitsCells
from espalier.space import Candidate
from espalier.tasks import images
from espalier.tasks.images import ImageTask
from espalier.train import Recipe, optimiser
from espalier.train.loop import steps_of
from espalier.train.seeds import generator, global_seed, mixed

Array = NDArray[np.float64]

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "digits_table"
TABLE = ROOT / "src" / "espalier" / "bench" / "data" / "digits.npz"
SEEDS = 3
# Few images to learn from, so that networks differ: the largest made 2% errors with 600.
SPLITS = {"train": 300, "validation": 500, "test": 500}
# 9 epochs give successive halving its levels 1, 3, 9. lr: of 0.05, 0.1 and 0.2 the one with which
# two seeds order 24 random networks most alike (Kendall's tau of 0.83, 0.69, 0.63 in a pilot).
RECIPE = Recipe(epochs=9, batch=32, lr=0.05, weight_decay=5e-4, clip=float("inf"), precision="fp32")
_SHUFFLE = 1  # the purpose of the stream of orders in train.fit
_EVALUATED = 250  # images at a time: what fits the processor's cache
_EPOCH_REPEATS = 4
_SUSPECT = 1.08  # times what its layers explain: such a latency is measured again,
_ROUNDS = 4  # up to so many times, and the least kept: other work only adds
_AGAIN = 300  # networks whose latency is measured twice, to say how well it repeats
_TIMED = 400  # networks whose epochs are timed, to model those of all


def task() -> ImageTask:
    """The digits in the splits of the table."""
    return images("digits", seed=0, **SPLITS)


def seed_of(candidate: Candidate, seed: int) -> int:
    """The seed that `estimators.Trained(seed=seed)` gives a candidate."""
    return mixed(seed, int(candidate.id, 16))


# --- several networks of one architecture as one ------------------------------------------------


class Linears(nn.Module):
    """k linear layers side by side: `(b, k * inputs) -> (b, k, outputs)`."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([x.weight.detach().T for x in layers]))
        # one dimension, so that the optimiser knows it for a bias
        self.bias = nn.Parameter(torch.cat([x.bias.detach() for x in layers]))

    def forward(self, x: Tensor) -> Tensor:
        k, inputs, outputs = self.weight.shape
        out = torch.bmm(x.reshape(len(x), k, inputs).transpose(0, 1), self.weight)
        return out.transpose(0, 1) + self.bias.view(k, outputs)


def together(networks: Sequence[nn.Module]) -> nn.Module:
    """k networks of one architecture as one, `(b, k * c, h, w) -> (b, k, classes)`.

    The channels of network i are the i-th group: convolutions are grouped, batch-norms are per
    channel anyway, so no network sees another.
    """
    first, k = networks[0], len(networks)
    if isinstance(first, nn.Sequential):
        return nn.Sequential(*(together(layers) for layers in zip(*networks, strict=True)))
    if isinstance(first, nn.Conv2d):
        joined = nn.Conv2d(
            k * first.in_channels,
            k * first.out_channels,
            first.kernel_size,
            padding=first.padding,
            groups=k * first.groups,
            bias=False,
        )
        joined.weight = nn.Parameter(torch.cat([n.weight.detach() for n in networks]))
        return joined
    if isinstance(first, nn.BatchNorm2d):
        return nn.BatchNorm2d(k * first.num_features, momentum=first.momentum)  # they start alike
    if isinstance(first, nn.Linear):
        return Linears([n for n in networks if isinstance(n, nn.Linear)])
    return first  # no weights: pooling, ReLU, flatten


def epochs(
    network: nn.Module, data: ImageTask, recipe: Recipe, seeds: Sequence[int]
) -> Iterator[int]:
    """Trains the networks of `together`, each in its seed's order; yields after every epoch."""
    network.to(memory_format=torch.channels_last)
    learner = optimiser.make(network, recipe)
    steps = steps_of(data, recipe.batch)
    for epoch in range(recipe.epochs):
        network.train()
        passes = [
            data.batches("train", recipe.batch, generator(s, epoch, _SHUFFLE), recipe.augment)
            for s in seeds
        ]
        for i, batches in enumerate(zip(*passes, strict=True)):
            for group in learner.param_groups:
                group["lr"] = optimiser.rate(recipe, epoch * steps + i, recipe.epochs * steps)
            x = torch.cat([x for x, _ in batches], dim=1)
            y = torch.stack([y for _, y in batches], dim=1)
            outputs = network(x.contiguous(memory_format=torch.channels_last))
            # the sum over networks: each gets the gradient of its own mean
            loss = functional.cross_entropy(outputs.flatten(0, 1), y.flatten()) * len(seeds)
            loss.backward()
            learner.step()
            learner.zero_grad(set_to_none=True)
        network.eval()
        yield epoch


def curves(
    family: DigitsCells, candidate: Candidate, data: ImageTask, recipe: Recipe, seeds: int = SEEDS
) -> dict[str, list[list[int]]]:
    """Correct images of validation and test, a list a seed of a number an epoch."""
    own = [seed_of(candidate, s) for s in range(seeds)]
    networks = []
    for seed in own:
        with global_seed(seed):
            networks.append(family.build(candidate))
    network = together(networks)
    held = {s: next(data.batches(s, data.size(s))) for s in ("validation", "test")}
    inputs = torch.cat([x for x, _ in held.values()]).repeat(1, seeds, 1, 1)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    right: dict[str, list[list[int]]] = {split: [] for split in held}
    for _ in epochs(network, data, recipe, own):
        with torch.inference_mode():
            outputs = torch.cat([network(part) for part in inputs.split(_EVALUATED)])
            found = outputs.argmax(dim=2).split([len(y) for _, y in held.values()])
        for (split, (_, y)), rows in zip(held.items(), found, strict=True):
            right[split].append((rows == y[:, None]).sum(dim=0).tolist())
    return {split: np.array(rows).T.tolist() for split, rows in right.items()}


# --- the steps ----------------------------------------------------------------------------------


def rows_of(path: Path) -> dict[int, dict[str, Any]]:
    """What was written so far, by row; a last line cut short is left out."""
    out = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        out[entry["row"]] = entry
    return out


def step(path: Path, rows: Any, most: int, work: Any, seed: int, wanted: int | None = None) -> None:
    """Does `work(row)` for rows not done yet, in an order drawn once, and appends what it gives.

    `rows`: how many there are, or which; `wanted`: how many of them are to be done in all.
    """
    done = rows_of(path)
    order = np.random.default_rng(seed).permutation(rows)[:wanted].tolist()
    left = [row for row in order if row not in done]
    start, cpu = time.monotonic(), time.process_time()
    with path.open("a") as file:
        file.write("\n" if done else "")  # ends a line that was cut short
        for n, row in enumerate(left[:most], 1):
            file.write(json.dumps({"row": row, **work(row)}, separators=(",", ":")) + "\n")
            file.flush()
            if n % 50 == 0 or n == len(left[:most]):
                spent, used = time.monotonic() - start, time.process_time() - cpu
                left_min = spent / n * (len(left) - n) / 60
                print(
                    f"{path.name}: {len(done) + n} of {len(order)}; {spent / n:.2f} s a network "
                    f"({used / n:.2f} s of processor), {left_min:.0f} min left",
                    flush=True,
                )


def train_all(folder: Path, most: int) -> None:
    """Trains every network."""
    family, data = DigitsCells(), task()
    candidates = family.space.decode(family.space.enumerate())

    def work(row: int) -> dict[str, Any]:
        return curves(family, candidates[row], data, RECIPE)

    step(folder / "trained.jsonl", len(candidates), most, work, seed=0)


def measure_all(folder: Path, most: int) -> None:
    """Times every network in ONNX Runtime, a part again, and epochs of some trainings."""
    family, data, runtime = DigitsCells(), task(), OnnxRuntime()
    candidates = family.space.decode(family.space.enumerate())
    example = runtime.batched(family.example())

    def built(row: int) -> nn.Module:
        with global_seed(0):
            return family.build(candidates[row])

    def latency(row: int) -> dict[str, Any]:
        model = to_onnx(built(row), example, fast=True)
        return {"latency_ms": runtime.quick(model, example, least_seconds=0.01).median_ms}

    def seconds(row: int) -> dict[str, Any]:
        return {"epoch_seconds": epoch_seconds(built(row), data)}

    step(folder / "latency.jsonl", len(candidates), most, latency, seed=1)
    for i in range(_ROUNDS):
        found = latencies(folder, len(candidates))
        if found is not None:
            step(folder / f"latency_{i}.jsonl", suspects(found), most, latency, seed=10 + i)
    step(folder / "again.jsonl", len(candidates), most, latency, seed=2, wanted=_AGAIN)
    step(folder / "seconds.jsonl", len(candidates), most, seconds, seed=3, wanted=_TIMED)


def epoch_seconds(network: nn.Module, data: ImageTask) -> float:
    """Processor seconds of one training epoch of one network on its own: the least of a few.

    Processor seconds and the least, because other work takes the wall clock's.
    """
    recipe = replace(RECIPE, epochs=_EPOCH_REPEATS)
    alone, least = together([network]), float("inf")
    start = time.process_time()
    for _ in epochs(alone, data, recipe, [0]):
        least, start = min(least, time.process_time() - start), time.process_time()
    return least


def latencies(folder: Path, count: int) -> Array | None:
    """The least latency measured of each network; None while some were never measured."""
    least = np.full(count, np.inf)
    for path in (folder / "latency.jsonl", *sorted(folder.glob("latency_*.jsonl"))):
        for row, entry in rows_of(path).items():
            least[row] = min(least[row], entry["latency_ms"])
    return least if np.isfinite(least).all() else None


def suspects(latency: Array) -> np.ndarray[Any, Any]:
    """Rows that took longer than their layers explain: other work disturbed them, or may have."""
    layers, kept = layer_features(DigitsCells()), np.ones(len(latency), dtype=bool)
    for _ in range(10):  # the sum of layers that most of them agree on
        expected = layers @ relative(layers[kept], latency[kept])
        kept = latency < _SUSPECT * expected
    return np.flatnonzero(~kept)


def relative(features: Array, truth: Array) -> Array:
    """Weights from 0 on with which sums of features are near the truth, in relative error."""
    weights, _ = nnls(features / truth[:, None], np.ones(len(truth)))
    return np.asarray(weights)


def epoch_model(timed: dict[int, dict[str, Any]]) -> tuple[Array, float]:
    """Seconds of an epoch of every network, from those of a few; the median error on others.

    A sum over the layers, each of which has a cost of its own for every operation, stage and width.
    Held out is every fifth network that was timed.
    """
    layers, rows = layer_features(DigitsCells()), np.array(sorted(timed))
    truth = np.array([timed[i]["epoch_seconds"] for i in rows])
    held = np.arange(len(rows)) % 5 == 0
    some = layers @ relative(layers[rows[~held]], truth[~held])
    error = np.abs(some[rows[held]] / truth[held] - 1)
    return layers @ relative(layers[rows], truth), float(np.median(error))


def layer_features(family: DigitsCells) -> Array:
    """How many layers `(n, k)` of each operation, stage and width; and one for the rest."""
    words = [
        [f"{name.partition('.')[0]}={c[name]}/{c['width']}" for name in c if name.startswith("op")]
        + [f"rest/{c['width']}/{c['head']}"]
        for c in family.space.decode(family.space.enumerate())
    ]
    column = {word: i for i, word in enumerate(sorted({w for row in words for w in row}))}
    out = np.zeros((len(words), len(column)))
    for i, row in enumerate(words):
        for word in row:
            out[i, column[word]] += 1
    return out


def pack(folder: Path) -> None:
    """Writes the table, and prints the checksum that the reader expects."""
    family, data = DigitsCells(), task()
    codes = family.space.enumerate()
    every = range(len(codes))
    trained, again, timed = (
        rows_of(folder / f"{name}.jsonl") for name in ("trained", "again", "seconds")
    )
    latency = latencies(folder, len(codes))
    if latency is None or len(trained) != len(codes):
        raise SystemExit("not every network is trained and measured: run those steps first")
    apart = [e["latency_ms"] / latency[i] - 1 for i, e in again.items()]
    low, middle, high = np.quantile(apart, [0.1, 0.5, 0.9])
    print(
        f"latency: {len(suspects(latency))} suspects left; {len(again)} networks measured once more "
        f"took {middle:+.1%} (median; a tenth {low:+.1%} or less, a tenth {high:+.1%} or more)"
    )
    seconds, error = epoch_model(timed)
    print(f"seconds of an epoch: modelled from {len(timed)}, off by {error:.1%} (median)")
    params, macs = family.counts(codes)
    arrays = {
        "codes": codes.astype(np.int8),
        "validation": np.array([trained[i]["validation"] for i in every], dtype=np.uint16),
        "test": np.array([trained[i]["test"] for i in every], dtype=np.uint16),
        "images": np.array([data.size("validation"), data.size("test")], dtype=np.uint16),
        "params": params.astype(np.uint32),
        "macs": macs.astype(np.uint32),
        "latency_ms": latency.astype(np.float32),
        "epoch_seconds": seconds.astype(np.float32),
        "space": np.array(family.space.fingerprint),
        "data": np.array(data.fingerprint),
    }
    test = arrays["test"][:, :, -1]
    print(f"the ceiling given by seeds: tau of {kendalltau(test[:, 1], test[:, 2])[0]:.3f} (test)")
    TABLE.parent.mkdir(exist_ok=True)
    np.savez_compressed(TABLE, **arrays)
    digest = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    print(f"wrote {TABLE.name}: {TABLE.stat().st_size / 1e3:.0f} kB, SHA-256 {digest}")


def check(rows: int) -> None:
    """Trains a few rows again: the counts may differ by rounding, hardly by more."""
    table, family, data = load("digits"), DigitsCells(), task()
    worst = 0
    for row in np.random.default_rng(1).choice(len(table), rows, replace=False):
        candidate = family.space.decode(table.codes[row : row + 1])[0]
        found = curves(family, candidate, data, RECIPE)
        for split, name in (("validation", "val_acc"), ("test", "test_acc")):
            kept = table.curves[name][row] / 100 * data.size(split)
            gap = int(np.abs(np.array(found[split]) - kept)[:, -1].max())
            worst = max(worst, gap)
            print(f"row {row} {split}: at most {gap} of {data.size(split)} images apart")
    print(f"trained {rows} networks again: at most {worst} images apart after the last epoch")


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("train", "measure", "pack", "check"), nargs="?")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--most", type=int, default=10**9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.step == "train":
        train_all(args.folder, args.most)
    elif args.step == "measure":
        measure_all(args.folder, args.most)
    elif args.step == "pack":
        pack(args.folder)
    else:
        check(min(args.most, 5))


if __name__ == "__main__":
    main()
