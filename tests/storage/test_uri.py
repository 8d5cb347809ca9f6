"""Local paths and fsspec URIs behave alike."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage import uri
from storage.errors import InputError


@pytest.fixture(params=["local", "file", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, as a path, a file:// URI and a URI of a remote kind."""
    kinds = {"local": str(tmp_path / "run"), "file": f"file://{tmp_path}/run", "memory": f"memory://{uuid.uuid4().hex}"}
    return kinds[request.param]


def test_what_is_written_is_read_back_listed_and_removed(base: str) -> None:
    path = uri.join(base, "a", "b.txt")
    assert not uri.exists(path)
    assert uri.list_names(base) == []
    uri.write_text(path, "größer")
    uri.write_bytes(uri.join(base, "c.bin"), b"\0\1")
    assert uri.read_text(path) == "größer"
    assert uri.read_bytes(uri.join(base, "c.bin")) == b"\0\1"
    assert uri.size(uri.join(base, "c.bin")) == 2
    assert uri.list_names(base) == ["a", "c.bin"]
    assert uri.is_folder(uri.join(base, "a")) and not uri.is_folder(path)
    uri.remove(uri.join(base, "a"))
    assert uri.list_names(base) == ["c.bin"]
    uri.remove(uri.join(base, "never there"))


def test_an_absent_file_is_file_not_found(base: str) -> None:
    with pytest.raises(FileNotFoundError):
        uri.read_bytes(uri.join(base, "absent"))
    with pytest.raises(FileNotFoundError):
        uri.stamp(uri.join(base, "absent"))


def test_the_stamp_changes_with_the_content(base: str) -> None:
    path = uri.join(base, "x")
    uri.write_bytes(path, b"one")
    before = uri.stamp(path)
    assert uri.stamp(path) == before
    uri.write_bytes(path, b"three")
    assert uri.stamp(path) != before


def test_a_zarr_array_goes_through_either_kind_of_store(base: str) -> None:
    path = uri.join(base, "array")
    array = zarr.create_array(store=uri.zarr_store(path, read_only=False), data=np.arange(6).reshape(2, 3))
    assert array.shape == (2, 3)
    read = zarr.open_array(uri.zarr_store(path, read_only=True), mode="r")
    assert np.array_equal(np.asarray(read[...]), [[0, 1, 2], [3, 4, 5]])


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    uri.write_text(str(path), "old")
    with pytest.raises(TypeError):
        uri.write_bytes(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    uri.write_text(str(tmp_path / "ours"), "")
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
    assert uri.join(*parts) == joined


def test_a_remote_uri_has_no_local_path() -> None:
    assert uri.local_path("file:///data/x") == Path("/data/x")
    assert uri.is_local("runs/x") and not uri.is_local("s3://bucket/x")
    with pytest.raises(InputError, match="give a local path"):
        uri.local_path("s3://bucket/x")


def test_an_absolute_name_holds_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert uri.absolute("runs/x/") == uri.absolute("./runs/x") == f"{tmp_path}/runs/x"
    assert uri.absolute("s3://bucket/x/") == "s3://bucket/x"


def test_an_unknown_scheme_is_one_clear_line() -> None:
    with pytest.raises(InputError) as caught:
        uri.exists("nosuch://bucket/x")
    assert "\n" not in str(caught.value)


def test_an_input_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(InputError("a.nii", "is broken", "mend it")))
    assert str(error) == "a.nii: is broken; mend it"
    assert (error.where, error.problem, error.remedy) == ("a.nii", "is broken", "mend it")
