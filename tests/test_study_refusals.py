"""What a study refuses: each with one clear line, and nothing overwritten or lost."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

import study_toys as toys
from espalier.errors import StudyError
from espalier.study import Study, identity, ledger, schema
from espalier.study.identity import differences, summary

HERE = Path(__file__).parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a study of ten trials, closed."""
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        toys.search(study, trials=10)
    return tmp_path / "run"


def one_line(caught: Any) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert "Error" not in text, "not the words of a library"
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


# --- folders and files ------------------------------------------------------------------------


def test_create_where_a_study_is(run: Path) -> None:
    before = contents(run)
    with pytest.raises(StudyError, match="holds a study already") as caught:
        Study.create(run, toys.IDENTITY)
    assert "resume" in one_line(caught)
    assert contents(run) == before


def damaged(kind: str, good: bytes) -> bytes:
    if kind == "foreign database":
        path = Path(os.environ["PYTEST_TMP"]) / "foreign.sqlite"
        path.unlink(missing_ok=True)
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE notes (text TEXT)")
        db.commit()
        db.close()
        return path.read_bytes()
    return {
        "empty": b"",
        "text": b"not a database, but somebody's notes\n" * 9,
        "cut short": good[:60],
        "header broken": b"XX" + good[2:],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "foreign database", "cut short", "header broken"]
)
def test_a_foreign_file_is_left_alone(
    run: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    path = run / "ledger.sqlite"
    path.write_bytes(damaged(kind, path.read_bytes()))
    before = contents(run)
    for opening in (
        lambda: Study.create(run, toys.IDENTITY),
        lambda: Study.resume(run, toys.IDENTITY),
        lambda: Study.open(run),
    ):
        with pytest.raises(StudyError, match="not a study of Espalier") as caught:
            opening()
        assert "nothing was changed" in one_line(caught)
        assert contents(run) == before


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_damaged_ledger_is_said_to_be_damaged(run: Path, where: str) -> None:
    path = run / "ledger.sqlite"
    good = path.read_bytes()
    middle = len(good) // 2
    bad = good[: middle + 100] if where == "end" else good[:4096] + b"\xff" * 8192 + good[12288:]
    path.write_bytes(bad)
    for opening in (lambda: Study.resume(run, toys.IDENTITY), lambda: Study.open(run)):
        with pytest.raises(StudyError, match="damaged") as caught:
            opening()
        one_line(caught)
        assert path.read_bytes() == bad


def test_a_newer_ledger_is_not_touched(run: Path) -> None:
    path = run / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    data[60:64] = (schema.VERSION + 1).to_bytes(4, "big")
    path.write_bytes(data)
    for opening in (lambda: Study.resume(run, toys.IDENTITY), lambda: Study.open(run)):
        with pytest.raises(StudyError, match="newer Espalier") as caught:
            opening()
        assert "upgrade" in one_line(caught)
    assert path.read_bytes() == data


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    for opening in (
        lambda: Study.resume(tmp_path, toys.IDENTITY),
        lambda: Study.open(tmp_path / "nowhere"),
    ):
        with pytest.raises(StudyError, match="holds no study") as caught:
            opening()
        one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/espalier")):
        with pytest.raises(StudyError, match="can't be written") as caught:
            Study.create(place, toys.IDENTITY)
        assert str(place) in one_line(caught)
    assert (tmp_path / "file").read_text() == "mine"


def test_creation_that_is_interrupted_leaves_no_half_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "replace", dies)
        with pytest.raises(StudyError, match="free some space"):
            Study.create(tmp_path / "run", toys.IDENTITY)
    assert not (tmp_path / "run" / "ledger.sqlite").exists()
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        assert study.trials() == []


# --- who may write ----------------------------------------------------------------------------


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_BUSY_SECONDS", 0.05)


def test_a_second_driver_is_told_who_the_first_is(run: Path) -> None:
    with Study.resume(run, toys.IDENTITY) as study:
        for opening in (
            lambda: Study.resume(run, toys.IDENTITY),
            lambda: Study.create(run, toys.IDENTITY),
        ):
            with pytest.raises(StudyError, match=f"process {os.getpid()} on ") as caught:
                opening()
            assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", one_line(caught))
        with Study.open(run) as reader:
            assert len(reader.trials()) == 10, "a reader is welcome"
        toys.search(study, trials=12)
    with Study.resume(run, toys.IDENTITY) as study:
        assert len(study.trials()) == 12


def test_a_second_driver_in_another_process(run: Path) -> None:
    code = f"""
        import sys; sys.path.insert(0, {str(HERE)!r})
        import study_toys as toys
        from espalier.study import Study
        from espalier.errors import StudyError
        try:
            Study.resume({str(run)!r}, toys.IDENTITY)
        except StudyError as error:
            print(error)
    """
    with Study.resume(run, toys.IDENTITY):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
        )
    assert f"is run by process {os.getpid()}" in done.stdout, done.stderr


@pytest.mark.usefixtures("no_patience")
def test_a_ledger_that_another_program_locked(run: Path) -> None:
    other = sqlite3.connect(run / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StudyError, match="locked by another program") as caught:
        Study.resume(run, toys.IDENTITY)
    one_line(caught)
    other.execute("ROLLBACK")
    with Study.resume(run, toys.IDENTITY) as study:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StudyError, match="locked by another program"):
            study.event("x")
        other.execute("ROLLBACK")
        study.event("y")
        assert "x" not in [e["kind"] for e in study.events()]
    other.close()


def test_a_ledger_that_can_not_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = ledger._connect
    monkeypatch.setattr(ledger, "_connect", lambda path, mode: connect(path, "ro"))
    before = (run / "ledger.sqlite").read_bytes()
    with pytest.raises(StudyError, match="readonly") as caught:
        Study.resume(run, toys.IDENTITY)
    assert "writable" in one_line(caught)
    assert (run / "ledger.sqlite").read_bytes() == before


SEALED = """
    import os, sys
    import study_toys as toys
    from espalier.errors import StudyError
    from espalier.study import Study
    folder = sys.argv[1]
    if os.geteuid() == 0:  # permissions do not bind root
        os.setegid(65534)
        os.seteuid(65534)
    with Study.open(folder) as study:
        print(len(study.trials()))
    for opening in (
        lambda: Study.resume(folder, toys.IDENTITY),
        lambda: Study.create(folder, toys.IDENTITY),
        lambda: Study.create(folder + "/inside", toys.IDENTITY),
    ):
        try:
            opening()
        except StudyError as error:
            print(error)
"""


@pytest.mark.parametrize("with_lock", [True, False])
def test_a_sealed_folder_can_be_read_and_not_resumed(run: Path, with_lock: bool) -> None:
    with tempfile.TemporaryDirectory() as outside:  # pytest's folders are for their owner only
        Path(outside).chmod(0o755)
        folder = Path(shutil.copytree(run, Path(outside) / "run"))
        if not with_lock:
            (folder / "ledger.lock").unlink(missing_ok=True)
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        before = contents(folder)
        code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(SEALED)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60
        )
        assert contents(folder) == before
        folder.chmod(0o755)
    count, *refusals = done.stdout.splitlines()
    assert count == "10", done.stderr
    assert len(refusals) == 3, done.stdout + done.stderr
    assert all("can't be written" in line for line in refusals), refusals


def test_a_reader_of_a_closed_study_leaves_no_file(run: Path) -> None:
    before = contents(run)
    with Study.open(run) as study, pytest.raises(StudyError, match="reading only"):
        study.event("x")
    assert contents(run) == before
    assert set(before) <= {"ledger.sqlite", "ledger.lock"}, "a closed study is one file"


def test_a_reader_may_stay_while_the_driver_ends(run: Path) -> None:
    study = Study.resume(run, toys.IDENTITY)
    reader = Study.open(run)
    study.event("x")
    study.close()
    assert reader.events()[-1]["kind"] == "x"
    reader.close()
    with Study.resume(run, toys.IDENTITY) as study:
        assert "x" in [e["kind"] for e in study.events()]


# --- a full disk ------------------------------------------------------------------------------

FULL = """
    import resource, sys
    import study_toys as toys
    from espalier.errors import StudyError
    from espalier.study import Study
    with Study.create(sys.argv[1], toys.IDENTITY) as study:
        toys.search(study, trials=10)
        limit = {limit}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            toys.search(study, trials=300)
        except StudyError as error:
            print(error)
"""


@pytest.mark.parametrize("limit", [150_000, 260_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, limit: int) -> None:
    """A file-size limit stands for the full disk: SQLite's writes fail part of the way."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(
        FULL.format(limit=limit)
    )
    folder = tmp_path / "run"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "free some space and resume" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    with Study.open(folder) as study:
        kept = [t for t in study.trials() if t.state == "done"]
    assert 10 <= len(kept) < 300
    with Study.resume(folder, toys.IDENTITY) as study:
        trials = toys.search(study, trials=300)
    assert [t for t in trials if t.id in {k.id for k in kept}] == kept, "nothing ran again"
    with Study.create(tmp_path / "whole", toys.IDENTITY) as study:
        assert toys.result(toys.search(study, trials=300)) == toys.result(trials)


def test_workers_end_when_the_ledger_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def full(*_: Any) -> None:
        raise StudyError("full")

    with Study.resume(run, toys.IDENTITY) as study:
        monkeypatch.setattr(study._ledger, "finish", full)
        with pytest.raises(StudyError, match="full"):
            toys.search(study, trials=20, workers=2)
    mine = psutil.Process().children()
    assert not [c for c in mine if "espalier.study.worker" in " ".join(c.cmdline())]


# --- another identity, other versions ---------------------------------------------------------


def test_another_identity_is_refused_with_the_difference(run: Path) -> None:
    other = {**toys.IDENTITY, "task": "mnist", "limits": ["cost <= 9"], "new": {"deep": 1}}
    before = contents(run)
    with pytest.raises(StudyError) as caught:
        Study.resume(run, other)
    text = one_line(caught)
    for part in (
        'task: "toy" -> "mnist"',
        'limits[0]: "cost <= 16" -> "cost <= 9"',
        "new.deep: absent -> 1",
        "choose another folder",
    ):
        assert part in text
    assert "space" not in text, "what is equal is not shown"
    assert contents(run) == before
    with Study.resume(run, dict(reversed(toys.IDENTITY.items()))) as study:
        assert study.notes == [], "the order of keys does not matter"


def test_long_differences_are_cut(run: Path) -> None:
    many = {f"k{i}": "x" * 500 for i in range(40)}
    with pytest.raises(StudyError) as caught:
        Study.resume(run, {**toys.IDENTITY, **many})
    text = one_line(caught)
    assert len(text) < 800
    assert "and 34 more" in text


def test_tuples_and_numbers_compare_as_json(tmp_path: Path) -> None:
    with Study.create(tmp_path / "run", {"shape": (1, 8), "n": 1}) as study:
        assert study.meta["identity"] == {"shape": [1, 8], "n": 1}
    Study.resume(tmp_path / "run", {"shape": (1, 8), "n": 1.0}).close()
    assert differences({"a": {}}, {"a": {"b": 1}}) == ["a: {} -> absent", "a.b: absent -> 1"]
    assert summary(["a", "b"]) == "a; b"


def test_other_versions_go_on_and_are_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.study import study as study_module

    later = {**identity.versions(), "torch": "99.0", "espalier": "9.9"}
    monkeypatch.setattr(study_module, "versions", lambda: later)
    with Study.resume(run, toys.IDENTITY) as study:
        (note,) = study.notes
        assert '"99.0"' in note
        assert "espalier" in note
        assert "numpy" not in note
        (event,) = [e for e in study.events() if e["kind"] == "versions"]
        assert any(line.startswith("torch: ") for line in event["changed"])
        assert len(toys.search(study, trials=12)) == 12
    with Study.resume(run, toys.IDENTITY) as study:
        assert study.notes == [], "said once"


def test_versions_come_without_imports() -> None:
    code = (
        "import sys; from espalier.study.identity import versions; import espalier.study; "
        "print(versions()['torch'], 'torch' in sys.modules, 'optuna' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    version, torch, optuna = done.stdout.split()
    assert version[0].isdigit()
    assert (torch, optuna) == ("False", "False")


def test_a_study_can_be_moved(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere with spaces? & é#1"
    shutil.move(run, moved)
    with Study.resume(moved, toys.IDENTITY) as study:
        assert len(toys.search(study, trials=14)) == 14
