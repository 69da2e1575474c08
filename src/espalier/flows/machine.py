"""What the numbers were obtained on: processor, memory, system, versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime as ort
import psutil
import torch

from espalier.costs.machine import cores, processor


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    out = {"python": platform.python_version()}
    for name in ("espalier", "torch", "onnxruntime", "onnx", "numpy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def timed_on() -> dict[str, str]:
    """What timings are of: a study records it, and another takes them over from the same only."""
    found = {"processor": processor(), "cores": f"{cores()} cores"}
    found |= {"onnxruntime": ort.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def machine() -> dict[str, Any]:
    """The machine in a few plain fields."""
    found = versions()
    return {
        "cpu": processor(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": found["python"],
        "torch": found["torch"],
        "onnxruntime": found["onnxruntime"],
    }
