"""What harm of a language model is measured as: divergence, loss, gradient; against plain sums."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.cli import app
from espalier.compress.language.family import Language
from espalier.compress.language.shape.structure import SubLayers, Units
from espalier.flows.language.generating import _Text, told
from espalier.flows.language.harm import MEASURES, LanguageHarm
from espalier.flows.language.job import LanguageJob
from espalier.problem import SearchBudget
from espalier.testing.language import tiny
from espalier.train.seeds import generator


@pytest.fixture(scope="module")
def family() -> Language:
    model = tiny("llama", layers=2, context=32)
    ids = torch.randint(64, (4, 8), generator=generator(0))
    return Language(model, ids, (SubLayers(), Units(steps=2, importance="norm")))


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(64, (6, 13), generator=generator(1))


def outputs(family: Language, candidate: Any, windows: torch.Tensor) -> tuple[Any, Any, Any]:
    with torch.no_grad():
        before = family.model(input_ids=windows[:, :-1]).logits
        after = family.build(candidate)(input_ids=windows[:, :-1]).logits
    return before, after, windows[:, 1:]


def test_each_measure_is_its_formula(family: Language, windows: torch.Tensor) -> None:
    gone = {**family.original, "feed:model.layers.1": 0}
    candidate = family.space.candidate(
        {n: o for n, o in gone.items() if n != "units:model.layers.1"}
    )
    before, after, targets = outputs(family, candidate, windows)
    found = {m: LanguageHarm(family, windows, m).harm([candidate])[0] for m in MEASURES}
    assert found["loss"] == pytest.approx(
        float(cross_entropy(after.flatten(0, 1), targets.flatten())), rel=1e-5
    )
    p, q = log_softmax(before, -1), log_softmax(after, -1)
    assert found["divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    # the gradient of each token's loss by its logits, by autograd
    logits = before.clone().requires_grad_(True)
    cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert logits.grad is not None
    wanted = ((after - before).square() * logits.grad.square()).sum(-1).mean()
    assert found["gradient"] == pytest.approx(float(wanted), rel=1e-4)


def test_windows_are_as_many_as_options_alone_leave_time_for(
    family: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = {"attention": 1.0, "feed": 1.0, "units": 2.0}  # seconds on four windows
    ids = torch.randint(64, (64, 13), generator=generator(1))
    task: Any = SimpleNamespace(
        size=lambda split: 64, windows=lambda split, most=None: ids[:most], context=12
    )
    job: Any = object.__new__(LanguageJob)
    job.family, job.task, job.measure = family, task, "divergence"
    job.budget = SearchBudget(240)  # 30% are 12 s for each of 6 options

    def timed(work: Any) -> float:
        (candidate,) = work.args
        changed = [d for d in family.space.decisions if candidate.get(d.name) == d.options[0]]
        return takes[changed[0].name.partition(":")[0]]

    monkeypatch.setattr("espalier.flows.language.job._timed", timed)
    assert job._affordable() == {"count": 36, "mended": True}  # 8 s for all six


@pytest.mark.parametrize("measure", MEASURES)
def test_the_original_harms_nothing_and_more_that_goes_harms_more(
    family: Language, windows: torch.Tensor, measure: str
) -> None:
    judge = LanguageHarm(family, windows, measure)
    few = {n: o[0] for n, o in ((d.name, d.options) for d in family.space.decisions)}
    units = {n: v for n, v in few.items() if n.startswith("units:")}
    original, some = judge.harm(
        [family.original, family.space.candidate({**family.original, **units})]
    )
    if measure == "loss":
        plain, _, targets = outputs(family, family.original, windows)
        assert original == pytest.approx(
            float(cross_entropy(plain.flatten(0, 1), targets.flatten())), rel=1e-5
        )
        assert some != pytest.approx(original, rel=1e-4)
    else:
        assert original == pytest.approx(0, abs=1e-6)
        assert some > 1e-4
        half = {**family.original, "units:model.layers.1": units["units:model.layers.1"]}
        assert judge.harm([family.space.candidate(half)])[0] < some
    broken = family.space.candidate({**family.original, **units})
    model = family.build(broken)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert judge.read(model)[measure] == float("inf")


@pytest.mark.parametrize("measure", ["loss", "gradient"])
def test_a_shrink_by_another_measure_keeps_its_limit_and_says_what_it_measured(
    tmp_path: Path, measure: str
) -> None:
    sizes: Any = {"vocabulary": 256, "context": 16, "hidden": 16, "heads": 2, "width": 32}
    tiny("llama", layers=1, **sizes).save_pretrained(tmp_path / "llama")
    text = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    words = ["shrink", tmp_path / "llama", "--text", tmp_path / "text.txt", "--max", "bytes=95%"]
    words += ["--budget", "1s", "--context", "8", "--decisions", "units", "--no-repair"]
    words += ["--no-baselines", "--measure", measure, "--out", tmp_path / "small", "--json"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["shrink"]["measure"] == measure
    assert f"--measure {measure}" in result["reproduce"]["command"]
    best, original = result["best"], result["shrink"]["original"]
    size = {n: e["metrics"]["bytes"]["value"] for n, e in (("best", best), ("was", original))}
    assert size["best"] <= 0.95 * size["was"]


def test_the_original_generates_with_the_cache_that_transformers_gives_it() -> None:
    text = _Text(tiny("mistral", sliding_window=12), None)
    text.read(40)
    text.write(2)
    assert text.held == 2 * 2 * 2 * 8 * 12 * 4  # two layers of two groups, as kv_bytes counts them


def test_a_cache_that_was_measured_in_other_numbers_than_the_folders_is_told_so() -> None:
    run = {"tokens_a_second": 5.0, "runs": [4.0, 5.0, 6.0], "cache_bytes": 640}
    found = {"original": run, "shrunk": run, "behind": 4, "new": 1, "asked": 7, "threads": 1}
    assert "the original's 640. Measured" in told({**found, "stored_bits": 32})
    assert "640, in 32-bit floats where the folder has 16 bits." in told(
        {**found, "stored_bits": 16}
    )
