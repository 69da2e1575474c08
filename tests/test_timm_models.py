"""Models of timm, small: what can be cut of them, and that it runs as it is exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from espalier.compress import Depth, Pretrained, Widths
from espalier.costs.pieces import pieces_of
from espalier.export import to_onnx

timm = pytest.importorskip("timm")  # no dependency: it needs a torchvision that fits torch

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 32, "window_size": 4, "depths": (1, 1)},
        **{"num_heads": (3, 6), "embed_dim": 48},
    },
    "densenet121": {"block_config": (2, 2), "growth_rate": 8},
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_is_cut_and_exported(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **MODELS[name]).eval()
    family = Pretrained(model, IMAGES, (Widths(steps=2), Depth()))
    left = [i.reason for i in family.ignored if i.kind == "width"]
    assert left == ["the model's output"]
    assert type(pieces_of(family)).__name__ == "_Units"
    small = family.build(family.space.decode(family.space.corner(False))[0])
    weights = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert weights[0] < 0.2 * weights[1]
    session = onnxruntime.InferenceSession(to_onnx(small, IMAGES[:1], fast=True))
    found = session.run(None, {session.get_inputs()[0].name: IMAGES[:1].numpy()})[0]
    assert np.allclose(found, small(IMAGES[:1]).detach(), atol=1e-4)
