"""The page in a headless Chromium: it draws, in light and dark, wide and narrow, with no errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from espalier import report
from report_sample import sample_result

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=8000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"


@dataclass
class Seen:
    """What the browser made of the page."""

    dom: str
    log: str
    picture: np.ndarray

    @property
    def errors(self) -> list[str]:
        """Lines of the page's own console, and scripts that failed."""
        said = [line for line in self.log.splitlines() if "CONSOLE" in line or "Uncaught" in line]
        return said + re.findall(r'data-error="[^"]*"', self.dom[:2000])


def _look(folder: Path, width: int, *more: str) -> Seen:
    page = report.write(sample_result(), folder)["html"]
    picture = folder / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM), *FLAGS, *more, f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},4000", f"--screenshot={picture}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Seen(done.stdout, done.stderr, np.asarray(Image.open(picture).convert("RGB")))


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return _look(tmp_path_factory.mktemp("light"), 1200)


@pytest.fixture(scope="module")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return _look(tmp_path_factory.mktemp("dark"), 420, DARK)


def test_no_errors(light: Seen, dark: Seen) -> None:
    assert light.errors == []
    assert dark.errors == []


def test_plotly_drew_every_point(light: Seen) -> None:
    assert 'data-drawn="3"' in light.dom[:2000]
    # plotly lays three svg elements of this class over each other in every figure
    assert light.dom.count('class="main-svg"') == 9
    raw = sample_result()
    done = [t for t in raw["trials"] if t["accuracy"] is not None]
    trained = len(raw["front"]) + len(raw["baselines"]) + 1  # the chosen one also as a star
    expected = len(done) + trained + len(raw["latency"]["held_out"])
    assert light.dom.count('<path class="point"') == expected
    assert "limit 0.3 ms" in light.dom
    assert "tried by random search (estimate)" in light.dom


def _near(picture: np.ndarray, colour: str, reach: int = 10) -> int:
    """How many pixels have a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(np.int16) - wanted).max(axis=-1) <= reach).sum())


def test_the_picture_shows_the_page(light: Seen) -> None:
    picture = light.picture
    assert picture.shape == (4000, 1200, 3)
    assert _near(picture, "#fdfcf9") > 0.5 * picture[..., 0].size  # paper
    packed = picture.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    assert len(np.unique(packed)) > 300
    for colour, least in (
        ("#1f6b4a", 3000),  # found: gauges, network, front
        ("#a3620a", 150),  # scaled by hand
        ("#3b62a6", 300),  # random search
        ("#9a3412", 15),  # the limit: thin, dashed
        ("#a9cdb6", 3000),  # the network's 1x1 convolutions
    ):
        assert _near(picture, colour) >= least, colour
    written = (np.abs(picture.astype(np.int16) - picture[2, 2]).max(axis=-1) > 60).mean(axis=1)
    blank = np.diff(np.flatnonzero(np.concatenate([[True], written > 0, [True]])))
    assert blank.max() < 160, "a tall empty stretch: something was not drawn"


def test_dark_and_narrow(dark: Seen) -> None:
    picture = dark.picture
    assert picture.shape == (4000, 420, 3)
    assert _near(picture, "#141817") > 0.5 * picture[..., 0].size
    assert _near(picture, "#6fc79a") > 2000
    assert _near(picture, "#8fb2f0") > 80
    # nothing is cut off at the right: the margin is paper all the way down
    assert (np.abs(picture[:, -12:].astype(np.int16) - picture[2, 2]).max(axis=-1) <= 4).all()
    # the figures' text is light: no axis is drawn in the light scheme's ink
    assert "fill: rgb(231, 235, 232)" in dark.dom
