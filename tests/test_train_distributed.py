"""Two processes under torchrun train as one does, agree with each other, and survive a kill."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from espalier import nets, tasks, train
from espalier.errors import EspalierError
from espalier.nets import elastic
from espalier.recipes._parts.three_tasks import Pyramid, canvases
from espalier.recipes.fbnetv5 import PLANS, Several
from espalier.space import choice, ordinal
from espalier.train import Recipe, Uniform, distributed
from espalier.train.shift import Shift, Shifting

RECIPE = Recipe(epochs=2, batch=33, lr=0.1, precision="fp32", augment=True)


def task():
    # batches of 33, 33 and 5 examples: shares of 17 and 16, 3 and 2
    pixels = np.random.default_rng(0).integers(0, 256, (131, 8, 8, 1)).astype(np.uint8)
    return tasks.images((pixels, np.arange(131) % 4), train=71, validation=30, test=30)


class Plain(nets.Supernet):
    """No batch norm: its statistics would be those of half a batch."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        width, inner = ordinal("width", 4, 8), ordinal("inner", 8, 16, 24)
        self.first = elastic.Conv2d(shape[0], width, stride=2)
        self.act = nn.ReLU()
        self.second = elastic.Conv2d(width, inner, kernel=choice("kernel", 1, 3))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = elastic.Linear(inner, classes)


def plain(data):
    return Plain(data.shape, data.classes)


def convolutional(data):
    return nets.MobileNet(
        data.shape, data.classes, stem=4, widths=[8, 8, 8], depth=1, kernel=3, expansion=(1, 2), head=16
    )  # fmt: skip


def alone(data):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, data.classes))


def steps_up(weights):
    """A price: 1, and 1 for each step from an option to the next."""
    return 1 + sum(rows @ torch.arange(float(rows.shape[1])) for rows in weights.values())


def made(make, data, seed):
    torch.manual_seed(seed)
    return make(data)


def supernet(net, data, **more):
    return train.train_supernet(net, data, RECIPE, 0, paths=Uniform(2), **more)


def save(net, path):
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, path)


def worker(folder: Path, attempt: int) -> None:
    """What each process runs; the first attempt is killed in its second epoch."""
    from espalier.train import loop

    loop._SECONDS_BETWEEN_CHECKPOINTS = 0.0
    torch.set_num_threads(1)
    data = task()
    with distributed.group("gloo") as rank:
        assert distributed.ranks() == 2
        if attempt == 0:
            # ranks start from other weights: those of the first count
            for name, make in (("plain", plain), ("convolutional", convolutional)):
                net = made(make, data, rank)
                history = supernet(net, data)
                save(net, folder / f"{name}-{rank}.safetensors")
                (folder / f"{name}-{rank}.json").write_text(json.dumps(history))
            net = made(alone, data, rank)
            train.fit(net, data, RECIPE, 0)
            save(net, folder / f"alone-{rank}.safetensors")
            net = made(plain, data, 0)
            paths = Shifting(net.space, steps_up, Shift(bins=2, every=1, warmup=2))
            train.train_supernet(net, data, RECIPE, 0, paths=paths)
            save(paths.generator, folder / f"generator-{rank}.safetensors")
            canvas, plan = canvases(36, 8, 8), replace(PLANS["smoke"], warmup=0.0, paths=3)
            several = Several(canvas, plan, Pyramid(canvas.names).space)
            train.train_supernet(Pyramid(canvas.names), canvas, RECIPE, 0, paths=several)
            save(several.distributions, folder / f"several-{rank}.safetensors")

        def die(epoch: int, step: int) -> None:
            if attempt == 0 and (epoch, step) == (1, 1) and rank == 1:
                os.kill(os.getpid(), 9)

        net = made(convolutional, data, rank + 10 * attempt)
        kept = folder / ("kept.safetensors" if rank == 0 else "elsewhere.safetensors")
        supernet(net, data, checkpoint=kept, after_step=die)
        save(net, folder / f"resumed-{rank}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run of two processes: torchrun starts them anew after the kill."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=0.1", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "alone-1.safetensors").exists(), done.stderr[-3000:]
    return folder


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    "name", ["plain", "convolutional", "alone", "generator", "several", "resumed"]
)
def test_processes_end_with_equal_weights(folder, name):
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert equal(first, second)
    assert len(first) > 1
    assert any(t.unique().numel() > 1 for t in first.values())


def test_two_processes_train_as_one_does(folder):
    data = task()
    net = made(plain, data, 0)
    history = supernet(net, data)
    told = json.loads((folder / "plain-0.json").read_text())
    assert [row["loss"] for row in told] == pytest.approx(
        [row["loss"] for row in history], rel=1e-4
    )
    for name, tensor in load_file(folder / "plain-0.safetensors").items():
        assert torch.allclose(tensor, net.state_dict()[name], atol=1e-4), name
    start = made(plain, data, 0).state_dict()
    assert not equal(start, net.state_dict())


def test_one_network_is_trained_as_well(folder):
    data = task()
    net = made(alone, data, 0)
    train.fit(net, data, RECIPE, 0)
    for name, tensor in load_file(folder / "alone-0.safetensors").items():
        assert torch.allclose(tensor, net.state_dict()[name], atol=1e-5), name


def test_killed_and_resumed_is_the_same_training(folder):
    whole, resumed = (
        load_file(folder / f"{n}-0.safetensors") for n in ("convolutional", "resumed")
    )
    assert equal(whole, resumed)
    assert (folder / "kept.safetensors").exists()
    assert not (folder / "elsewhere.safetensors").exists()  # the first process keeps the record


def test_a_batch_too_small_for_all(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    with pytest.raises(EspalierError, match="make it 8 at least"):
        distributed.check_batch(7)
    distributed.check_batch(8)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
