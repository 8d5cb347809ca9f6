"""Arrays in one shard: the bytes are those that Zarr itself writes, and what Zarr reads of them is what we read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import blosc
from zarr.codecs import BloscCodec

from storage import fs
from storage.sharded_array import ShardedArray, write_array

Array = npt.NDArray[Any]

AXES = ("row", "y", "x")


def by_zarr(path: Path, data: Array, level: int) -> None:
    array = zarr.create_array(
        path,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(1, *data.shape[1:]),
        shards=data.shape,
        compressors=BloscCodec(cname="zstd", clevel=level, shuffle="bitshuffle"),
        dimension_names=AXES,
        fill_value=0,
        zarr_format=3,
    )
    array[:] = data


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scan(dtype: str, shape: tuple[int, ...] = (6, 40, 36)) -> Array:
    """Noise, its third row zero and its last constant."""
    info = np.iinfo(dtype)
    out = np.random.default_rng(0).integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    out[2], out[-1] = 0, 7
    return out


@pytest.mark.parametrize("level", [1, 5, 9])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "uint16", "int32"])
def test_shard_and_metadata_are_zarrs_own_bytes(tmp_path: Path, dtype: str, level: int) -> None:
    data = scan(dtype)
    by_zarr(tmp_path / "zarr", data, level)
    write_array(str(tmp_path / "ours"), data, level, AXES)
    assert files(tmp_path / "ours") == files(tmp_path / "zarr")


def test_the_bytes_are_zarrs_own_at_a_scans_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blosc, "use_threads", False)  # as the store sets it: threads put blocks down in any order
    for dtype in ("int16", "uint8"):
        data = scan(dtype, (4, 512, 480)) // 8
        by_zarr(tmp_path / dtype / "zarr", data, 1)
        write_array(str(tmp_path / dtype / "ours"), data, 1, AXES)
        assert files(tmp_path / dtype / "ours") == files(tmp_path / dtype / "zarr")


@pytest.mark.parametrize("lay", ["swapped", "fortran", "strided"])
def test_the_lay_of_the_data_in_memory_changes_no_byte(tmp_path: Path, lay: str) -> None:
    data = scan("int16")
    double = np.repeat(data, 2, axis=2)
    laid = {"swapped": data.astype(">i2"), "fortran": np.asfortranarray(data), "strided": double[:, :, ::2]}[lay]
    write_array(str(tmp_path / "plain"), data, 1, AXES)
    write_array(str(tmp_path / "laid"), laid, 1, AXES)
    assert files(tmp_path / "plain") == files(tmp_path / "laid")


@given(
    hnp.arrays(
        st.sampled_from(["uint8", "int16"]),
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
        elements=st.integers(0, 3),
    )
)
def test_zarr_reads_back_whatever_was_written(tmp_path_factory: pytest.TempPathFactory, data: Array) -> None:
    path = tmp_path_factory.mktemp("array")
    write_array(str(path), data, 5, AXES)
    array = zarr.open_array(path, mode="r")
    assert array.dtype == data.dtype and array.metadata.dimension_names == AXES
    assert np.array_equal(array[:], data)
    assert all(np.array_equal(array[row], data[row]) for row in range(len(data)))


def test_rows_of_zeros_take_no_space(tmp_path: Path) -> None:
    for name, rows in (("few", 3), ("many", 300)):
        data = np.zeros((rows, 64, 64), np.uint8)
        data[1, 20:40, 20:40] = 2
        write_array(str(tmp_path / name), data, 5, AXES)
    few, many = (sum(map(len, files(tmp_path / name / "c").values())) for name in ("few", "many"))
    assert many - few == 297 * 16  # an offset and a length in the index
    write_array(str(tmp_path / "none"), np.zeros((4, 8, 8), np.uint8), 5, AXES)
    assert not zarr.open_array(tmp_path / "none", mode="r")[:].any()


def test_a_damaged_index_is_noticed(tmp_path: Path) -> None:
    write_array(str(tmp_path), scan("int16"), 1, AXES)
    (path,) = (p for p in (tmp_path / "c").rglob("*") if p.is_file())
    block = bytearray(path.read_bytes())
    block[-20] ^= 1
    path.write_bytes(block)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(tmp_path, mode="r")[:]


@st.composite
def arrays_and_rows(draw: st.DrawFn) -> tuple[Array, list[int]]:
    """An array, some of its rows zeros, and any of its rows in any order."""
    dtype = draw(st.sampled_from(["uint8", "int16", "uint16", "int32"]))
    info = np.iinfo(dtype)
    data = draw(
        hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
            elements=st.integers(int(info.min), int(info.max)),
        )
    )
    rows = st.integers(0, len(data) - 1)
    data[draw(st.lists(rows))] = 0
    return data, draw(st.lists(rows))


@given(arrays_and_rows())
def test_what_is_read_is_what_zarr_reads(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Array, list[int]]
) -> None:
    data, rows = drawn
    path = str(tmp_path_factory.mktemp("array"))
    write_array(path, data, 1, AXES)
    expected, array = np.asarray(zarr.open_array(path, mode="r")[:]), ShardedArray.open(path)
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    found = array.rows(rows)
    assert found.dtype == expected.dtype and found.flags.writeable
    assert np.array_equal(found, expected[rows])
    assert np.array_equal(array.rows(range(len(data))), expected)


def test_what_zarr_itself_wrote_or_changed_is_read(tmp_path: Path) -> None:
    data = scan("int16")
    by_zarr(tmp_path, data, 1)
    assert np.array_equal(ShardedArray.open(str(tmp_path)).rows(range(len(data))), data)
    zarr.open_array(tmp_path, mode="r+")[2:4] = data[:2]
    assert np.array_equal(ShardedArray.open(str(tmp_path)).rows([3, 2, 5]), data[[1, 0, 5]])


@pytest.mark.parametrize("base", ["memory://sharded-array-test", "s3://bucket/sharded-array-test"])
def test_rows_are_read_from_an_object_store_too(request: pytest.FixtureRequest, base: str) -> None:
    if base.startswith("s3"):
        request.getfixturevalue("s3_endpoint")
    data = scan("int16")
    write_array(base, data, 1, AXES)
    array = ShardedArray.open(base)
    assert np.array_equal(array.rows([4, 2, 0]), data[[4, 2, 0]])
    assert np.array_equal(array.rows(range(len(data))), data)
    fs.remove(fs.join(base, "c"))
    for read in (lambda: array.rows([0]), lambda: ShardedArray.open(base)):
        with pytest.raises(ValueError, match="its c/0/0/0 is missing"):
            read()
    assert not array.rows([2]).any()  # which has no chunk


def test_a_bucket_is_asked_twice_for_an_array_and_once_for_the_rows_of_a_call(s3_proxy: Any, s3_impatient: Any) -> None:
    data, place = scan("uint8"), "s3://bucket/asked"
    write_array(place, data, 5, AXES)
    s3_proxy.mend()
    array = ShardedArray.open(place)
    assert [method for method, _ in s3_proxy.requests] == ["GET", "GET"]
    assert np.array_equal(array.rows([1, 3, 4]), data[[1, 3, 4]])
    assert len(s3_proxy.requests) == 3


def edited(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    """An edit of a shard's bytes."""

    def damage(folder: Path) -> None:
        path = folder / "c" / "0" / "0" / "0"
        block = bytearray(path.read_bytes())
        change(block)
        path.write_bytes(block)

    return damage


def without(part: slice) -> Callable[[Path], object]:
    """A shard's bytes but for some."""
    return edited(lambda block: block.__delitem__(part))


def flip(block: bytearray, at: int) -> None:
    block[at] ^= 1


def in_the_last_chunk(folder: Path) -> None:
    at = int(ShardedArray.open(str(folder)).index[-1, 0])
    edited(lambda block: block.__setitem__(slice(at + 16, at + 20), b"\xff" * 4))(folder)


def described(**changes: Any) -> Callable[[Path], object]:
    """Other values in the metadata."""

    def damage(folder: Path) -> None:
        path = folder / "zarr.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


INDEX = 6 * 16 + 4  # bytes
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "metadata missing": (lambda folder: (folder / "zarr.json").unlink(), "its zarr.json is missing"),
    "metadata cut off": (lambda folder: (folder / "zarr.json").write_text('{"shape": ['), "its zarr.json is damaged"),
    "metadata of something else": (lambda folder: (folder / "zarr.json").write_text("[]"), "its zarr.json is damaged"),
    "metadata not text": (lambda folder: (folder / "zarr.json").write_bytes(b"\xff\xfe\xff"), "zarr.json is damaged"),
    "another fill value": (described(fill_value=1), "its zarr.json is not as cardiomix writes it"),
    "another type": (described(data_type="uint8"), "its zarr.json is not as cardiomix writes it"),
    "no such type": (described(data_type="int12"), "its zarr.json is damaged"),
    "another shape": (described(shape=[7, 40, 36]), "its zarr.json is not as cardiomix writes it"),
    "negative shape": (described(shape=[-6, 40, 36]), "its zarr.json is not as cardiomix writes it"),
    "shard missing": (lambda folder: (folder / "c" / "0" / "0" / "0").unlink(), "its c/0/0/0 is missing"),
    "shard empty": (edited(bytearray.clear), "its shard is shorter than its index"),
    "shard shorter than its index": (
        without(slice(1 - INDEX)),
        "its shard is shorter than its index",
    ),
    "shard without its last byte": (edited(bytearray.pop), "its shard's index is damaged"),
    "shard cut in half": (without(slice(3000, None)), "its shard's index is damaged"),
    "shard without its beginning": (without(slice(100)), "chunk of its shard is damaged"),
    "bit of an offset": (edited(lambda block: flip(block, -INDEX)), "its shard's index is damaged"),
    "bit of a length": (edited(lambda block: flip(block, -20)), "its shard's index is damaged"),
    "bit of the checksum": (edited(lambda block: flip(block, -1)), "its shard's index is damaged"),
    "bit of a chunk's decoded size": (edited(lambda block: flip(block, 4)), "a chunk of its shard is damaged"),
    "bit of a chunk's encoded size": (edited(lambda block: flip(block, 12)), "a chunk of its shard is damaged"),
    "start of a chunk's first block": (in_the_last_chunk, "a chunk of its shard is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_missing_or_damaged_is_said(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_array(str(tmp_path), scan("int16"), 1, AXES)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        ShardedArray.open(str(tmp_path)).rows([0, 5])


def test_a_shard_that_loses_its_chunks_once_open_is_cut_off(tmp_path: Path) -> None:
    write_array(str(tmp_path), scan("int16"), 1, AXES)
    array = ShardedArray.open(str(tmp_path))
    without(slice(5, None))(tmp_path)
    with pytest.raises(ValueError, match="its shard is cut off"):
        array.rows([1])
