"""Random crops and flips of whole batches at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None) -> Tensor:
    """Shifts each image `(b, h, w, c)` by up to `padding` pixels each way, edges filled with 0."""
    count, height, width, channels = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    shifts = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = shifts[0][:, None] + torch.arange(height)
    columns = shifts[1][:, None] + torch.arange(width)
    stride = width + 2 * padding
    base = torch.arange(count)[:, None, None] * (height + 2 * padding) * stride
    flat = (base + rows[:, :, None] * stride + columns[:, None, :]).reshape(-1)
    return padded.reshape(-1, channels).index_select(0, flat).view(images.shape)


def random_flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mirrors each image `(b, h, w, c)` left to right with probability one half."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(2), images)
