"""Small models, as users write them, and a cut of widths that needs no package."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress import BoundCut, Cut
from espalier.space import ordinal

IMAGES = torch.zeros(2, 1, 8, 8)
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Block(nn.Module):
    """A basic block; in torchvision's manner one ReLU is used twice, and the addition is in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, in_place: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=in_place)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            out += shortcut
        else:
            out = out + shortcut
        return self.relu(out)


def resnet(in_place: bool = False) -> nn.Sequential:
    """Three blocks; the second has a projection."""
    stem = [nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [Block(8, 8, 1, in_place), Block(8, 16, 2, in_place), Block(16, 16, 1, in_place)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return trained(nn.Sequential(*stem, *blocks, *head))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, c))
        return out


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.scale = Scale(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.attn(self.norm1(x)))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Weights of its own (class token, positions), attention by hand, scales of layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.ModuleList(Layer(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


class Language(nn.Module):
    """Tokens in, torch's own attention with keywords, one weight for embedding and head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.ReLU(inplace=True), nn.Linear(24, width))
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = self.head(x + self.mlp(x))
        return out


class Growing(nn.Module):
    """Its output is its input and more: as in DenseNet."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.conv(x))], 1)


def dense() -> nn.Sequential:
    """Concatenations, then plain layers whose input and output are alike."""
    body = [nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), Growing(8), Growing(16)]
    head = [nn.Conv2d(24, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, *head, nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))


def trained(model: nn.Module) -> nn.Module:
    """As if it were trained: norms that are no identities."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            module.running_var.mul_(1 + torch.rand(module.num_features, generator=generator))
    return model.eval()


class Narrow(Cut):
    """The inner channels of blocks: the first `k` of `conv1`; and all channels after `stem`."""

    kind = "width"

    def bind(self, model: nn.Module, example: Tensor) -> BoundNarrow:
        return BoundNarrow(model)


class BoundNarrow(BoundCut):
    def __init__(self, model: nn.Module) -> None:
        self._blocks = {
            f"width:{path}.conv1": path for path, m in model.named_modules() if type(m) is Block
        }
        self.decisions = tuple(
            ordinal(name, 2, 4, model.get_submodule(path).conv1.out_channels)
            for name, path in self._blocks.items()
        )

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        return {
            f"{path}.{leaf}": (name,)
            for name, path in self._blocks.items()
            for leaf in ("conv1", "bn1", "conv2")
        }

    def slice(self, name, layer, choices):
        layer = copy.deepcopy(layer)
        block, _, leaf = name.rpartition(".")
        return narrowed(layer, leaf, choices[f"width:{block}.conv1"])

    def apply(self, model, choices) -> None:
        for name, path in self._blocks.items():
            for leaf in ("conv1", "bn1", "conv2"):
                narrowed(getattr(model.get_submodule(path), leaf), leaf, choices[name])


def narrowed(layer, leaf: str, k: int):
    """The layer with its first `k` channels, in place."""
    if leaf == "conv2":
        layer.weight = nn.Parameter(layer.weight.detach()[:, :k].clone())
        layer.in_channels = k
        return layer
    layer.weight = nn.Parameter(layer.weight.detach()[:k].clone())
    if leaf == "conv1":
        layer.out_channels = k
        return layer
    layer.bias = nn.Parameter(layer.bias.detach()[:k].clone())
    layer.running_mean, layer.running_var = (
        layer.running_mean[:k].clone(),
        layer.running_var[:k].clone(),
    )
    layer.num_features = k
    return layer
