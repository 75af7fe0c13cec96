"""What every benchmark prints beside its numbers."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "onnx-fliqs",
    "onnx",
    "onnxruntime",
    "onnxruntime-training-cpu",
    "onnxruntime-training",
    "numpy",
)
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Real models and data that are not part of the project."""


def provenance() -> dict[str, Any]:
    """Commit, versions and machine."""
    return {"commit": _commit(), "versions": _versions(), "machine": _machine()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    found = {name: installed[name] for name in _PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    models = (
        line.partition(":")[2].strip() for line in lines if line.startswith("model name")
    )
    return next(models, "unknown processor")
