"""Slices that lie far away come to the node once, a subject at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from storage.errors import InputError
from storage.node_folder import FOLDER, LIMIT
from storage.sharded_array import ShardedArray, write_array
from storage.slices.node_copy import FRAMES
from storage.slices.store import SliceStore, subject_folder
from storage.slices.writer import AXES
from tests.actors.tiny_runs import write_run


class FarAway(LocalFileSystem):
    """The local disk as a store that is asked by requests, which are counted."""

    protocol = "faraway"
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("faraway://")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.asked.append(path)
        return bytes(super().cat_file(path, start, end, **options))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run far away; the node's folder is `tmp_path/node`."""
    fsspec.register_implementation("faraway", FarAway, clobber=True)
    monkeypatch.setenv(FOLDER, str(tmp_path / "node"))
    yield f"faraway://{write_run(tmp_path)}"
    FarAway.asked.clear()


def contents(store: SliceStore) -> list[Any]:
    return [array for i in range(len(store)) for array in (store.image(i), store.mask(i))]


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_subject_is_asked_for_once_a_node_and_its_slices_are_the_stores(run: str) -> None:
    expected, store = contents(SliceStore.open(run.removeprefix("faraway://"))), SliceStore.open(run)
    subjects = len(set(store.column("subject").tolist()))
    FarAway.asked.clear()
    assert_equal(contents(store), expected)
    arrays = [path for path in FarAway.asked if "/image/" in path or "/mask/" in path]
    assert len(arrays) == 4 * subjects == len(set(arrays))
    FarAway.asked.clear()
    assert_equal(contents(store), expected)
    assert FarAway.asked == []
    assert_equal(contents(SliceStore.open(run)), expected)  # as another process of the node reads it
    of_subjects = [path for path in FarAway.asked if "slices.zarr" in path]
    assert len(of_subjects) == subjects and all(path.endswith("frames.json") for path in of_subjects)


def test_a_subject_whose_masks_were_mended_is_copied_anew(run: str) -> None:
    """Nothing of the index tells of another mask."""
    store, local = SliceStore.open(run), run.removeprefix("faraway://")
    i = int(store.column("labelled").argmax())
    before, folder = store.mask(i), Path(subject_folder(local, str(store.column("subject")[i])))
    whole = ShardedArray.open(str(folder / "mask")).rows(range(ShardedArray.open(str(folder / "mask")).shape[0]))
    write_array(str(folder / "mask"), np.where(whole == 1, 2, whole).astype(np.uint8), 1, AXES)
    frames = json.loads((folder / FRAMES).read_text())
    (folder / FRAMES).write_text(json.dumps(frames | {"source": "mended"}))
    after = SliceStore.open(run).mask(i)
    assert (before == 1).any() and not (after == 1).any()


def test_a_copy_that_another_process_removed_is_made_again(run: str, tmp_path: Path) -> None:
    store = SliceStore.open(run)
    expected = contents(store)
    shutil.rmtree(tmp_path / "node")
    assert_equal(contents(store), expected)
    assert (tmp_path / "node").is_dir()


def test_many_threads_copy_a_subject_once_and_leave_nothing_half_done(run: str, tmp_path: Path) -> None:
    stores = [SliceStore.open(run) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda store: store.image(0), stores))
    assert_equal(images, [images[0]] * 8)
    assert [path.name for path in (tmp_path / "node").rglob("*") if path.name.endswith(".partial")] == []


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_a_node_without_room_reads_from_afar(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    expected = contents(SliceStore.open(run.removeprefix("faraway://")))
    if obstacle == "file":
        (tmp_path / "node").write_text("no folder")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert_equal(contents(SliceStore.open(run)), expected)
    assert not (tmp_path / "node").is_dir() or list((tmp_path / "node").rglob("zarr.json")) == []


def test_older_copies_make_room(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "1e-6")  # of GB
    store = SliceStore.open(run)
    store.image(0)
    (copy,) = [path for path in (tmp_path / "node").iterdir() if path.is_dir()]
    older = copy.with_name(copy.name.replace(copy.name[:4], "0000", 1))
    copy.rename(older)
    SliceStore.open(run).image(0)
    assert copy.is_dir() and not older.exists()


def test_a_file_that_is_missing_there_is_told_as_it_is_without_a_copy(run: str) -> None:
    store = SliceStore.open(run)
    folder = Path(subject_folder(run.removeprefix("faraway://"), str(store.column("subject")[0])))
    (folder / "image" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(InputError, match="c/0/0/0 is missing; remove"):
        store.image(0)
