"""The benchmark of techniques: it runs, packed weights compute what they stand for, winners are named."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from espalier import recipes
from espalier.compress.language.weights.rounding import nearest, packed_bytes
from espalier.recipes import efficientllm_bench as bench
from espalier.recipes._parts import techniques
from espalier.testing.language import tiny


def test_it_runs() -> None:
    found = recipes.run("efficientllm-bench")
    assert json.loads(json.dumps(found)) == found
    rows = found["techniques"]
    assert found["check"]["techniques"] == len(rows) >= 10
    for row in rows.values():
        assert set(bench.METRICS) < set(row)
        assert all(row[metric] > 0 for metric in bench.METRICS)
        assert row["tokens_a_second"] == pytest.approx(
            1e6 / row["processor_seconds_a_million_tokens"]
        )

    def held(name: str) -> float:
        return rows[name]["memory_bytes"]

    assert held("attention: a key and value head each") > held("attention: one key and value head")
    assert held("running: float32") > held("running: weights in 8 bits")
    assert held("running: weights in 8 bits") > held("running: weights in 4 bits")
    assert held("running: float32") > held("running: cache in 4 bits")
    assert held("tuning: all weights") > held("tuning: LoRA")
    assert rows["running: float32"]["compression"] == 1
    assert rows["running: bfloat16"]["compression"] == pytest.approx(2)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_the_rounded_ones_in_their_bytes(bits: int) -> None:
    layer = torch.nn.Linear(70, 5)
    made = techniques.Packed(layer, bits)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    rounded = nearest(layer.weight.detach(), None, bits).values()
    assert torch.allclose(made(x), x @ rounded.T + layer.bias, atol=1e-5)
    size = bench._bytes(made) - 5 * 4
    assert size <= packed_bytes((5, 70), bits)  # that one fills the last block up


def test_a_packed_model_is_close_to_the_original() -> None:
    model, ids = tiny("llama"), torch.arange(12)[None]
    with torch.no_grad():
        plain, eight = (m(input_ids=ids).logits for m in (model, techniques.packed(model, 8)))
    assert (plain - eight).abs().max() < 0.2
    assert not torch.equal(plain, eight)
    assert not any(isinstance(m, techniques.Packed) for m in model.modules())


def test_winners_know_what_is_better() -> None:
    rows = {
        name: {**dict.fromkeys(bench.METRICS, value), "loss": value}
        for name, value in (("low", 1.0), ("high", 2.0))
    }
    best = bench.winners(rows)
    assert best["latency_ms"] == best["memory_bytes"] == best["loss"] == "low"
    assert best["tokens_a_second"] == best["utilisation"] == best["compression"] == "high"
