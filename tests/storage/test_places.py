"""Places that are to be written: told in one line before any work, and left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import InputError
from storage.places import require_writable, require_writable_file


@pytest.mark.parametrize(
    ("place", "problem"),
    [("/proc/nope", "No such file or directory"), ("file", "Not a directory"), ("file/below", "Not a directory")],
)
def test_a_place_that_cannot_be_written_is_told_and_one_that_can_is_left_as_it_is(
    tmp_path: Path, place: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"^--out.*: cannot be written \({problem}\); name a place"):
        require_writable(str(tmp_path / place), "--out")
    for fine in (tmp_path, tmp_path / "new" / "folder"):
        require_writable(str(fine), "--out")
    require_writable_file(str(tmp_path / "file"), "--out")
    with pytest.raises(InputError, match="--out: is a folder"):
        require_writable_file(str(tmp_path), "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
