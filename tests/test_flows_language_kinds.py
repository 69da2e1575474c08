"""Every kind of decision on a language model by its name, from end to end and in what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.cache.cuts import Spans
from espalier.compress.language.cache.plan import Span
from espalier.compress.language.family import Language
from espalier.compress.language.weights.bits import WeightBits
from espalier.errors import BudgetError, EspalierError
from espalier.flows.language.cuts import NAMES, language_cuts, name_of
from espalier.flows.language.harm import loss_of
from espalier.flows.language.shrink import shrink_language
from espalier.flows.shrink_identity import settings_of
from espalier.problem import limits
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(100))
LIMITS = {
    "kv": "kv_bytes",
    "growing": "kv_bytes",
    "rank": "kv_bytes",
    "span": "kv_bytes",
    "active": "active_params",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    sizes: Any = {"vocabulary": 256, "context": 16, "hidden": 16, "heads": 2, "width": 32}
    tiny("llama", layers=1, **sizes).save_pretrained(root / "llama")
    tiny("llama", layers=2, **sizes).save_pretrained(root / "layers")
    tiny("mixtral", layers=1, **sizes).save_pretrained(root / "mixtral")
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_that_has_a_name_shrinks_a_model(place: Path, name: str) -> None:
    model = {"experts": "mixtral", "merge": "mixtral", "active": "mixtral", "blocks": "layers"}.get(
        name, "llama"
    )
    metric = LIMITS.get(name, "bytes")
    within = {metric: "99%@256" if metric == "kv_bytes" else "99%"}
    found = shrink_language(
        place / model, place / "text.txt", within=within, budget="0.2s", context=8,
        windows=(4, 2, 2), decisions=name, repair=False, baselines=False, out=place / name,
    )  # fmt: skip
    original = found.original.metrics[metric].value
    assert found.best.metrics[metric].value <= 0.99 * original
    changed = {k for k, v in found.best.candidate.items() if v != found.original.candidate.get(k)}
    kinds = {"sublayers": ("attention", "feed"), "blocks": ("block",), "tables": ("bits",)}
    kinds |= {"windows": ("units", "window"), "merge": ("experts",), "growing": ("kv",)}
    assert changed
    assert all(n.partition(":")[0] in kinds.get(name, (name,)) for n in changed)
    make, ids = found.cache(), found._job.task.windows("test", 1)[:, :4]
    cache = None if make is None else make()
    text = found.network().generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert text.shape == (1, 7)


def test_names_stand_for_cuts_with_their_settings_and_take_the_place_of_plainer_ones() -> None:
    parts = anatomy(tiny("mixtral", layers=1, context=40))
    names = "units,merge,windows,growing,experts,kv"
    merge, windows, growing = language_cuts(names, parts, limits({"bytes": 1}), False, 24)
    assert (merge.kind, merge.merge) == ("experts", True)
    assert (windows.kind, windows.windows) == ("units", 3)
    assert (growing.kind, growing.capacity) == ("kv", 24)
    (longest,) = language_cuts("growing", parts, limits({"bytes": 1}), False)
    assert longest.capacity == 40  # the model's own context
    for cut, name in ((merge, "merge"), (windows, "windows"), (growing, "growing")):
        assert name_of(cut, 24) == name
    assert name_of(growing, 40) == ""


def test_merged_experts_are_means_of_those_there_were_and_not_some_of_them(place: Path) -> None:
    found = shrink_language(
        place / "mixtral", place / "text.txt", within={"bytes": "90%"}, budget="0.2s", context=8,
        windows=(4, 2, 2), decisions="merge", repair=False, baselines=False, out=place / "merged",
    )  # fmt: skip
    path = "model.layers.0.mlp.experts"
    own = found._job.family.model.get_submodule(path).gate_up_proj
    merged = found.network().get_submodule(path).gate_up_proj
    assert len(merged) < len(own) == 4
    shares = torch.linalg.lstsq(own.flatten(1).T, merged.flatten(1).T).solution.T
    assert torch.allclose(shares @ own.flatten(1), merged.flatten(1), atol=1e-4)
    assert torch.allclose(shares.sum(1), torch.ones(len(merged)), atol=1e-3)
    assert float((shares > 0.01).sum()) == 4  # none went without a trace


def test_a_growing_cache_is_felt_in_short_windows_and_keeps_its_limit_to_the_end(
    place: Path,
) -> None:
    sizes: Any = {"vocabulary": 256, "hidden": 16, "heads": 2, "width": 32}
    tiny("llama", layers=2, context=200, **sizes).save_pretrained(place / "long")
    found = shrink_language(
        place / "long", place / "text.txt", within={"kv_bytes": "60%@200"}, budget="0.2s",
        context=100, windows=(4, 2, 2), decisions="growing", repair=False, baselines=False,
        out=place / "grown",
    )  # fmt: skip
    job, best = found._job, found.best
    make = found.cache()
    assert make.capacity == 200
    assert make.bytes(200) == best.metrics["kv_bytes"].value
    windows = job.task.windows("test")
    # on 100 tokens the cache for 200 is still exact: what it does behind them is what counts
    exact = loss_of(job.family.model, windows)
    assert loss_of(found.network(), windows, make) == pytest.approx(exact, abs=1e-5)
    assert abs(best.metrics["loss"].value - exact) > 1e-4
    ids, cache, bits = windows[:1, :20], make(), []
    with torch.no_grad():
        for _ in range(180):
            out = found.network()(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids = out[:, -1:].argmax(-1)
            bits.append(cache.bits())
    assert bits[0] == [16, 16]
    assert bits[-1] == [best.candidate[f"kv:model.layers.{i}"] for i in (0, 1)] != [16, 16]
    assert cache.peak <= best.metrics["kv_bytes"].value
    with torch.no_grad(), pytest.raises(BudgetError, match="full after"):
        found.network()(input_ids=ids.expand(1, 40), past_key_values=cache, use_cache=True)
    # generation is measured at the length of the limit
    speed = found.to_json()["shrink"]["generation"]
    assert speed["behind"] + 3 * speed["new"] == speed["asked"] == 200
    assert speed["original"]["cache_bytes"] == 2 * 2 * 2 * 8 * 200 * 4
    assert speed["shrunk"]["cache_bytes"] <= 0.6 * speed["original"]["cache_bytes"]
    for name in ("original", "shrunk"):
        own = speed[name]
        assert sorted(own["runs"])[1] == own["tokens_a_second"] > 0
    assert "Generation behind 164 tokens" in " ".join(found.to_json()["notes"])


def test_what_is_recorded_of_a_cut_is_json_and_tells_rules_apart() -> None:
    rules = [(Span(16),), (Span(16, 0.25),), (Span(16, 0.25, 512),), (Span(16), Span(64))]
    said = [json.dumps(settings_of(Spans(rules=own)), allow_nan=False) for own in rules]
    assert len(set(said)) == len(rules)
    assert json.loads(said[1])["rules"] == [{"fixed": 16, "share": 0.25, "length": None}]
    assert settings_of(WeightBits(layers=["*.up"])) != settings_of(WeightBits(layers=["*.down"]))
    zeros, ones = (
        settings_of(WeightBits(calibration=make(1))) for make in (torch.zeros, torch.ones)
    )
    assert json.dumps(zeros) != json.dumps(ones)
    assert zeros == settings_of(WeightBits(calibration=torch.zeros(1)))


def test_bits_and_tables_together_are_one_cut_on_all_weights() -> None:
    model = tiny("llama", layers=1)
    for names in ("bits,tables", "tables, bits"):
        cuts = language_cuts(names, anatomy(model), limits({"bytes": 1}), False)
        family = Language(model, torch.zeros(1, 8, dtype=torch.long), cuts)
        named = {d.name for d in family.space.decisions}
        assert {"bits:model.embed_tokens", "bits:lm_head", "bits:model.layers.0.up"} <= named
    for names in ("bits,bits", "bits,bits,tables", "tables,tables"):
        with pytest.raises(EspalierError, match="bits twice"):
            language_cuts(names, anatomy(model), limits({"bytes": 1}), False)
