"""Places that are to be written: told in one line before any work, and left as they are."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from storage import fs
from storage.errors import InputError, StageError
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


def test_a_remote_place_is_tried_and_left_as_it_is(s3_impatient: dict[str, Any], s3_proxy: Any) -> None:
    place = "s3://bucket/places"
    require_writable(place, "--out")
    require_writable_file(f"{place}/page.html", "--out")
    assert fs.list_names(place) == []
    fs.write_bytes(f"{place}/there/file", b"")
    with pytest.raises(InputError, match=r"^--out: is a folder; name a file"):
        require_writable_file(f"{place}/there", "--out")
    with pytest.raises(InputError, match=r"^--out: there is no such bucket; make it"):
        require_writable("s3://absent/places", "--out")
    s3_proxy.fault = lambda number, method: "503" if method == "PUT" else None
    for refused in (require_writable, require_writable_file):
        with pytest.raises(StageError, match=r"^--out: the object store failed"):
            refused(place + "/new", "--out")
    s3_proxy.fault = lambda number, method: "503"
    with pytest.raises(StageError, match=r"^--out: the object store failed"):
        require_writable_file(place + "/page.html", "--out")
    answers = iter(["no answer"])
    s3_proxy.fault = lambda number, method: next(answers, None) if method == "PUT" else None
    with suppress(StageError):
        require_writable(place, "--out")
    s3_proxy.mend()
    assert next(answers, None) is None and fs.list_names(place) == ["there"]
    assert len(fsspec.filesystem("s3").ls(place)) == 1  # nor one that a listing of ours would not show
    with pytest.raises(InputError, match=r"^--out: has one of \* \? \[ in its name; name it without"):
        require_writable(f"{place}/a[b]", "--out")
    with pytest.raises(StageError, match=r"^--out http://127\.0\.0\.1:9/places: the object store failed"):
        require_writable("http://me:hidden@127.0.0.1:9/places", "--out http://me:hidden@127.0.0.1:9/places")
