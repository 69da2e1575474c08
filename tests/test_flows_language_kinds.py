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
from espalier.errors import EspalierError
from espalier.flows.language.cuts import NAMES, language_cuts
from espalier.flows.language.shrink import shrink_language
from espalier.flows.shrink_identity import settings_of
from espalier.problem import limits
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(100))
LIMITS = {"kv": "kv_bytes", "rank": "kv_bytes", "span": "kv_bytes", "active": "active_params"}


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
    model = {"experts": "mixtral", "active": "mixtral", "blocks": "layers"}.get(name, "llama")
    metric = LIMITS.get(name, "bytes")
    within = {metric: "99%@256" if metric == "kv_bytes" else "99%"}
    found = shrink_language(
        place / model, place / "text.txt", within=within, budget="0.2s", context=8,
        windows=(4, 2, 2), decisions=name, repair=False, baselines=False, out=place / name,
    )  # fmt: skip
    original = found.original.metrics[metric].value
    assert found.best.metrics[metric].value <= 0.99 * original
    changed = {k for k, v in found.best.candidate.items() if v != found.original.candidate[k]}
    kinds = {"sublayers": ("attention", "feed"), "blocks": ("block",), "tables": ("bits",)}
    assert changed
    assert all(n.partition(":")[0] in kinds.get(name, (name,)) for n in changed)


def test_what_is_recorded_of_a_cut_is_json_and_tells_rules_apart() -> None:
    rules = [(Span(16),), (Span(16, 0.25),), (Span(16, 0.25, 512),), (Span(16), Span(64))]
    said = [json.dumps(settings_of(Spans(rules=own)), allow_nan=False) for own in rules]
    assert len(set(said)) == len(rules)
    assert json.loads(said[1])["rules"] == [{"fixed": 16, "share": 0.25, "length": None}]
    assert settings_of(WeightBits(layers=["*.up"])) != settings_of(WeightBits(layers=["*.down"]))
    assert settings_of(WeightBits(calibration=torch.zeros(1)))["calibration"] is True


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
