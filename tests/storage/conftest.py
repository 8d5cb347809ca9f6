"""Fixtures that the tests of banks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.banks import made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bank, to be read alone."""
    path = tmp_path_factory.mktemp("banks") / "bank.zarr"
    made(path)
    return path
