"""The tests for a GPU can be collected where torch is, and nothing of what distributes, stores in Zarr or tracks."""

from __future__ import annotations

import os
import subprocess
import sys

ABSENT = (
    "ray",
    "mlflow",
    "zarr",
    "pydicom",
    "hypothesis",
    "xdist",
    "s3fs",
    "moto",
    "rich",
    "typer",
    "pandas",
    "matplotlib",
    "jinja2",
    "yaml",
)
COLLECT = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {ABSENT} else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import pytest
words = "-p pytest_timeout -p no:cacheprovider -m gpu --collect-only -q tests/pipeline"
sys.exit(pytest.main(words.split()))
"""


def test_the_tests_for_a_gpu_need_few_packages() -> None:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "tests/pipeline/test_gpu.py::" in done.stdout
