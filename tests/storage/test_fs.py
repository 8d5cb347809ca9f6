"""Local paths and fsspec URIs behave alike."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage import fs
from storage.errors import InputError, StageError

FUNCTIONS: dict[str, Callable[[str], object]] = {
    "exists": fs.exists,
    "is_folder": fs.is_folder,
    "list_names": fs.list_names,
    "read_bytes": fs.read_bytes,
    "write_bytes": lambda place: fs.write_bytes(place, b"1"),
    "remove": fs.remove,
    "change_stamp": fs.change_stamp,
    "size": fs.size,
    "open_binary": fs.open_binary,
}


@pytest.fixture(params=["local", "file", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, as a path, a file:// URI and URIs of two remote kinds."""
    if request.param == "s3":
        request.getfixturevalue("s3_endpoint")
    unique = uuid.uuid4().hex
    kinds = {
        "local": str(tmp_path / "run"),
        "file": f"file://{tmp_path}/run",
        "memory": f"memory://{unique}",
        "s3": f"s3://bucket/{unique}",
    }
    return kinds[request.param]


def test_what_is_written_is_read_back_listed_and_removed(base: str) -> None:
    path = fs.join(base, "a", "b.txt")
    assert not fs.exists(path)
    assert fs.list_names(base) == []
    fs.write_text(path, "größer")
    fs.write_bytes(fs.join(base, "c.bin"), b"\0\1")
    assert fs.read_text(path) == "größer"
    assert fs.read_bytes(fs.join(base, "c.bin")) == b"\0\1"
    assert fs.size(fs.join(base, "c.bin")) == 2
    assert fs.list_names(base) == ["a", "c.bin"]
    assert fs.is_folder(fs.join(base, "a")) and not fs.is_folder(path)
    fs.remove(fs.join(base, "a"))
    assert fs.list_names(base) == ["c.bin"]
    fs.remove(fs.join(base, "never there"))


def test_an_absent_file_is_file_not_found(base: str) -> None:
    with pytest.raises(FileNotFoundError):
        fs.read_bytes(fs.join(base, "absent"))
    with pytest.raises(FileNotFoundError):
        fs.change_stamp(fs.join(base, "absent"))


def test_the_stamp_changes_with_the_content(base: str) -> None:
    path = fs.join(base, "x")
    fs.write_bytes(path, b"one")
    before = fs.change_stamp(path)
    assert fs.change_stamp(path) == before
    fs.write_bytes(path, b"three")
    assert fs.change_stamp(path) != before


def test_a_zarr_array_goes_through_either_kind_of_store(base: str) -> None:
    path = fs.join(base, "array")
    array = zarr.create_array(store=fs.zarr_store(path, read_only=False), data=np.arange(6).reshape(2, 3))
    assert array.shape == (2, 3)
    read = zarr.open_array(fs.zarr_store(path, read_only=True), mode="r")
    assert np.array_equal(np.asarray(read[...]), [[0, 1, 2], [3, 4, 5]])


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    fs.write_text(str(path), "old")
    with pytest.raises(TypeError):
        fs.write_bytes(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    fs.write_text(str(tmp_path / "ours"), "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("runs/a", "b", "c.txt"), "runs/a/b/c.txt"),
        (("runs/a/", "/b/"), "runs/a/b"),
        (("s3://bucket", "run"), "s3://bucket/run"),
        (("s3://bucket/run/", "x"), "s3://bucket/run/x"),
        (("memory://", "x"), "memory://x"),
        (("/", "x"), "/x"),
        (("", "x"), "x"),
        (("a",), "a"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert fs.join(*parts) == joined


def test_a_remote_uri_has_no_local_path() -> None:
    assert fs.local_path("file:///data/x") == Path("/data/x")
    assert fs.is_local("runs/x") and not fs.is_local("s3://bucket/x")
    with pytest.raises(InputError, match="give a local path"):
        fs.local_path("s3://bucket/x")


def test_an_absolute_name_holds_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fs.absolute("runs/x/") == fs.absolute("./runs/x") == f"{tmp_path}/runs/x"
    assert fs.absolute("s3://bucket/x/") == "s3://bucket/x"


def test_an_unknown_scheme_is_one_clear_line() -> None:
    with pytest.raises(InputError) as caught:
        fs.exists("nosuch://bucket/x")
    assert "\n" not in str(caught.value)


def test_an_input_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(InputError("a.nii", "is broken", "mend it")))
    assert str(error) == "a.nii: is broken; mend it"
    assert (error.where, error.problem, error.remedy) == ("a.nii", "is broken", "mend it")


def test_what_another_process_writes_is_seen_at_once(s3_endpoint: str) -> None:
    folder = f"another{uuid.uuid4().hex}"
    for name in ("one", "two"):
        assert not fs.exists(f"s3://bucket/{folder}/{name}")
        request = urllib.request.Request(f"{s3_endpoint}/bucket/{folder}/{name}", data=b"1", method="PUT")
        urllib.request.urlopen(request).close()
        assert fs.exists(f"s3://bucket/{folder}/{name}")
        assert name in fs.list_names(f"s3://bucket/{folder}")


def test_many_threads_share_an_object_store(s3_endpoint: str) -> None:
    base = f"s3://bucket/{uuid.uuid4().hex}"
    folders = [fs.join(base, f"{n:02d}") for n in range(48)]

    def write_and_read(folder: str) -> list[str]:
        for name in ("a", "b"):
            fs.write_text(fs.join(folder, name), folder)
        assert fs.read_text(fs.join(folder, "a")) == folder
        fs.remove(fs.join(folder, "b"))
        assert fs.is_folder(folder) and not fs.exists(fs.join(folder, "b"))
        return fs.list_names(folder)

    assert fs.map_concurrently(base, write_and_read, folders) == [["a"]] * 48
    assert fs.list_names(base) == [fs.base_name(folder) for folder in folders]


@pytest.mark.parametrize("place", ["folder", "memory://folder"])
def test_each_keeps_the_order_passes_exceptions_and_leaves_no_thread(place: str) -> None:
    before = set(threading.enumerate())
    assert fs.map_concurrently(place, lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert fs.map_concurrently(place, str, []) == []
    with pytest.raises(ZeroDivisionError):
        fs.map_concurrently(place, lambda n: 1 // (n - 50), range(100))
    assert set(threading.enumerate()) == before


def test_each_waits_for_remote_places_side_by_side_and_reads_local_ones_in_turn() -> None:
    together = threading.Barrier(4)
    assert fs.map_concurrently("memory://folder", lambda n: together.wait(60) >= 0, range(4)) == [True] * 4
    assert (
        fs.map_concurrently("folder", lambda n: threading.current_thread(), range(4))
        == [threading.current_thread()] * 4
    )


def test_what_computes_has_a_thread_for_each_cpu_at_a_local_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    together = threading.Barrier(3)
    assert fs.map_concurrently("folder", lambda n: together.wait(60) >= 0, range(3), computes=True) == [True] * 3


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_name_is_never_removed_as_a_pattern(scheme: str, s3_endpoint: str) -> None:
    base = f"{scheme}://bucket/{uuid.uuid4().hex}"
    for run in ("run1", "run2", "run[1]", "run*"):
        fs.write_text(fs.join(base, run, "x"), "")
    for run in ("run[1]", "run*", "run?"):
        with pytest.raises(InputError, match="is not removed"):
            fs.remove(fs.join(base, run))
    assert fs.list_names(base) == ["run*", "run1", "run2", "run[1]"]


def told(error: pytest.ExceptionInfo[Exception]) -> str:
    """What an error says: one line, with neither credentials nor query."""
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert "hidden" not in text and "list-type" not in text
    return text


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("503", tuple(FUNCTIONS)),
        ("403", tuple(FUNCTIONS)),
        ("no answer", tuple(FUNCTIONS)),
        ("half an answer", ("read_bytes", "list_names")),
        ("nobody there", tuple(FUNCTIONS)),
        ("no credentials", tuple(FUNCTIONS)),
    ],
)
def test_a_store_that_cannot_be_asked_is_not_taken_for_absence_or_bad_input(
    fault: str, names: Sequence[str], s3_proxy: Any, s3_impatient: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "s3://bucket/some/object"
    fs.write_bytes(place, b"content")
    s3_proxy.fault = lambda number, method: fault
    if fault == "nobody there":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            s3_impatient["endpoint_url"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    if fault == "no credentials":
        del s3_impatient["key"], s3_impatient["secret"]
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, os.devnull)
    for name in names:
        with pytest.raises(StageError) as caught:
            FUNCTIONS[name](place)
        assert told(caught).startswith(f"{place}: the object store failed ("), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_absent_bucket_is_named(name: str, s3_endpoint: str) -> None:
    with pytest.raises(InputError) as caught:
        FUNCTIONS[name]("s3://absent/some/object")
    assert told(caught) == "s3://absent/some/object: there is no such bucket; make it, or correct the name"


@pytest.mark.parametrize(
    "place", ["nosuch://me:hidden@bucket/x?token=hidden", "https://me:hid@den@host/x?token=hidden", "s3://?hidden"]
)
def test_no_error_names_credentials_or_a_query(place: str) -> None:
    with pytest.raises(InputError) as caught:
        fs.local_path(place)
    assert "hid" not in told(caught)
    if place.startswith("nosuch"):
        with pytest.raises(InputError, match=r"^nosuch://bucket/x: ") as caught:
            fs.exists(place)
        assert "hidden" not in told(caught)


def test_a_written_file_is_followed_by_a_sync_of_its_folder_and_of_those_above_new_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    target = tmp_path / "a" / "b" / "file"
    fs.write_bytes(str(target), b"1")
    assert synced[0].startswith(str(target.parent)) and synced[0].endswith(".tmp")  # the content before its name
    assert synced[1:] == [str(target.parent), str(tmp_path / "a"), str(tmp_path)]
    synced.clear()
    fs.write_bytes(str(target), b"2")
    assert synced[1:] == [str(target.parent)]
