"""What made a result: code, libraries, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("ray", "torch", "zarr", "monai", "mlflow", "numpy")


@cache
def git_commit() -> str:
    """The commit that this code was checked out at, or `unknown`."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def provenance() -> dict[str, str]:
    """Facts for a report: date (UTC), versions, commit, machine."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cardiomix": version("cardiomix"),
        "commit": git_commit()[:12],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }
