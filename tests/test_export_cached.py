"""Language models as ONNX with cache inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import KINDS, anatomy
from espalier.compress.language.shape.surgery import drop, keep_heads, keep_units
from espalier.compress.language.weights.rounding import nearest
from espalier.errors import ExportError
from espalier.export.cached import CachedSession, compare_cached, export_cached
from espalier.export.cached_forward import CachedForward
from espalier.testing.language import tiny
from espalier.train.seeds import generator

IDS = torch.randint(64, (2, 20), generator=generator(0))


def groups(model: Any) -> list[tuple[int, int]]:
    return [(x.attention.groups, x.attention.head) for x in anatomy(model).layers if x.attention]


@pytest.mark.parametrize("kind", sorted(name for name, kind in KINDS.items() if kind.decoder))
def test_a_function_of_tensors_gives_what_the_model_gives(kind: str) -> None:
    """With windows and without; two parts through the cache are the whole."""
    more = {"sliding_window": 8} if kind in ("mistral", "mixtral") else {}
    model = tiny(kind, **more)
    run = CachedForward(model, len(groups(model)))
    none = [torch.zeros(2, g, 0, head) for g, head in groups(model) for _ in "kv"]
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        first, *past = run(IDS[:, :11], *none)
        second, *_ = run(IDS[:, 11:], *past)
    assert torch.allclose(torch.cat([first, second], 1), wanted, atol=2e-4)


@pytest.fixture(scope="module")
def mixed() -> Any:
    """No attention in one layer, other heads and units in another: no configuration can say it."""
    model = tiny("llama", layers=3, width=64)
    drop(model, 1, "attention")
    keep_units(model, 0, torch.arange(32))
    keep_heads(model, 2, torch.tensor([1]))
    return model


@pytest.fixture(scope="module")
def written(mixed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict]:
    packed = {}
    for name, bits in (("layers.0.mlp.up_proj", 4), ("layers.1.mlp.down_proj", 8)):
        weight = mixed.get_parameter(f"model.{name}.weight")
        packed[f"model.{name}.weight"] = codes = nearest(weight, None, bits)
        with torch.no_grad():
            weight.copy_(codes.values())
    folder = tmp_path_factory.mktemp("cached")
    done = export_cached(mixed, groups(mixed), folder, prompt=IDS, packed=packed)
    return folder, done, packed


def test_files_compute_the_same_and_write_the_same_text(written: Any, mixed: Any) -> None:
    folder, done, _ = written
    assert done.tokens == {"onnx": 54, "pt2": 54}  # 10 of the context's 64 are the prompt
    assert max(done.differences.values()) < 1e-4
    session = CachedSession(folder / "model.onnx")
    held = session.empty(2)
    assert [p.shape for p in held] == [(2, 2, 0, 8)] * 2 + [(2, 1, 0, 8)] * 2
    for token in IDS.numpy().T[:6]:  # token by token is the whole at once
        logits, held = session(token[:, None], held)
    with torch.no_grad():
        wanted = mixed(IDS[:, :6]).logits[:, -1]
    assert np.abs(logits[:, 0] - wanted.numpy()).max() < 1e-3
    assert held[0].shape == (2, 2, 6, 8)


def test_packed_matrices_take_the_bytes_that_are_counted(written: Any) -> None:
    import onnx

    folder, _, packed = written
    graph = onnx.load(folder / "model.onnx").graph
    sizes = {t.name: len(t.raw_data) for t in graph.initializer}
    for name, codes in packed.items():
        assert sizes[f"{name}.codes"] + sizes[f"{name}.scales"] == codes.bytes
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 2


def test_another_model_is_told_from_the_file(written: Any) -> None:
    folder, _, _ = written
    other = tiny("llama", layers=3, width=64, seed=5)
    with pytest.raises(ExportError, match="computes something else"):
        compare_cached(CachedSession(folder / "model.onnx"), other, IDS)


def test_no_attention_no_cache() -> None:
    with pytest.raises(ExportError, match="without attention"):
        export_cached(tiny("llama"), [], "nowhere", prompt=IDS)
