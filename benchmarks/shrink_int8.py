"""Int8 beside fp32 in ONNX Runtime: how much faster, and how many points it costs.

ResNets for CIFAR-10 as a user brings them: published weights, fine-tuned on the JPEG training images.
Every layer gets 8 bits from `Bits`, without any training; for each seed, ranges come from other 512
training images. ONNX Runtime's own static quantisation of the same fp32 file, on the same images, is
the peer. What is judged are the files: each is run over all test images, and fp32, ours and the peer's
are timed interleaved, one thread, batch 1, ratios taken within a round.

    python benchmarks/shrink_int8.py                                         # 5 seeds: about 10 minutes
    python benchmarks/shrink_int8.py --models resnet20 --seeds 1 --seconds 20
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.compress import Bits, Pretrained
from espalier.costs import OnnxRuntime, machine
from espalier.export import to_onnx
from espalier.tasks import Task
from espalier.train.evaluate import calibration
from shrink_vs_peers import accuracy, original_of, task_of

HERE = Path(__file__).parent
RESULT = HERE / "results" / "shrink_int8.json"
CACHE = HERE.parent / ".cache" / "shrink_int8"
FASTER, LOST = 1.6, 0.005  # the goal
IMAGES = 512  # of calibration
Row = dict[str, Any]


def int8_of(family: Pretrained) -> bytes:
    """The smallest candidate: 8 bits everywhere."""
    network = family.build(family.space.decode(family.space.corner(False))[0])
    return to_onnx(network, family.example(1))


def peer_of(fp32: bytes, images: Tensor) -> bytes:
    """ONNX Runtime's static quantisation: a scale a channel, unsigned activations, minima and maxima."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(torch.split(images, 1))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {"input": part.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        plain, tidy, made = (Path(folder) / f"{n}.onnx" for n in ("plain", "tidy", "made"))
        plain.write_bytes(fp32)
        quantization.shape_inference.quant_pre_process(str(plain), str(tidy))
        quantization.quantize_static(
            str(tidy),
            str(made),
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return made.read_bytes()


def interleaved(files: Sequence[bytes], x: Tensor, rounds: int, seed: int) -> np.ndarray:
    """Milliseconds `(rounds, files)`; within a round the order is drawn anew."""
    runtime, rng = OnnxRuntime(seconds=0.3), np.random.default_rng(seed)
    found = np.zeros((rounds, len(files)))
    for row in found:
        for i in rng.permutation(len(files)):
            row[i] = runtime.quick(files[i], x).median_ms
    return found


def spread(values: Sequence[float] | np.ndarray) -> Row:
    """Median, quartiles, least and greatest."""
    low, lower, middle, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return {"median": middle, "quartiles": [lower, upper], "min": low, "max": high}


def one(name: str, task: Task, fp32: bytes, network: Any, seed: int, rounds: int) -> Row:
    """One seed: the files made, timed side by side, and run over the test images."""
    images = calibration(task, 1, IMAGES, seed)[0]
    example = torch.zeros(2, *task.shape)
    family = Pretrained(network, example, (Bits(),), name=name, calibration=images)
    files = {"fp32": fp32, "int8": int8_of(family), "onnxruntime int8": peer_of(fp32, images)}
    before = machine.snapshot()
    ms = interleaved(list(files.values()), images[:1], rounds, seed)
    load = machine.load_between(before, machine.snapshot())
    row: Row = {"seed": seed, "load": load, "rounds": rounds}
    right: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, data in files.items():
            path = Path(folder) / "network.onnx"
            path.write_bytes(data)
            right[kind] = accuracy(path, task)
    for i, (kind, data) in enumerate(files.items()):
        row[kind] = {
            "ms": spread(ms[:, i]),
            "faster": spread(ms[:, 0] / ms[:, i]),
            "test": right[kind],
            "lost": right["fp32"] - right[kind],
            "bytes": len(data),
        }
    return row


def summary(rows: Sequence[Row]) -> Row:
    """Over seeds: how much faster, what is lost, and whether every seed keeps the goal."""
    out: Row = {}
    for kind in ("int8", "onnxruntime int8"):
        faster = [row[kind]["faster"]["median"] for row in rows]
        lost = [row[kind]["lost"] for row in rows]
        out[kind] = {
            "faster": spread(faster),
            "lost": spread(lost),
            "bytes": rows[0][kind]["bytes"] / rows[0]["fp32"]["bytes"],
            "holds": min(faster) >= FASTER and max(lost) <= LOST,
        }
    return out


def main() -> None:
    """Runs all models, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="of fine-tuning the original")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="originals, and seeds that are done"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    result: Row = {
        "runtime": OnnxRuntime().about(),
        "goal": {"faster": FASTER, "lost": LOST},
        "calibration_images": IMAGES,
        "load_before": round(machine.load_now(1.0), 2),
        "models": {},
    }
    for name in args.models:
        task = task_of(name, args.data)
        network, tuning = original_of(name, task, args.seconds, args.cache)
        fp32 = to_onnx(network, torch.zeros(1, *task.shape))
        rows = []
        for seed in range(args.seeds):
            kept = args.cache / f"{name}-{seed}.json"  # a run that is stopped goes on
            if not kept.exists():
                kept.write_text(json.dumps(one(name, task, fp32, network, seed, args.rounds)))
            rows.append(json.loads(kept.read_text()))
        found = summary(rows)
        result["models"][name] = {"original": tuning, "summary": found, "seeds": rows}
        for kind, line in found.items():
            print(
                f"{name} {kind}: {line['faster']['median']:.2f}x (least {line['faster']['min']:.2f}), "
                f"{100 * line['lost']['median']:.2f} points lost (most {100 * line['lost']['max']:.2f}), "
                f"test {rows[0]['fp32']['test']:.4f} in fp32; holds: {line['holds']}",
                flush=True,
            )
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out.name}")


if __name__ == "__main__":
    main()
