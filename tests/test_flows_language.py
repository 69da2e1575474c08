"""Shrinking a language model's folder from end to end, and its parts against plain computations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.cli import app
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.family import Language
from espalier.compress.language.repair.distilling import distil
from espalier.compress.language.repair.refit import refit
from espalier.compress.language.shape.structure import Blocks
from espalier.compress.language.shape.surgery import drop, keep_units
from espalier.compress.language.weights.bits import WeightBits
from espalier.errors import BudgetError
from espalier.flows.language.limits import language_limits
from espalier.flows.language.out import packed_weights
from espalier.flows.language.shrink import shrink_language
from espalier.study import Study
from espalier.testing.language import tiny
from espalier.train.seeds import generator

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(1200))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny("llama", vocabulary=256, context=32).save_pretrained(root / "llama")
    (root / "text.txt").write_text(TEXT)
    return root


SETTINGS: dict[str, Any] = {
    "within": {"bytes": "75%"},
    "budget": "1s",
    "context": 16,
    "windows": (24, 8, 8),
}


@pytest.fixture(scope="module")
def shrunk(place: Path) -> Any:
    found = shrink_language(
        place / "llama", place / "text.txt", out=place / "run", decisions="sublayers,heads,units",
        **SETTINGS,
    )  # fmt: skip
    found.report()
    return found


def test_the_answer_keeps_the_limit_and_its_numbers_are_those_of_its_model(shrunk: Any) -> None:
    model = shrunk.network()
    size = sum(p.numel() for p in model.parameters()) * 4
    metrics = shrunk.best.metrics
    assert metrics["bytes"].value == size <= 0.75 * shrunk.original.metrics["bytes"].value
    windows = shrunk._job.task.windows("test")
    with torch.no_grad():
        out = model(input_ids=windows[:, :-1]).logits
    loss = cross_entropy(out.flatten(0, 1), windows[:, 1:].flatten())
    assert metrics["loss"].value == pytest.approx(float(loss), rel=1e-4)
    assert metrics["loss"].split == "test"


def test_repair_is_never_worse_than_the_cut_on_validation(shrunk: Any) -> None:
    for entry in (shrunk.best, *shrunk.baselines):
        metrics = entry.metrics
        assert metrics["loss_validation"].value <= metrics["loss_before"].value


def test_baselines_keep_the_same_limit(shrunk: Any) -> None:
    assert {e.name for e in shrunk.baselines} >= {"uniform slicing", "random"}
    bound = shrunk._job.limits[0].bound
    assert all(e.metrics["bytes"].value <= bound for e in shrunk.baselines)


def test_a_resumed_run_gives_the_same_and_measures_nothing_again(
    shrunk: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it was recorded")

    monkeypatch.setattr("espalier.flows.language.harm.LanguageHarm.judged", never)
    monkeypatch.setattr("espalier.flows.language.repairing.distil", never)
    again = shrink_language(
        place / "llama", place / "text.txt", out=place / "run", decisions="sublayers,heads,units",
        resume=True, **SETTINGS,
    )  # fmt: skip
    assert again.best == shrunk.best
    assert again.to_json()["best"] == shrunk.to_json()["best"]


def test_another_limit_takes_the_profile_over(
    shrunk: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the profile was paid for")

    monkeypatch.setattr("espalier.flows.language.harm.LanguageHarm.harm", never)
    found = shrink_language(
        place / "llama", place / "text.txt", out=place / "other", reuse=place / "run",
        decisions="sublayers,heads,units", baselines=False, repair=False,
        **{**SETTINGS, "within": {"bytes": "90%"}},
    )  # fmt: skip
    assert found.best.metrics["bytes"].value <= 0.9 * shrunk.original.metrics["bytes"].value
    assert found.best.metrics["bytes"].value > shrunk.best.metrics["bytes"].value


def test_packed_weights_are_those_of_the_built_model_under_its_own_names() -> None:
    model = tiny("llama", layers=3)
    cuts = (Blocks(), WeightBits(options=(4, 8), method="nearest"))
    family = Language(model, torch.zeros(1, 8, dtype=torch.long), cuts)
    chosen = {d.name: d.options[-1] for d in family.space.decisions}
    chosen |= {"block:model.layers.1": 0, "bits:model.layers.2.up": 4}
    candidate = family.space.candidate(chosen)
    built = family.build(candidate)
    found = packed_weights(SimpleNamespace(family=family), candidate, built)
    assert set(found) == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")}
    for name, codes in found.items():
        assert codes.bits == 4
        assert torch.allclose(codes.values(), built.get_parameter(name), atol=1e-6)


# --- parts -------------------------------------------------------------------------------------


def test_least_squares_undo_a_cut_that_lost_nothing() -> None:
    original = tiny("llama", context=32)
    down = anatomy(original).layers[0].feed.down.read(original)
    up, gate = (getattr(original.model.layers[0].mlp, f"{n}_proj").weight for n in ("up", "gate"))
    with torch.no_grad():  # units 40.. are copies of 0..: what they add can be given by those
        up[40:], gate[40:] = up[:8].clone(), gate[:8].clone()
    cut = copy.deepcopy(original)
    keep_units(cut, 0, torch.arange(40))
    ids = torch.randint(64, (16, 32), generator=generator(0))
    with torch.no_grad():
        wanted, before = original(ids).logits, cut(ids).logits
        refit(cut, original, ids, damp=1e-9)
        after = cut(ids).logits
    assert float((before - wanted).abs().max()) > 0.1
    assert float((after - wanted).abs().max()) < 1e-3
    both = down[:, :8] + down[:, 40:]
    assert torch.allclose(cut.model.layers[0].mlp.down_proj.weight[:, :8], both, atol=1e-3)


def test_the_map_before_what_is_left_out_is_fitted_to_the_states_behind_it() -> None:
    original = tiny("llama", context=32)
    cut = copy.deepcopy(original)
    drop(cut, 1, "feed")
    ids = torch.randint(64, (16, 32), generator=generator(0))
    rows = refit(cut, original, ids)
    assert rows[-1]["path"] == "model.layers.1.self_attn.o_proj"
    assert rows[-1]["after"] < rows[-1]["before"]


def test_distillation_through_rounded_weights_ends_on_their_levels() -> None:
    original = tiny("llama", context=32)
    model = copy.deepcopy(original)
    ids = torch.randint(64, (32, 16), generator=generator(0))

    def judge(now: Any) -> float:
        with torch.no_grad():
            gap = now(ids[:8]).logits - original(ids[:8]).logits
        return float(gap.square().mean())

    done = distil(model, original, ids, judge, steps=24, bits={"model.layers.0.up": 3})
    assert done.best < done.before
    assert judge(model) == pytest.approx(done.best)
    block = model.model.layers[0].mlp.up_proj.weight.reshape(-1, 32)
    assert max(len(row.unique()) for row in block) <= 8
    assert len(model.model.layers[1].mlp.up_proj.weight.unique()) > 1000


def test_limits_with_a_context_length() -> None:
    asked, length = language_limits({"bytes": "60%", "kv_bytes": "25%@4096"})
    assert length == 4096
    assert [(x.metric, x.bound, x.relative) for x in asked] == [
        ("bytes", 0.6, True),
        ("kv_bytes", 0.25, True),
    ]


@pytest.mark.parametrize(
    ("within", "told"),
    [
        ({}, "needs a limit"),
        ({"bytes": "60%@4096"}, "leave out @4096"),
        ({"kv_bytes": "25%@many"}, "whole number of tokens"),
        ({"kv_bytes": "25%@64", "decode_ms": "50%@32"}, "one context length"),
        ({"latency_ms": "50%"}, "prefill_ms"),
        ({"byte": "50%"}, "Did you mean 'bytes'"),
        ({"bytes": ">= 50%"}, "from above"),
    ],
)
def test_limits_that_can_not_be_read(within: dict[str, str], told: str) -> None:
    with pytest.raises(BudgetError, match=told):
        language_limits(within)


# --- the command line --------------------------------------------------------------------------


def espalier(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ("no folder", (), "no folder"),
        ("no weights", (), "no *.safetensors"),
        ("remote code", (), "auto_map"),
        ("unknown architecture", (), "unknown architecture 'mamba'"),
        ("encoder", (), "which writes no text"),
        ("", ("--context", "500"), "2 to 32 tokens, got 500"),
        ("another model", (), "holds a model that no shrink wrote"),
        ("another model", ("--memory", "9GB"), "holds a model that no shrink wrote"),
        ("short text", (), "too short for a context of 32"),
        ("", ("--max", "bytes=20kB"), "is below the table of tokens: 32,768 bytes of embedding"),
        ("", ("--max", "bytes=60%", "--decisions", "widths"), "unknown kind of decision"),
        ("", ("--max", "bytes=60%", "--solver", "relax"), "leave out --solver"),
        ("", ("--max", "bytes=60%", "--no-tune"), "has --no-repair"),
        ("", ("--budget", "500 trials"), "not in trials: 500 trials"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, change: str, words: tuple[str, ...], told: str
) -> None:
    from shutil import copytree

    folder, text = tmp_path / "model", place / "text.txt"
    if change == "encoder":
        tiny("bert").save_pretrained(folder)
    elif change != "no folder":
        copytree(place / "llama", folder)
    config = folder / "config.json"
    if change == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if change == "remote code":
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"A": "b.C"}}))
    if change == "unknown architecture":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mamba"}))
    if change == "another model":
        copytree(place / "llama", tmp_path / "out")
    if change == "short text":
        text = tmp_path / "short.txt"
        text.write_text("too little")
    limit = () if "--max" in words else ("--max", "bytes=60%")
    done = espalier(
        "shrink", folder, "--text", text, *limit, *words, "--out", tmp_path / "out", "--quiet"
    )
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "ledger.sqlite").exists()


def test_what_is_gone_on_with_has_a_folder(place: Path) -> None:
    done = espalier(
        "shrink", place / "llama", "--text", place / "text.txt", "--max", "bytes=60%", "--resume"
    )
    assert done.exit_code == 2, done.output
    assert "give it as out (--out DIR)" in done.stderr
    assert espalier("shrink", place / "llama", "--seed", "-1").exit_code == 2


def test_a_text_is_asked_for_and_only_for_language_models(place: Path) -> None:
    done = espalier("shrink", place / "llama", "--max", "bytes=60%")
    assert "needs --text" in done.stderr
    done = espalier("shrink", "model.py:make", "--grouped", "--max", "bytes=60%")
    assert "for a folder of a language model" in done.stderr


def test_explain_lists_the_decisions(place: Path) -> None:
    done = espalier("shrink", place / "llama", "--explain", "--json")
    rows = json.loads(done.stdout)
    kinds = {row["kind"] for row in rows if "decision" in row}
    assert {"attention", "feed", "heads", "units", "bits"} <= kinds


def test_layers_of_one_shape_become_a_folder_that_transformers_loads(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = shrink_language(
        place / "llama", place / "text.txt", out=place / "grouped", grouped=True, repair=False,
        **{**SETTINGS, "within": {"bytes": "80%", "kv_bytes": "60%@32"}},
    )  # fmt: skip
    found.publish()
    result = found.to_json()
    assert Path(result["files"]["transformers"]).parent == place / "grouped"
    loaded = AutoModelForCausalLM.from_pretrained(place / "grouped")
    ids = found._job.task.windows("test", 2)
    with torch.no_grad():
        gap = loaded(input_ids=ids).logits - found.network()(input_ids=ids).logits
    assert float(gap.abs().max()) < 1e-4
    assert result["question"]["context"] == 32
    for metric in ("bytes", "kv_bytes"):
        limit = next(x["bound"] for x in result["question"]["limits"] if x["metric"] == metric)
        assert found.best.metrics[metric].value <= limit


def test_bits_of_the_cache_are_kept_in_a_policy_that_holds_what_was_counted(place: Path) -> None:
    from espalier.compress.language.cache.policy import Policy

    found = shrink_language(
        place / "llama", place / "text.txt", out=place / "cached", decisions="kv", repair=False,
        baselines=False, **{**SETTINGS, "within": {"kv_bytes": "60%@256"}},
    )  # fmt: skip
    found.publish()
    make = Policy.load(place / "cached")
    whole = 2 * 2 * 2 * 8 * 256 * 4
    assert make.bytes(256) == found.best.metrics["kv_bytes"].value <= 0.6 * whole
    ids = found._job.task.windows("test", 1)[:, :8]
    text = found.network().generate(ids, past_key_values=make(), max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 16)


def test_times_are_parts_added_up_and_answers_are_measured(place: Path) -> None:
    found = shrink_language(
        place / "llama", place / "text.txt", out=place / "timed", decisions="sublayers,units",
        repair=False, baselines=False, **{**SETTINGS, "within": {"decode_ms": "500%@16"}},
    )  # fmt: skip
    job = found._job
    with Study.open(place / "timed") as study:
        timed = study.recorded()["times"]["decode_ms"]
    first = job.price(job.family.original)["decode_ms"].value
    assert first == pytest.approx(sum(part[""] for part in timed.values()))
    gone = job.family.space.candidate(
        {d.name: 0 if d.name == "feed:model.layers.0" else d.options[-1]
         for d in job.family.space.decisions}
    )  # fmt: skip
    saved = timed["model.layers.0 feed-forward"][""]
    assert job.price(gone)["decode_ms"].value == pytest.approx(first - saved)
    assert found.best.metrics["decode_ms"].how == "measured"


def test_the_report_shows_layers_and_loss_against_budget(shrunk: Any) -> None:
    text = (shrunk.folder / "report.html").read_text()
    assert "What is left of each layer" in text
    assert "Loss against budget" in text
    assert "calibration windows" in text
    rules = {row["rule"] for row in shrunk.to_json()["shrink"]["curve"]}
    assert "chosen" in rules
    assert "groups of heads" in text
