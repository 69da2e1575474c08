"""What all tests share: one thread, and where real data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two test processes on two cores: more than one thread each makes both crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def real_data() -> Path:
    """The folder that ESPALIER_DATA points to; the test skips, and says so, without it."""
    folder = os.environ.get("ESPALIER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set ESPALIER_DATA to its folder (see the docs)")
    return Path(folder)
