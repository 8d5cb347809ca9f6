"""Arrays in one shard: the bytes are those that Zarr itself writes, and Zarr reads them."""

from __future__ import annotations

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

from storage.sharded_array import write_array

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
