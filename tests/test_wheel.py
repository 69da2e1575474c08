"""The wheel builds, holds everything it needs, and runs from elsewhere."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_builds_and_installs_clean(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling: make setup")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "espalier/py.typed" in names
    assert "espalier/report/templates/page.html.j2" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import espalier; print(espalier.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(site))
