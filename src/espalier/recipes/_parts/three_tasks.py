"""Three tasks on one picture, and a supernet that spends its blocks at three resolutions.

A handwritten digit lies somewhere on a canvas four times its area, under noise and between scraps of
other digits. Which digit is it, which pixels are its own, and in which box does it lie?
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import tasks
from espalier.nets import Supernet
from espalier.nets.elastic import Skippable
from espalier.problem import Metric
from espalier.space import choice
from espalier.tasks import Split
from espalier.tasks.tensors import SPLITS, TensorTask

NAMES = ("class", "mask", "box")
SIDE, _DIGIT = 16, 8
CLASSES = 10
_INK = 0.3  # a pixel of a digit is its own from this share of black
_OUTPUTS = {"class": CLASSES, "mask": SIDE * SIDE, "box": 4}
_METRICS = {"class": "accuracy", "mask": "mask_iou", "box": "box_iou"}
Array = NDArray[np.float32]


class Canvas(TensorTask):
    """Canvases with the targets of all three tasks, and the losses of those in `names`.

    Inputs `(b, 1, 16, 16)`. Targets `(b, 261)`: the digit, its mask row by row, its box (left, top,
    right, bottom, as shares of the side). Outputs: logits of digits, of pixels, and the box, as far
    as `names` has them, side by side. Metrics: accuracy, mean intersection over union of masks and
    of boxes. `seen` has each task's loss on the last batches that `loss` was asked about.
    """

    def __init__(
        self, splits: Mapping[Split, tuple[Tensor, Tensor]], names: Sequence[str] = NAMES
    ) -> None:
        self.names = tuple(names)
        super().__init__(splits, sum(_OUTPUTS[n] for n in self.names), "+".join(self.names))
        self.metrics = tuple(Metric(_METRICS[n], goal="max", how="measured") for n in self.names)
        self.seen: deque[Tensor] = deque(maxlen=16)

    def only(self, *names: str) -> Canvas:
        """The same canvases, with some of the tasks."""
        return Canvas(self._splits, names)

    def parts(self, outputs: Tensor) -> dict[str, Tensor]:
        """The outputs of each task."""
        widths = [_OUTPUTS[n] for n in self.names]
        return dict(zip(self.names, torch.split(outputs, widths, dim=1), strict=True))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the tasks' losses, each of about the same size."""
        each = torch.stack([_LOSSES[n](part, targets) for n, part in self.parts(outputs).items()])
        self.seen.append(each.detach())
        return each.sum()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The metric of each task."""
        return {_METRICS[n]: _SCORES[n](part, targets) for n, part in self.parts(outputs).items()}

    def _settings(self) -> str:
        return f"{self.names}"


def _classify(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets[:, 0].long())


def _paint(outputs: Tensor, targets: Tensor) -> Tensor:
    return 4 * F.binary_cross_entropy_with_logits(outputs, targets[:, 1:-4])


def _frame(outputs: Tensor, targets: Tensor) -> Tensor:
    return 10 * F.smooth_l1_loss(outputs, targets[:, -4:], beta=0.1)


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets[:, 0]).float().mean())


def _overlap_of_masks(outputs: Tensor, targets: Tensor) -> float:
    found, wanted = outputs > 0, targets[:, 1:-4] > 0.5
    both = (found & wanted).sum(1) / (found | wanted).sum(1).clamp_min(1)
    return float(both.mean())


def _overlap_of_boxes(outputs: Tensor, targets: Tensor) -> float:
    wanted = targets[:, -4:]
    low, high = torch.maximum(outputs, wanted)[:, :2], torch.minimum(outputs, wanted)[:, 2:]
    both = (high - low).clamp_min(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp_min(0).prod(1) for box in (outputs, wanted)]
    return float((both / (areas[0] + areas[1] - both).clamp_min(1e-6)).mean())


_LOSSES = {"class": _classify, "mask": _paint, "box": _frame}
_SCORES = {"class": _accuracy, "mask": _overlap_of_masks, "box": _overlap_of_boxes}


def canvases(train: int, validation: int, test: int, seed: int = 0) -> Canvas:
    """The three tasks on so many canvases a split; no digit is in two splits."""
    source = tasks.images("digits")
    white = torch.tensor(source.normalisation["std"]), torch.tensor(source.normalisation["mean"])
    splits: dict[Split, tuple[Tensor, Tensor]] = {}
    for index, (split, count) in enumerate(zip(SPLITS, (train, validation, test), strict=True)):
        x, y = next(source.batches(split, source.size(split)))
        digits = (x * white[0] + white[1])[:, 0].numpy()
        splits[split] = _drawn(digits, y.numpy(), count, np.random.default_rng([seed, index]))
    return Canvas(splits)


def _drawn(
    digits: Array, labels: NDArray[np.int64], count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    inputs = np.zeros((count, 1, SIDE, SIDE), dtype=np.float32)
    targets = np.zeros((count, 1 + SIDE * SIDE + 4), dtype=np.float32)
    for i in range(count):
        chosen = int(rng.integers(len(digits)))
        canvas, mask = _canvas(digits, chosen, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        inputs[i, 0] = canvas
        targets[i, 0], targets[i, 1:-4] = labels[chosen], mask.ravel()
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        targets[i, -4:] = np.array(box) / SIDE
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _canvas(
    digits: Array, chosen: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.bool_]]:
    """A canvas and the digit's mask: scraps of three others, the digit over them, noise."""
    canvas = np.zeros((SIDE, SIDE), dtype=np.float32)
    mask = np.zeros((SIDE, SIDE), dtype=np.bool_)
    half = _DIGIT // 2
    for other in rng.integers(len(digits), size=3):
        top, left = rng.integers(0, SIDE - half + 1, size=2)
        y, x = rng.integers(0, half + 1, size=2)
        canvas[top : top + half, left : left + half] = digits[other][y : y + half, x : x + half]
    top, left = rng.integers(0, SIDE - _DIGIT + 1, size=2)
    place = (slice(top, top + _DIGIT), slice(left, left + _DIGIT))
    canvas[place] = digits[chosen]
    mask[place] = digits[chosen] >= _INK
    noise = rng.standard_normal(canvas.shape).astype(np.float32)
    return 2 * canvas - 0.5 + 0.4 * noise, mask


class Pyramid(Supernet):
    """Blocks at three resolutions, each run or skipped, and a head for each task.

    A stage has `depth` blocks, a 3x3 convolution with a shortcut each; twice the channels at half
    the side make every block cost the same. Decisions `stage{s}.{i}`: whether block i runs. The
    class is read off the last stage, pooled; the box off its places; the mask off all three stages,
    brought to full size and added.
    """

    def __init__(self, names: Sequence[str] = NAMES, width: int = 8, depth: int = 4) -> None:
        super().__init__((1, SIDE, SIDE), sum(_OUTPUTS[n] for n in names))
        self.names, self.depth = tuple(names), depth
        self.stem = _layer(1, width)
        for stage in range(1, 4):
            inside = width * 2 ** (stage - 1)
            blocks = [
                Skippable(choice(f"stage{stage}.{i}", False, True), _Block(inside))
                for i in range(depth)
            ]
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            if stage < 3:
                self.add_module(f"down{stage}", _layer(inside, 2 * inside, stride=2))
        heads: dict[str, type[_Head]] = {"class": _Class, "mask": _Mask, "box": _Box}
        self.heads = nn.ModuleDict({f"{n}_head": heads[n](width) for n in self.names})

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for stage in (1, 2, 3):
            x = self.get_submodule("stem" if stage == 1 else f"down{stage - 1}")(x)
            x = self.get_submodule(f"stage{stage}")(x)
            levels.append(x)
        return torch.cat([head(*levels) for head in self.heads.values()], dim=1)


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, relu=nn.ReLU()))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = _layer(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x)
        return out


class _Head(nn.Module):
    """Reads the outputs of the three stages."""

    def __init__(self, width: int) -> None:
        super().__init__()


class _Class(_Head):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.linear = nn.Linear(4 * width, CLASSES)

    def forward(self, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
        out: Tensor = self.linear(F.adaptive_avg_pool2d(three, 1).flatten(1))
        return out


class _Mask(_Head):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.one, self.two, self.three = (
            nn.Conv2d(width * 2**level, width, 1) for level in range(3)
        )
        self.pixel = nn.Conv2d(width, 1, 1)

    def forward(self, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
        total = self.one(one)
        for layer, level, times in ((self.two, two, 2), (self.three, three, 4)):
            total = total + F.interpolate(layer(level), scale_factor=times, mode="nearest")
        out: Tensor = self.pixel(F.relu(total)).flatten(1)
        return out


class _Box(_Head):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.linear = nn.Linear(4 * width * (SIDE // 4) ** 2, 4)

    def forward(self, one: Tensor, two: Tensor, three: Tensor) -> Tensor:
        # many positive features: at their own size a step of the linear layer goes too far
        out: Tensor = self.linear(three.flatten(1) / self.linear.in_features**0.5)
        return out
