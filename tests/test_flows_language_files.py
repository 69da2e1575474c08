"""Files of a smaller language model: bytes that were written are told, its cache policy is checked."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.compress.language.cache.cuts import CacheBits, Spans
from espalier.compress.language.cache.plan import Span
from espalier.compress.language.cache.policy import Policy
from espalier.compress.language.family import Language
from espalier.compress.language.files.folder import read_folder, store_as
from espalier.compress.language.shape.structure import Units
from espalier.compress.language.weights.bits import BoundWeightBits, WeightBits
from espalier.compress.language.weights.sparse import SparseWeights
from espalier.errors import ExportError
from espalier.export.cached import CachedFiles
from espalier.flows.language.latency import told_times
from espalier.flows.language.out import Written, as_floats, told_bytes
from espalier.flows.language.shrink import shrink_language
from espalier.problem import SearchBudget
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(200))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    sizes: Any = {"vocabulary": 256, "context": 80, "hidden": 16, "heads": 2, "width": 32}
    tiny("llama", groups=2, layers=1, **sizes).save_pretrained(root / "llama")
    tiny("mixtral", layers=1, **sizes).save_pretrained(root / "mixtral")
    half = tiny("llama", groups=2, layers=1, **(sizes | {"hidden": 32, "width": 64}))
    store_as(half, torch.bfloat16)
    half.save_pretrained(root / "half")
    (root / "text.txt").write_text(TEXT)
    return root


def shrunk(place: Path, model: str, name: str, cut: Any, within: dict[str, str]) -> Any:
    return shrink_language(
        place / model, place / "text.txt", out=place / name, decisions=[cut], within=within,
        budget="0.2s", context=72, windows=(4, 2, 2), repair=False, baselines=False,
    )  # fmt: skip


def test_experts_that_are_counted_as_packed_and_written_as_floats_are_told(place: Path) -> None:
    cut = WeightBits(options=(4,), method="nearest", layers=["*.experts"])
    found = shrunk(place, "mixtral", "experts", cut, {"bytes": "75%"})
    found.publish()
    result = found.to_json()
    written = result["export"]
    size = Path(result["files"]["transformers"]).stat().st_size
    assert written["bytes"]["transformers"] == size
    assert written["counted"] == found.best.metrics["bytes"].value < 0.75 * size
    told = " ".join(result["notes"])
    assert "Written as floats, though counted as packed: bits of experts." in told
    assert "is kept by counting" in told
    assert f"model.safetensors, has {written['bytes']['transformers']:,} bytes" in told
    assert "model.onnx holds them packed" not in told


def test_what_no_file_packs_is_named() -> None:
    cuts: Any = (WeightBits(options=(4, 16), method="nearest", tables=True), SparseWeights())
    model = tiny("mixtral", layers=1)
    family = Language(model, torch.zeros(1, 8, dtype=torch.long), cuts)
    job: Any = SimpleNamespace(family=family)

    def told(**options: Any) -> list[str]:
        chosen = {d.name: d.options[-1] for d in family.space.decisions}
        return as_floats(job, family.space.candidate(chosen | options))

    first = "model.layers.0"
    assert told(**{f"bits:{first}.qkv": 4, "bits:lm_head": 4}) == []
    assert told(**{f"bits:{first}.experts": 4}) == ["bits of experts"]
    assert told(**{"bits:model.embed_tokens": 4}) == ["bits of the table of tokens"]
    assert told(**{f"bits:{first}.qkv": 16}) == ["bits of other weights"]
    sparse = next(d for d in family.space.decisions if d.name == f"sparsity:{first}.out")
    assert told(**{sparse.name: sparse.options[0]}) == ["zeros of sparse weights"]


def test_sizes_are_told_where_files_are_over_the_limit_alone() -> None:
    files = {"transformers": Path("model.safetensors"), "onnx": Path("model.onnx")}
    out = Written(files, bytes={"transformers": 900, "onnx": 500}, counted=400)
    (packed,) = told_bytes(out, True, [], 500)
    assert "in 500 bytes with its graph (400 are counted)" in packed
    assert told_bytes(out, False, [], None) == told_bytes(out, False, [], 500) == []
    (over,) = told_bytes(out, False, [], 450)
    assert "limit of 450 bytes is kept by counting, 400, and not by files" in over
    assert "model.onnx, has 500 bytes" in over


@pytest.mark.parametrize("cut", [CacheBits(), Spans(rules=(Span(16),))])
def test_a_policy_is_read_again_and_writes_the_same_text(place: Path, cut: Any) -> None:
    found = shrunk(place, "llama", f"cache {cut.kind}", cut, {"kv_bytes": "80%@256"})
    written = found.export()
    assert written.tokens["cache policy"] == 80 - 24  # the context ends
    assert written.differences["cache policy"] < 1e-6
    told = " ".join(written.notes)
    assert "make = Policy.load(folder)" in told
    assert ("after give(model, make.plans)" in told) == (cut.kind == "span")
    assert Policy.load(found.folder).plans == found.cache().plans


def test_what_was_given_in_half_precision_is_written_so(place: Path) -> None:
    cut = CacheBits(capacity=256)
    found = shrunk(place, "half", "half cache", cut, {"kv_bytes": "80%@256"})
    written = found.export()
    assert read_folder(found.folder).stored == torch.bfloat16
    assert written.tokens["transformers"] == 80 - 20
    assert Policy.load(found.folder).bytes(256) == found.best.metrics["kv_bytes"].value


def test_packed_weights_are_compared_before_the_folder_rounds_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(model: Any, *_: Any, packed: Any, **__: Any) -> CachedFiles:
        assert packed
        for name, own in packed.items():
            assert torch.equal(model.get_parameter(name), own.values())
        return CachedFiles({}, {}, {}, {})

    monkeypatch.setattr("espalier.flows.language.out.export_cached", exported)
    cut = WeightBits(options=(4,), method="nearest")
    found = shrunk(place, "half", "half bits", cut, {"bytes": "80%"})
    monkeypatch.delattr(BoundWeightBits, "treat")  # what was rounded is read, not rounded again
    assert set(found.export().files) == {"transformers"}


def test_a_policy_that_was_not_kept_as_it_was_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shrunk(place, "llama", "spoiled", CacheBits(options=(4,)), {"kv_bytes": "80%@256"})
    load = Policy.load

    def spoiled(folder: Path) -> Policy:
        read = load(folder)
        return replace(read, plans={p: replace(x, bits=2) for p, x in read.plans.items()})

    monkeypatch.setattr(Policy, "load", spoiled)
    with pytest.raises(ExportError, match="makes the model write another text"):
        found.export()
    assert not (found.folder / "cache_policy.json").exists()


def test_times_are_told_before_and_after_where_none_is_limited(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "original": {"prefill_ms": 8.0, "decode_ms": 2.0},
        "shrunk": {"prefill_ms": 4.0, "decode_ms": 1.5}, "tokens": 64, "threads": 1,
    }  # fmt: skip
    monkeypatch.setattr("espalier.flows.language.shrink.told_times", lambda *_: given)
    found = shrunk(place, "llama", "times", Units(), {"bytes": "95%"})
    told = (
        "on 1 thread: reading 64 tokens takes 4 ms (original 8), writing a token behind them 1.5 ms"
    )
    assert any(told in note for note in found.to_json()["notes"])
    job: Any = copy.copy(found._job)
    job.study = SimpleNamespace(once=lambda key, compute: compute())
    best = found.best.candidate
    assert told_times(job, best, found.network) == {}  # dear beside a budget of 0.2 s
    job.budget = SearchBudget()
    measured = told_times(job, best, found.network)
    assert measured["tokens"] == 80 - 13
    for name in ("original", "shrunk"):
        own = measured[name]
        assert 0 < own["decode_ms"] < own["prefill_ms"] * 10
    job.runtime = object()
    assert told_times(job, best, found.network) == {}
