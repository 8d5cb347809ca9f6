"""What made a result: the code, the libraries and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from storage.bank.spec import code_version

_LIBRARIES = ("ray", "torch", "zarr", "monai", "mlflow", "numpy")


@cache
def git_commit() -> str:
    """The git commit of this code, or `unknown` if it is not in a repository."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def provenance() -> dict[str, str]:
    """Facts for a report: date (UTC), version, commit, machine and libraries."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cardiomix": code_version(),
        "commit": git_commit()[:12],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "libraries": ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # the library is not installed
        return "unknown"
