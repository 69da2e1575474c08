"""Budgets of language models that nothing keeps, or that only a measurement shows to be broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.compress.language import Folder, Heads, Language, Units, read_folder
from espalier.costs.language_times import Generation
from espalier.errors import BudgetError, EspalierError
from espalier.flows.language.room import check_room, free_memory
from espalier.flows.language.shrink import explain_language, shrink_language
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(100))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reach")
    sizes: Any = {"vocabulary": 256, "context": 32, "hidden": 16, "heads": 2, "width": 32}
    tiny("llama", layers=2, **sizes).save_pretrained(root / "llama")
    (root / "text.txt").write_text(TEXT)
    return root


def shrunk(place: Path, name: str, within: dict[str, str], decisions: str, **more: Any) -> Any:
    return shrink_language(
        place / "llama", place / "text.txt", within=within, decisions=decisions, budget="0.2s",
        context=8, windows=(4, 2, 2), repair=False, baselines=False, out=place / name, **more,
    )  # fmt: skip


def refused(place: Path, within: dict[str, str], decisions: str, **more: Any) -> str:
    with pytest.raises(BudgetError) as error:
        shrunk(place, "refused", within, decisions, **more)
    assert not (place / "refused" / "ledger.sqlite").exists()
    told = str(error.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize("grouped", [False, True])
def test_a_budget_below_the_tables_names_the_kinds_that_reach_it(
    place: Path, grouped: bool
) -> None:
    told = refused(place, {"bytes": "25kB"}, "units", grouped=grouped)
    assert (
        "is below the table of tokens: 16,384 bytes of embedding and 16,384 bytes of head" in told
    )
    ways = dict(re.findall(r"(\w+) ([\d,]+)", told.partition("which reach bytes of: ")[2]))
    assert {"tables", "hidden"} <= set(ways)
    for name, size in ways.items():  # what is promised is kept
        within = {"bytes": size.replace(",", "")}
        found = shrunk(place, f"{name} {grouped}", within, f"units,{name}", grouped=grouped)
        assert found.best.metrics["bytes"].value <= float(within["bytes"]) < 25_000


def test_a_budget_that_needs_all_kinds_or_more_says_how_far_they_reach(place: Path) -> None:
    told = refused(place, {"bytes": "2kB"}, "heads,units,bits")
    together = re.search(r"hidden, sparsity, tables together reach bytes of ([\d,]+)", told)
    assert together is not None, told
    assert "sublayers" in told
    assert int(together[1].replace(",", "")) > 2000
    cache = refused(place, {"kv_bytes": "9%@512"}, "heads")
    assert "reachable is 65536" in cache  # one of two groups of heads, 2 layers, 512 tokens
    assert re.search(r"which reach kv_bytes of: span [\d,]+", cache)
    assert "sublayers" not in cache  # one attention stays: a quarter of the cache
    assert "hidden" not in cache  # the cache is as large in a model of narrower states
    assert "no further kind of decision goes lower" in refused(
        place, {"active_params": "1"}, "sublayers,heads,units,hidden"
    )


class Clock:
    """Stands for `Generation`: times that whole models take, and wrong ones of their parts."""

    def __init__(self, whole: float, part: float) -> None:
        self.whole, self.part, self.looked = whole, part, 0

    def measure(self, model: Any, make_cache: Any = None) -> dict[str, float]:
        self.looked += 1
        width = sum(layer.mlp.up_proj.out_features for layer in model.model.layers)
        return dict.fromkeys(("prefill_ms", "decode_ms"), 1 + self.whole * width)

    def parts(self, model: Any, modules: Any, make_cache: Any = None) -> dict[str, Any]:
        width = {f"model.layers.{i} feed-forward": x.mlp.up_proj.out_features
                 for i, x in enumerate(model.model.layers)}  # fmt: skip
        row = {name: 1 + self.part * width.get(name, 0) for name in modules}
        return {metric: {**row, "overhead": 1.0} for metric in ("prefill_ms", "decode_ms")}


@pytest.mark.parametrize(("whole", "part"), [(0.1, 0.5), (0.1, 0.02), (0.02, 0.5)])
def test_wrong_predictions_are_corrected_until_the_measured_time_keeps_the_limit(
    place: Path, monkeypatch: pytest.MonkeyPatch, whole: float, part: float
) -> None:
    clock = Clock(whole, part)
    for name in ("measure", "parts"):
        own = getattr(clock, name)
        monkeypatch.setattr(Generation, name, lambda self, *a, own=own: own(*a))
    name = f"timed {whole} {part}"
    found = shrunk(place, name, {"decode_ms": "75%@16"}, "units")
    before, after = (e.metrics["decode_ms"].value for e in (found.original, found.best))
    assert before == pytest.approx(1 + whole * 64)
    assert after <= 0.75 * before
    width = sum(layer.mlp.up_proj.out_features for layer in found.network().model.layers)
    assert after == pytest.approx(1 + whole * width)  # measured of the answer itself
    rounds = found.to_json()["shrink"]["rounds"]
    assert len(rounds) > 1
    assert any(abs(r["predicted"] - r["measured"]) > 0.1 * r["measured"] for r in rounds)
    # as wide as the clock allows, up to a step of widths and the room for noise
    wider = 1 + whole * (width + 16)
    assert wider > 0.9 * 0.75 * before


def test_times_that_no_answer_keeps_are_said_as_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, 0.5)  # parts promise much, whole models hardly get faster
    for name in ("measure", "parts"):
        own = getattr(clock, name)
        monkeypatch.setattr(Generation, name, lambda self, *a, own=own: own(*a))
    with pytest.raises(
        BudgetError, match=r"as measured.*raise the limit, or allow further"
    ) as error:
        shrunk(place, "never", {"decode_ms": "50%@16"}, "units")
    assert "sublayers, heads, hidden" in str(error.value)


# --- memory and encoders, said before anything is loaded -----------------------------------------


def test_a_model_that_does_not_fit_in_memory_is_refused_with_the_way_that_does(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(place / "llama")
    size = sum(4 * p.numel() for p in folder.model().parameters())
    monkeypatch.setattr("espalier.flows.language.room.free_memory", lambda: int(2.2 * size))
    check_room(folder)
    monkeypatch.setattr("espalier.flows.language.room.free_memory", lambda: int(1.8 * size))
    monkeypatch.setattr(Folder, "model", lambda self: pytest.fail("it was loaded"))
    for work in (
        lambda: shrunk(place, "large", {"bytes": "80%"}, "units"),
        lambda: explain_language(place / "llama", {"bytes": "80%"}),
    ):
        with pytest.raises(EspalierError, match=r"are free: give --memory \d+MB, which goes") as e:
            work()
        assert "\n" not in str(e.value)
    assert not (place / "large").exists()


def test_free_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "memory.max"
    monkeypatch.setattr("espalier.flows.language.room._LIMIT", here)
    machine = free_memory()
    assert machine > 0
    here.write_text("max\n")
    assert free_memory() > 0.5 * machine
    here.write_text("1000000\n")
    assert free_memory() == 0  # this process holds more already


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_an_encoder_is_refused_with_what_to_do_in_python_which_works(
    tmp_path: Path, kind: str
) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / kind)
    with pytest.raises(EspalierError, match=r"which writes no text.*Language") as error:
        explain_language(tmp_path / kind, {"bytes": "80%"})
    assert "\n" not in str(error.value)
    inputs = torch.zeros(2, 8, dtype=torch.long)
    if kind == "vit":
        inputs = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    family = Language(read_folder(tmp_path / kind).model(), inputs, (Heads(), Units()))
    few = {d.name: d.options[0] for d in family.space.decisions}
    smaller = family.build(few)
    with torch.no_grad():
        assert smaller(inputs).logits.shape == model(inputs).logits.shape
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
