"""Networks as a user's own file: ResNets for CIFAR-10 (He et al., 2016) and a small MobileNetV2.

Plain torch; nothing of Espalier is imported, so that what reads this file reads a stranger's model.
The ResNets take the state of the public ones (github.com/akamaster/pytorch_resnet_cifar10): 32x32
images normalised with ImageNet's mean and standard deviation.

The published shortcut between stages pads with zero channels, which ties the widths of all stages to
one another. With `shortcut="conv"` it is a 1x1 convolution without bias that holds ones and zeros: the
same function, but each stage can be cut on its own.

    espalier shrink benchmarks/models.py:resnet20 --weights resnet20.safetensors --task cifar10 ...
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (16, 32, 64)
WEIGHTS = {  # files in the folder `weights` of ESPALIER_DATA
    "resnet20": "akamaster_resnet20_cifar10.npz",
    "resnet56": "akamaster_resnet56_cifar10.npz",
}


class Pad(nn.Module):
    """Every other pixel `(b, c, h, w) -> (b, c + 2 * pad, h/2, w/2)`, zeros in the channels added."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


def padding_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that computes what `Pad` does."""
    conv = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
    pad = (outputs - inputs) // 2
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[pad : pad + inputs, :, 0, 0] = torch.eye(inputs)
    return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = shortcut == "conv"
            self.shortcut = padding_conv(inputs, outputs) if conv else Pad((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of basic blocks on images `(b, 3, h, w)`; gives logits `(b, 10)`."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, blocks: int, widths: tuple[int, ...] = WIDTHS, shortcut: str = "conv"
    ) -> None:
        super().__init__()
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"shortcut must be 'conv' or 'pad', got {shortcut!r}")
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for index, width in enumerate(widths, 1):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index > 1 and block == 0 else 1
                stage.append(BasicBlock(before, width, stride, shortcut))
                before = width
            self.add_module(f"layer{index}", stage)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(self.pool(out))
        return logits


def resnet20(shortcut: str = "conv") -> ResNet:
    """20 layers, 0.27M parameters."""
    return ResNet(3, shortcut=shortcut)


def resnet56(shortcut: str = "conv") -> ResNet:
    """56 layers, 0.86M parameters."""
    return ResNet(9, shortcut=shortcut)


class Inverted(nn.Module):
    """An inverted bottleneck (Sandler et al., 2018) with a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.body = nn.Sequential(
            *_conv(inputs, wide, 1),
            *_conv(wide, wide, 3, stride, wide),
            *_conv(wide, outputs, 1, relu=False),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.residual else out


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else [])]


class MobileNet(nn.Module):
    """Inverted bottlenecks for images of 16x16: three stages of two blocks; logits `(b, 10)`."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40), expand: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, widths[0], 3))
        blocks: list[nn.Module] = []
        before = widths[0]
        for index, width in enumerate(widths):
            stride = 2 if index else 1
            blocks += [
                Inverted(before, width, stride, expand),
                Inverted(width, width, 1, expand),
            ]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv(before, 4 * before, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(4 * before, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.linear(self.pool(out))
        return logits


def mobilenet() -> MobileNet:
    """A MobileNet for 16x16 images, 166k parameters; there are no trained weights of it.

    Half as wide it takes 0.05 ms, and nothing that can be cut from it takes less than a quarter of that.
    """
    return MobileNet((32, 48, 80))


MODELS = {"resnet20": resnet20, "resnet56": resnet56, "mobilenet": mobilenet}


def load(network: nn.Module, path: Path) -> nn.Module:
    """Puts the arrays of an .npz into a ResNet; shortcuts keep what they are. Evaluation mode.

    Errors: `KeyError` names arrays that are missing or too many.
    """
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    kept = {k: v for k, v in network.state_dict().items() if k not in state}
    odd = [k for k in kept if not k.endswith(("num_batches_tracked", "shortcut.weight"))]
    odd += sorted(set(state) - set(network.state_dict()))
    if odd:
        raise KeyError(f"{path.name} and the network differ in {', '.join(odd)}")
    network.load_state_dict({**kept, **state})
    return network.eval()
