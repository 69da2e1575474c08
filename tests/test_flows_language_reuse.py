"""What a shrink of a language model takes over from one with other limits or other decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.cli import app
from espalier.compress.language.weights.bits import WeightBits
from espalier.errors import EspalierError, StudyError
from espalier.flows.language.harm import LanguageHarm
from espalier.flows.language.shrink import shrink_language
from espalier.study import Study
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(100))
BOTH = {"kv_bytes": "60%@256", "bytes": "95%"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reuse")
    tiny(
        "llama", vocabulary=256, context=16, hidden=16, heads=2, groups=1, width=32, layers=1
    ).save_pretrained(root / "llama")
    (root / "text.txt").write_text(TEXT)
    return root


def shrunk(place: Path, name: str, **settings: Any) -> Any:
    given = {"budget": "0.2s", "context": 8, "windows": (4, 2, 2), "repair": False}
    return shrink_language(
        place / "llama", place / "text.txt", out=place / name, baselines=False,
        **(given | settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    shrunk(place, "both", within=BOTH)
    return place / "both"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Candidates whose harm is read alone."""
    found: list[Any] = []
    plain = LanguageHarm.harm

    def harm(self: LanguageHarm, candidates: Any) -> Any:
        found.extend(candidates)
        return plain(self, candidates)

    monkeypatch.setattr(LanguageHarm, "harm", harm)
    return found


@pytest.mark.parametrize("within", [{"bytes": "90%"}, {"kv_bytes": "50%@256"}])
def test_fewer_limits_pay_for_no_option_again(
    place: Path, first: Path, asked: list[Any], within: dict[str, str]
) -> None:
    (metric,) = within
    found = shrunk(place, f"only {metric}", within=within, reuse=first)
    assert asked == []
    share = float(within[metric].partition("%")[0]) / 100
    assert found.best.metrics[metric].value <= share * found.original.metrics[metric].value
    with Study.open(first) as before, Study.open(found.folder) as now:
        theirs = {k.split(":", 2)[2]: v for k, v in before.recorded().items() if "harm:" in k}
        own = {k.split(":", 2)[2]: v for k, v in now.recorded().items() if "harm:" in k}
    own = {
        key: harm for key, harm in own.items() if harm["harm"]
    }  # an option that can't stand alone
    assert own
    assert all(theirs[key] == harm for key, harm in own.items())
    assert (metric == "bytes") == any(":bits:" in key for key in own)


def test_one_more_kind_pays_for_that_kind_alone(place: Path, first: Path, asked: list[Any]) -> None:
    cuts = ["sublayers", "heads", "kv", WeightBits(options=(2, 4), method="nearest")]
    found = shrunk(place, "other bits", within=BOTH, decisions=cuts, reuse=first)
    changed = {k for c in asked for k, v in c.items() if v != found.original.candidate[k]}
    assert changed == {n for n in found.original.candidate if n.startswith("bits:")}


def test_what_has_nothing_in_common_is_refused_in_kinds(place: Path, first: Path) -> None:
    with pytest.raises(StudyError) as told:
        shrunk(place, "none", within={"bytes": "95%"}, decisions="blocks,hidden", reuse=first)
    kinds = "decided sublayer, heads, units, bits, kv; this shrink decides block, hidden"
    assert kinds in str(told.value)
    with pytest.raises(StudyError, match="saw other data"):
        shrunk(place, "none", within={"bytes": "95%"}, context=4, reuse=first)
    assert not (place / "none").exists()


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "cuda"), "leave out --device cuda"),
        (("--batch", "4"), "leave out --batch 4"),
        (("--task", "cifar10"), "leave out --task cifar10"),
        (("--memory", "8GB", "--out", "x", "--grouped"), "leave out --grouped"),
        (("--memory", "8GB", "--out", "x", "--measure", "loss"), "leave out --measure"),
        (("--memory", "8GB", "--out", "x", "--threads", "2"), "leave out --threads"),
        (("--memory", "8GB", "--out", "x", "--device", "cuda"), "leave out --device cuda"),
    ],
)
def test_options_that_a_folder_has_no_use_for_are_refused(
    place: Path, words: tuple[str, ...], told: str
) -> None:
    given = ["shrink", place / "llama", "--text", place / "text.txt", "--max", "bytes=60%", *words]
    done = CliRunner().invoke(app, [str(w) for w in given])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_threads_reach_what_measures_times(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.flows.language import shrink

    seen: list[int] = []

    class Enough(Exception):
        pass

    def generation(context: int, threads: int) -> None:
        seen.append(threads)
        raise Enough

    monkeypatch.setattr(shrink, "Generation", generation)
    given = ["shrink", place / "llama", "--text", place / "text.txt", "--max", "decode_ms=90%"]
    done = CliRunner().invoke(app, [str(w) for w in (*given, "--context", "8", "--threads", "3")])
    assert isinstance(done.exception, Enough), done.output
    assert seen == [3]
    with pytest.raises(EspalierError, match="1 thread or more, got 0"):
        shrunk(place, "none", within={"bytes": "95%"}, threads=0)
