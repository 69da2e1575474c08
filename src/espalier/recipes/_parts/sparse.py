"""Sparse 1x1 convolutions on a processor: kernels, gradual pruning, and an engine that runs both kinds.

A 1x1 convolution of one image is a matrix `(outputs, inputs)` times pixels `(inputs, pixels)`. Three
kernels compute it: BLAS; compressed rows, each of whose weights scales a row of pixels; and blocks, in
which several outputs read the same inputs, so that rows are gathered once and BLAS does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Matrix = NDArray[np.float32]
Kernel = Callable[[Matrix], Matrix]


def dense(weight: Matrix) -> Kernel:
    """The product by BLAS."""
    kept = np.ascontiguousarray(weight)
    return lambda x: np.asarray(kept @ x)


def rows(weight: Matrix) -> Kernel:
    """The product by compressed sparse rows (SciPy's)."""
    from scipy.sparse import csr_matrix

    kept = csr_matrix(weight)
    return lambda x: np.asarray(kept @ x)


class Blocks:
    """The product where each `size` outputs in a row read the same inputs.

    The inputs of all blocks are gathered and multiplied in one batched product. Blocks that read
    fewer inputs than others read some with weight 0.
    """

    def __init__(self, weight: Matrix, size: int) -> None:
        outputs, inputs = weight.shape
        parts = weight.reshape(outputs // size, size, inputs)
        used = (parts != 0).any(1)
        most = max(1, int(used.sum(1).max()))
        # a stable order puts the inputs that are read first
        self._read = np.argsort(~used, axis=1, kind="stable")[:, :most]
        index = np.broadcast_to(self._read[:, None], (len(parts), size, most))
        self._weight = np.ascontiguousarray(np.take_along_axis(parts, index, 2))

    def __call__(self, x: Matrix) -> Matrix:
        """Outputs `(outputs, pixels)` of `(inputs, pixels)`."""
        gathered = np.take(x, self._read, axis=0, mode="clip")
        out: Matrix = (self._weight @ gathered).reshape(-1, x.shape[1])
        return out


KERNELS: dict[str, Callable[[Matrix, int], Kernel]] = {
    "dense": lambda weight, size: dense(weight),
    "rows": lambda weight, size: rows(weight),
    "blocks": lambda weight, size: Blocks(weight, size),
}


def block_mask(weight: Tensor, kept: float, size: int) -> Tensor:
    """1 where a block of `size` outputs keeps an input, by the norm of its weights; `(o, i, 1, 1)`.

    Every block keeps the same number of inputs, so that the batched product has no holes.
    """
    outputs, inputs = weight.shape[:2]
    norms = weight.detach().float().reshape(outputs // size, size, inputs).square().sum(1)
    count = max(1, round(kept * inputs))
    chosen = torch.zeros_like(norms).scatter_(1, norms.topk(count, 1).indices, 1.0)
    return chosen.repeat_interleave(size, 0)[:, :, None, None]


class Gradual(nn.Conv2d):
    """A 1x1 convolution that is pruned while it learns (Zhu & Gupta, To prune, or not to prune, 2017).

    The share of weights that are zero grows to `sparsity` by a cubic between the steps `begin` and
    `end` of training; on the way the mask is drawn anew twenty times.
    """

    mask: Tensor
    steps: Tensor

    def __init__(
        self, inputs: int, outputs: int, sparsity: float, span: tuple[int, int], size: int = 8
    ) -> None:
        super().__init__(inputs, outputs, 1, bias=False)
        self.sparsity, self.span, self.size = sparsity, span, size
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def now(self) -> float:
        """The sparsity that the schedule wants at this step."""
        begin, end = self.span
        progress = min(1.0, max(0.0, (int(self.steps) - begin) / max(1, end - begin)))
        return self.sparsity * (1 - (1 - progress) ** 3)

    def _prune(self, step: int) -> None:
        begin, end = self.span
        every = max(1, (end - begin) // 20)
        if begin <= step <= end and ((step - begin) % every == 0 or step == end):
            self.mask.copy_(block_mask(self.weight, 1 - self.now(), self.size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.sparsity:
            self._prune(int(self.steps))
            self.steps += 1
        return functional.conv2d(x, self.weight * self.mask)


class Separable(nn.Module):
    """A depthwise 3x3 convolution and a 1x1 one, a norm and ReLU behind each (MobileNet, 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int, pointwise: nn.Conv2d) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.pointwise = pointwise

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.depthwise(x)))
        return functional.relu(self.norm2(self.pointwise(x)))


def _folded(weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias with the norm behind it in them."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class Engine:
    """Runs a stem, separable blocks and a linear layer on one image, norms folded.

    The 1x1 convolutions run in the kernel of the given name, all else in torch; the same code runs
    dense and sparse networks, so that their times can be compared.
    """

    def __init__(self, network: nn.Sequential, kernel: str, size: int = 8) -> None:
        stem, norm, *others = network
        assert isinstance(stem, nn.Conv2d)
        with torch.no_grad():
            self._stem = _folded(stem.weight, norm)
            self._blocks = [
                self._block(m, kernel, size) for m in others if isinstance(m, Separable)
            ]
        linear = others[-1]
        assert isinstance(linear, nn.Linear)
        self._linear = linear

    def _block(
        self, block: Separable, kernel: str, size: int
    ) -> tuple[Tensor, Tensor, int, Kernel, Matrix]:
        layer = block.pointwise
        weight = layer.weight * layer.mask if isinstance(layer, Gradual) else layer.weight
        spatial, shift = _folded(block.depthwise.weight, block.norm1)
        mixing, bias = _folded(weight, block.norm2)
        run = KERNELS[kernel](mixing[:, :, 0, 0].numpy(), size)
        return spatial, shift, int(block.depthwise.stride[0]), run, bias[:, None].numpy()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits of one image `(1, c, h, w)`."""
        x = functional.conv2d(x, *self._stem, padding=1).relu_()
        for spatial, shift, stride, run, bias in self._blocks:
            x = functional.conv2d(x, spatial, shift, stride, 1, groups=len(spatial)).relu_()
            mixed = run(x[0].flatten(1).numpy())
            mixed += bias
            np.maximum(mixed, 0, out=mixed)
            x = torch.from_numpy(mixed).reshape(1, -1, *x.shape[2:])
        logits: Tensor = self._linear(x.mean((2, 3)))
        return logits


def network(
    channels: int,
    classes: int,
    widths: Sequence[int],
    depth: int,
    sparsity: float = 0.0,
    span: tuple[int, int] = (0, 1),
    size: int = 8,
) -> nn.Sequential:
    """A stem and stages of separable blocks, the 1x1 convolutions pruned while they learn."""
    stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    before = widths[0]
    for index, width in enumerate(widths):
        for block in range(depth):
            stride = 2 if index and not block else 1
            pointwise = Gradual(before, width, sparsity, span, size)
            layers.append(Separable(before, width, stride, pointwise))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
