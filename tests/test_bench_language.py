"""The benchmark of language models: every way keeps the bytes that it is given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from espalier.compress.language.anatomy import anatomy
from espalier.errors import BudgetError
from espalier.recipes._parts import language
from espalier.tasks.tokens import token_text

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def ways():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import language_ways

        yield language_ways
    finally:
        sys.path.remove(folder)


def job(ways, kind: str, tmp_path: Path):
    model = language.fresh_model(kind, 0, **SIZES).eval()
    for p in model.parameters():
        p.data.mul_(3.0)
    text = language.byte_text("fresh")[:20_000]
    task = token_text(text, 256, 24, None, (4, 2, 2), 0)
    return ways.Job(tmp_path / "tiny", model, task, 0, tmp_path)


@pytest.fixture(scope="module")
def dense(ways, tmp_path_factory):
    return job(ways, "dense", tmp_path_factory.mktemp("dense"))


def test_rules_keep_the_bytes(ways, dense) -> None:
    for name, rule in ways.RULES.items():
        model, spent, _ = rule(dense, 0.8)
        assert spent <= 0.8 * dense.whole * 1.001, name
        assert spent > 0.5 * dense.whole, name
        left = sum(int((p != 0).sum()) for p in model.parameters())
        assert spent >= 4 * left * 0.999, name


def test_what_can_not_be_kept_is_refused(ways, dense) -> None:
    table = sum(p.numel() for p in dense.model.get_input_embeddings().parameters())
    least = 0.9 * 4 * table / dense.whole
    for name in ("last layers", "wanda"):
        with pytest.raises(BudgetError, match="above the limit"):
            ways.RULES[name](dense, least)


def test_a_mix_is_at_least_as_good_as_its_kinds_by_what_it_sees(ways, dense, monkeypatch) -> None:
    monkeypatch.setattr(ways, "BITS", (4, 8))
    monkeypatch.setattr(ways, "_JUDGED", 8)
    harm = {}
    for kind in ("mix", "bits"):
        model, spent, told = ways.ours(dense, kind, 0.6)
        assert spent <= 0.6 * dense.whole
        judge = ways.LanguageHarm(dense.profiles[kind][0], dense.train[: ways.HARM], "divergence")
        harm[kind] = judge.read(model)["divergence"]
        assert told["chosen"]
    assert harm["mix"] <= harm["bits"] * 1.05
    assert all(name.startswith("bits") for name in told["chosen"])


def test_experts_that_must_go(ways, tmp_path) -> None:
    mixture = job(ways, "experts", tmp_path)
    share = 0.6
    gone = ways.experts_gone(mixture, share)
    assert gone is not None
    from espalier.compress.language.shape.surgery import keep_experts

    def left(kept: int) -> float:
        import copy

        model = copy.deepcopy(mixture.model)
        for i in range(len(anatomy(model).layers)):
            keep_experts(model, i, list(range(kept)))
        return mixture.bytes(model)

    kept = round(8 * (1 - gone))
    assert left(kept) <= share * mixture.whole < left(kept + 1)
    assert ways.experts_gone(mixture, 0.1) is None
