"""NIfTI in and out: orientation, voxel sizes, what is refused and how it is told."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from storage.errors import InputError
from storage.nifti.checks import check_same_grid, checked_image, checked_labels
from storage.nifti.file import NiftiFile, read_header
from storage.nifti.header import Header, Spacing
from storage.nifti.write import write_mask_like, write_volume

Write = Callable[..., Path]


def read_frame(
    path: str, index: int | None = None, spacing: Spacing | None = None
) -> tuple[npt.NDArray[np.float32], Spacing]:
    """One frame as ingest reads it: (Z, H, W) float32, and (slice, row, column) in mm."""
    with NiftiFile(path, spacing) as file:
        return checked_image(file.frame(index), file.name).astype(np.float32, copy=False), file.header.spacing_mm


def read_labels(path: str, index: int | None = None, coding: dict[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """One frame of a mask as ingest reads it: (Z, H, W) uint8 in our labels."""
    with NiftiFile(path) as file:
        return checked_labels(file.frame(index), coding or {1: 1, 2: 2, 3: 3}, file.name)


@pytest.fixture
def volume() -> np.ndarray[Any, np.dtype[np.int16]]:
    """File order: x 5, y 7, z 3."""
    return np.arange(105, dtype=np.int16).reshape(5, 7, 3)


def patched(path: Path, **fields: Any) -> Path:
    """Rewrite header fields of an uncompressed NIfTI-1 file behind nibabel's back."""
    block = path.read_bytes()
    header = nib.Nifti1Header(block[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + block[348:])
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_rows_are_the_second_axis_and_columns_the_first(
    tmp_path: Path, write_nifti: Write, volume: np.ndarray[Any, np.dtype[np.int16]], name: str
) -> None:
    path = str(write_nifti(tmp_path / name, volume, (1.25, 2.5, 8.0)))
    image, spacing = read_frame(path)
    assert image.shape == (3, 7, 5) and image.dtype == np.float32
    assert image[2, 6, 4] == volume[4, 6, 2] and image[0, 1, 0] == volume[0, 1, 0]
    assert spacing == (8.0, 2.5, 1.25)  # slice, row, column: rows are further apart
    header = read_header(path)
    assert (header.shape, header.frames, header.volume_shape) == ((5, 7, 3), 1, (3, 7, 5))


def test_a_frame_of_a_cine_is_read_alone(tmp_path: Path, write_nifti: Write) -> None:
    cine = np.random.default_rng(0).integers(0, 99, (5, 7, 3, 4)).astype(np.int16)
    path = str(write_nifti(tmp_path / "c.nii.gz", cine))
    for frame in (3, 0, 2):
        assert np.array_equal(read_frame(path, frame)[0], cine[..., frame].T)
    assert read_header(path).frames == 4
    with pytest.raises(InputError, match="has no frame 4: its frames are 0 to 3"):
        read_frame(path, 4)
    with pytest.raises(InputError, match="4 frames where one was expected"):
        read_frame(path)


def test_scaled_big_endian_and_nifti2_files_read_as_nibabel_reads_them(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(0, 50, (5, 7, 3))
    scaled = nib.Nifti1Image(values, np.eye(4))
    scaled.set_data_dtype(np.int16)
    swapped = nib.Nifti1Image(values.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    second = nib.Nifti2Image(values.astype(np.float32), np.eye(4))
    for name, image in {"scaled": scaled, "swapped": swapped, "second": second}.items():
        path = tmp_path / f"{name}.nii"
        nib.save(image, path)
        expected = np.asarray(nib.load(path).dataobj, dtype=np.float32).T
        assert np.array_equal(read_frame(str(path))[0], expected), name


def test_voxel_sizes_in_metres_or_with_a_sign_are_understood(tmp_path: Path, write_nifti: Write) -> None:
    data = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    path = patched(write_nifti(tmp_path / "m.nii", data), pixdim=[1, 0.0015, 0.0015, 0.008, 0, 0, 0, 0], xyzt_units=1)
    assert np.allclose(read_header(str(path)).spacing_mm, (8, 1.5, 1.5))
    path = patched(write_nifti(tmp_path / "n.nii", data), pixdim=[1, -1.5, 1.5, 8, 0, 0, 0, 0])
    assert read_header(str(path)).spacing_mm == (8, 1.5, 1.5)


def test_direction_cosines_that_are_not_orthonormal_are_not_refused(tmp_path: Path, write_nifti: Write) -> None:
    data = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    path = patched(
        write_nifti(tmp_path / "skew.nii", data), srow_x=[1.4, 0.3, 0, 0], quatern_b=0.9, quatern_c=0.9, qform_code=1
    )
    assert read_frame(str(path))[1] == (8, 1.5, 1.5)


BAD_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "zero voxel size": ({"pixdim": [1, 0, 0, 8, 0, 0, 0, 0]}, r"voxel size is 0 × 0 × 8 mm; fix the header"),
    "nan voxel size": ({"pixdim": [1, np.nan, 1, 8, 0, 0, 0, 0]}, r"voxel size is nan × 1 × 8 mm"),
    "infinite voxel size": ({"pixdim": [1, 1, np.inf, 8, 0, 0, 0, 0]}, r"voxel size is 1 × inf × 8 mm"),
    "10^12 voxels": ({"dim": [3, 10000, 10000, 10000, 1, 1, 1, 1]}, r"claims 10000 × 10000 × 10000 voxels"),
    "more than the file": ({"dim": [3, 50, 70, 30, 1, 1, 1, 1]}, r"more than the file can hold"),
    "an empty axis": ({"dim": [3, 5, 0, 3, 1, 1, 1, 1]}, r"claims 5 × 0 × 3 voxels"),
    "two axes": ({"dim": [2, 5, 7, 1, 1, 1, 1, 1]}, r"has 2 axes where 3 \(a volume\) or 4"),
    "five axes": ({"dim": [5, 5, 7, 3, 1, 1, 1, 1]}, r"has 5 axes"),
    "colours": ({"datatype": 128}, r"colours or complex"),
    "an unknown type": ({"datatype": 3}, r"header is not valid"),
    "data inside the header": ({"vox_offset": 10}, r"data start at byte 10"),
    "an image pair": ({"magic": b"ni1"}, r"one half of a \.hdr/\.img pair"),
    "an Analyze file": ({"magic": b""}, r"is not a NIfTI file"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_told_in_one_line_before_data_are_read(
    tmp_path: Path,
    write_nifti: Write,
    volume: np.ndarray[Any, np.dtype[np.int16]],
    fields: dict[str, Any],
    message: str,
) -> None:
    path = patched(write_nifti(tmp_path / "bad.nii", volume), **fields)
    with pytest.raises(InputError, match=message) as caught:
        read_header(str(path))
    assert str(caught.value).startswith("bad.nii: ") and "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_small_gzip_that_claims_a_huge_volume_is_refused_unread(
    tmp_path: Path, write_nifti: Write, volume: np.ndarray[Any, np.dtype[np.int16]]
) -> None:
    path = patched(write_nifti(tmp_path / "b.nii", volume), dim=[4, 512, 512, 100, 1000, 1, 1, 1])
    zipped = tmp_path / "bomb.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="more than the file can hold"):
        read_header(str(zipped))


def test_files_that_are_no_nifti_or_cut_off_are_told_apart(tmp_path: Path, write_nifti: Write) -> None:
    noise = np.random.default_rng(0).integers(0, 9999, (30, 30, 9)).astype(np.int16)
    whole = write_nifti(tmp_path / "whole.nii.gz", noise).read_bytes()
    cases = {
        "text.nii.gz": (b"this is no image at all", "is not a NIfTI file"),
        "zipped_text.nii.gz": (gzip.compress(b"this is no image at all"), "is not a NIfTI file"),
        "empty.nii.gz": (b"", "is not a NIfTI file"),
        "head.nii.gz": (whole[:60], "cut off: it cannot be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_header(str(tmp_path / name))
    (tmp_path / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
    read_header(str(tmp_path / "half.nii.gz"))
    flipped = bytearray(whole)
    flipped[-6] ^= 255  # the stream's checksum
    (tmp_path / "flipped.nii.gz").write_bytes(flipped)
    for name in ("half.nii.gz", "flipped.nii.gz"):
        with pytest.raises(InputError, match="damaged or cut off"):
            read_frame(str(tmp_path / name))
    with pytest.raises(InputError, match="no such file"):
        read_header(str(tmp_path / "absent.nii.gz"))
    with pytest.raises(InputError, match="cannot be opened"):
        read_header(str(tmp_path))


def test_a_cine_cut_off_anywhere_is_noticed_though_the_frames_before_are_whole(
    tmp_path: Path, write_nifti: Write
) -> None:
    cine = np.random.default_rng(0).integers(0, 9999, (12, 10, 3, 8)).astype(np.int16)
    whole = write_nifti(tmp_path / "whole.nii.gz", cine).read_bytes()
    for lost in (1, 4, 8, 9, 100, len(whole) // 2):
        (tmp_path / "cut.nii.gz").write_bytes(whole[:-lost])
        with pytest.raises(InputError, match="damaged or cut off"):
            read_frame(str(tmp_path / "cut.nii.gz"), 0)


def test_a_cine_in_several_gzip_parts_is_whole(tmp_path: Path, write_nifti: Write) -> None:
    cine = np.random.default_rng(0).integers(0, 9999, (12, 10, 3, 8)).astype(np.int16)
    content = write_nifti(tmp_path / "c.nii", cine).read_bytes()
    parts = [gzip.compress(content[start : start + 999]) for start in range(0, len(content), 999)]
    (tmp_path / "c.nii.gz").write_bytes(b"".join(parts))
    with NiftiFile(str(tmp_path / "c.nii.gz")) as file:
        for frame in (0, 5, 7, 2):
            assert np.array_equal(file.frame(frame), cine[..., frame].T)
    (tmp_path / "c.nii.gz").write_bytes(b"".join(parts[:-1]))
    with pytest.raises(InputError, match="damaged or cut off"):
        read_frame(str(tmp_path / "c.nii.gz"), 0)


def spoilt(rng: np.random.Generator, block: bytes, within: int) -> bytes:
    """A few bytes changed in the first `within`."""
    out = bytearray(block)
    for at in rng.integers(0, min(within, len(out)), rng.integers(1, 4)):
        out[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
    return bytes(out)


@pytest.mark.filterwarnings("error")
def test_no_byte_changed_in_a_file_does_worse_than_an_input_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cine = rng.integers(0, 900, (12, 10, 3, 4))
    wholes = [
        nib.Nifti1Image(cine.astype(np.int16), np.eye(4)).to_bytes(),
        nib.Nifti2Image(cine.astype(np.float64) * 1.3, np.eye(4)).to_bytes(),
    ]
    path, refused = tmp_path / "x.nii", 0
    for number in range(600):
        plain = wholes[number % 2]
        zipped = gzip.compress(plain, 1)
        path.write_bytes(
            (
                spoilt(rng, plain, 540),
                gzip.compress(spoilt(rng, plain, 540), 1),
                spoilt(rng, zipped, len(zipped)),
                zipped[: rng.integers(len(zipped))],
            )[number // 2 % 4]
        )
        try:
            with NiftiFile(str(path)) as file:
                for frame in (0, 2):
                    checked_image(file.frame(frame), file.name)
                check_same_grid(file.header, file.header)
        except InputError as error:
            refused += 1
            assert str(error).startswith("x.nii: ") and "\n" not in str(error)
    assert 150 < refused < 600


def test_images_without_information_are_refused(tmp_path: Path, write_nifti: Write) -> None:
    data = np.ones((4, 4, 2), np.float32)
    with pytest.raises(InputError, match="the image is constant: every voxel is 1"):
        read_frame(str(write_nifti(tmp_path / "c.nii", data)))
    data[0, 0, 0], data[1, 1, 1] = np.nan, np.inf
    with pytest.raises(InputError, match="2 voxels are NaN or infinite"):
        read_frame(str(write_nifti(tmp_path / "n.nii", data)))


def test_labels_are_recoded_and_strangers_refused(tmp_path: Path, write_nifti: Write) -> None:
    mask = np.array([0, 1, 2, 3], np.float64).reshape(4, 1, 1)
    path = str(write_nifti(tmp_path / "m.nii", mask))
    assert read_labels(path).ravel().tolist() == [0, 1, 2, 3]
    assert read_labels(path, coding={1: 3, 2: 2, 3: 1}).ravel().tolist() == [0, 3, 2, 1]
    for value in (4, 1.5, -1, np.nan, 257):
        mask[0] = value
        with pytest.raises(InputError, match="outside the coding"):
            read_labels(str(write_nifti(tmp_path / "s.nii", mask)))


@pytest.mark.parametrize(
    ("stored", "slope", "intercept"),
    [
        (np.float32([0, 0.9999, 1.9998, 2.9997]), 1, 0),
        (np.uint8([0, 85, 170, 255]), 3 / 255, 0),  # as nibabel scales floats into bytes
        (np.int16([-32768, -10923, 10922, 32767]), 3 / 65535, 32768 * 3 / 65535),
    ],
    ids=["float32 a bit off", "uint8 with a slope", "int16 with a slope"],
)
def test_labels_that_a_tool_scaled_are_rounded_to_the_whole_numbers_they_mean(
    tmp_path: Path, stored: npt.NDArray[Any], slope: float, intercept: float
) -> None:
    path = tmp_path / "m.nii"
    nib.save(nib.Nifti1Image(stored.reshape(4, 1, 1), np.eye(4)), path)
    patched(path, scl_slope=slope, scl_inter=intercept)
    assert set(np.unique(np.asarray(nib.load(path).dataobj))) != {0, 1, 2, 3}
    assert read_labels(str(path)).ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("value", "shown"), [(1.002, "1.002"), (12345.25, "12345.25"), (4, "4"), (2.5, "2.5")])
def test_a_value_outside_the_coding_is_shown_with_all_its_digits(
    tmp_path: Path, write_nifti: Write, value: float, shown: str
) -> None:
    mask = np.array([0, 1, 2, value], np.float32).reshape(4, 1, 1)
    with pytest.raises(InputError, match=rf"outside the coding: {re.escape(shown)}; write 0 for background"):
        read_labels(str(write_nifti(tmp_path / "m.nii", mask)))


def test_labels_beyond_one_byte_are_read_by_their_coding(tmp_path: Path, write_nifti: Write) -> None:
    coding = {500: 1, 205: 2, 600: 3, 65535: 0}
    mask = np.array([0, 500, 205, 600, 65535], np.int32).reshape(5, 1, 1)
    path = str(write_nifti(tmp_path / "m.nii", mask))
    assert read_labels(path, coding=coding).ravel().tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(InputError, match="outside the coding: 500, 600, 65535"):
        read_labels(path, coding={205: 2, 244: 1})  # 500 would be 244 in one byte
    mask[0] = 65536 + 500
    with pytest.raises(InputError, match="outside the coding: 66036"):
        read_labels(str(write_nifti(tmp_path / "m.nii", mask)), coding=coding)


def test_a_stated_spacing_stands_in_for_a_broken_one(
    tmp_path: Path, write_nifti: Write, volume: np.ndarray[Any, np.dtype[np.int16]]
) -> None:
    path = str(patched(write_nifti(tmp_path / "z.nii", volume), pixdim=[1, 0, 0, 0, 0, 0, 0, 0]))
    assert read_frame(path, spacing=(8, 1.4, 1.3))[1] == (8, 1.4, 1.3)
    with pytest.raises(InputError, match="the spacing given for it is 0 × 1 × 1 mm"):
        read_header(path, (0, 1, 1))


def test_a_mask_is_written_on_its_images_own_grid(tmp_path: Path) -> None:
    affine = np.array([[-1.3, 0.2, 0.4, 11], [0.1, -1.2, 0.3, -7], [0.5, 0.1, 7.9, 3], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(np.arange(105, dtype=np.int16).reshape(5, 7, 3), affine)
    image.header["descrip"] = b"somebody's name"
    image.header["aux_file"] = b"somebody's file"
    image.header.set_qform(np.diag([1, 2, 3, 1.0]), code=2)
    nib.save(image, tmp_path / "i.nii.gz")
    mask = np.random.default_rng(0).integers(0, 4, (3, 7, 5)).astype(np.uint8)
    write_mask_like(str(tmp_path / "out" / "m.nii.gz"), mask, str(tmp_path / "i.nii.gz"))
    written, source = nib.load(tmp_path / "out" / "m.nii.gz"), nib.load(tmp_path / "i.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), mask.transpose(2, 1, 0))
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.affine, source.affine)
    for field in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z"):
        assert np.array_equal(written.header[field], source.header[field]), field
    assert b"somebody" not in written.header.binaryblock
    assert np.array_equal(read_labels(str(tmp_path / "out" / "m.nii.gz")), mask)
    with pytest.raises(InputError, match="does not fit"):
        write_mask_like(str(tmp_path / "m.nii.gz"), mask[:2], str(tmp_path / "i.nii.gz"))


def test_a_cine_takes_a_mask_of_all_frames_or_of_one(tmp_path: Path, write_nifti: Write) -> None:
    cine = np.random.default_rng(0).integers(0, 99, (5, 7, 3, 2)).astype(np.int16)
    reference = str(write_nifti(tmp_path / "c.nii", cine, (1.25, 2.5, 8.0)))
    mask = np.random.default_rng(1).integers(0, 4, (2, 3, 7, 5)).astype(np.uint8)
    write_mask_like(str(tmp_path / "all.nii"), mask, reference)
    write_mask_like(str(tmp_path / "one.nii"), mask[1], reference)
    assert np.array_equal(read_labels(str(tmp_path / "all.nii"), 1), mask[1])
    assert np.array_equal(read_labels(str(tmp_path / "one.nii")), mask[1])
    assert read_header(str(tmp_path / "one.nii")).spacing_mm == (8, 2.5, 1.25)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_a_written_volume_reads_back_and_equal_data_are_equal_bytes(tmp_path: Path, name: str) -> None:
    data = np.random.default_rng(0).integers(-5, 4000, (2, 3, 7, 5)).astype(np.int16)
    for folder in ("a", "b"):
        write_volume(str(tmp_path / folder / name), data, (8.0, 1.75, 1.25), np.int16)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    image, spacing = read_frame(str(tmp_path / "a" / name), 1)
    assert np.array_equal(image, data[1]) and spacing == (8.0, 1.75, 1.25)
    by_nibabel = nib.load(tmp_path / "a" / name)
    assert np.array_equal(np.asarray(by_nibabel.dataobj), data.T)
    assert nib.aff2axcodes(by_nibabel.affine) == ("L", "P", "S")


def test_remote_files_read_like_local_ones(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 99, (3, 7, 5)).astype(np.int16)
    write_volume("memory://nifti-test/v.nii.gz", data, (8.0, 1.5, 1.25), np.int16)
    image, spacing = read_frame("memory://nifti-test/v.nii.gz")
    assert np.array_equal(image, data) and spacing == (8.0, 1.5, 1.25)


@pytest.fixture
def placed(tmp_path: Path) -> Callable[..., Header]:
    """The header of a file of 8 × 8 × 3 voxels whose affine is written in `unit`."""

    def header(affine: np.ndarray, unit: str = "mm") -> Header:
        scale = {"mm": 1.0, "meter": 1e-3}[unit]
        image = nib.Nifti1Image(np.zeros((8, 8, 3), np.int16), np.diag([scale, scale, scale, 1.0]) @ affine)
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "placed.nii")
        return read_header(str(tmp_path / "placed.nii"))

    return header


def turned(degrees: float, tilt: float = 30.0) -> np.ndarray:
    """An oblique grid, turned in its plane."""
    a, b = np.radians(degrees), np.radians(tilt)
    plane = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    oblique = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = oblique @ plane @ np.diag([1.5, 1.5, 8.0])
    return affine


def test_a_mask_turned_against_its_image_is_refused_and_one_that_lost_its_directions_passes(
    placed: Callable[..., Header],
) -> None:
    for degrees in (40.0, 64.0):
        with pytest.raises(InputError, match="turned against the image"):
            check_same_grid(placed(turned(0)), placed(turned(degrees)))
    check_same_grid(placed(turned(0)), placed(turned(1.0)))
    check_same_grid(placed(turned(0)), placed(np.diag([1.5, 1.5, 8.0, 1.0])))


def test_a_mask_that_lost_its_voxel_size_is_let_in_by_the_option_that_its_line_names(
    placed: Callable[..., Header],
) -> None:
    image, lost = placed(turned(0)), placed(np.eye(4))
    with pytest.raises(InputError) as caught:
        check_same_grid(image, lost, subject="p 1")
    assert caught.value.problem == "the mask's voxels are 1 × 1 × 1 mm, the image's 1.5 × 1.5 × 8 mm"
    option = """--set 'layouts.trust_mask_place=["p 1"]'"""
    assert caught.value.remedy.endswith(f"if only its header is wrong: {option}")
    check_same_grid(image, lost, placement=False)
    with pytest.raises(InputError, match="the mask is 8 × 8 × 3 voxels, the image 8 × 9 × 3"):
        check_same_grid(replace(image, shape=(8, 9, 3)), lost, placement=False)


def test_grids_in_metres_and_in_millimetres_are_compared_in_millimetres(placed: Callable[..., Header]) -> None:
    far = turned(0)
    far[:3, 3] = 50
    check_same_grid(placed(far, "meter"), placed(far))
    with pytest.raises(InputError, match=r"86\.6 mm beside"):
        check_same_grid(placed(turned(0), "meter"), placed(far, "meter"))


@pytest.mark.parametrize(
    ("voxels_xyz", "line"),
    [
        ((0, 0, 0.5), None),
        ((0.5, 0.5, 0.5), None),
        ((0.9, 0.9, 0), None),
        ((0, 0, 0.99), r"lies 7\.9 mm beside the image \(1\.0 slices\)"),
        ((0, 0, -1), r"lies 8\.0 mm beside the image \(1\.0 slices\)"),
        ((0, 0, 2), r"lies 16\.0 mm beside the image \(2\.0 slices\)"),
        ((0, 1.5, 0), r"lies 2\.2 mm beside the image;"),
    ],
)
def test_a_mask_a_slice_beside_its_image_is_refused_as_one_some_pixels_beside_it_is(
    placed: Callable[..., Header], voxels_xyz: tuple[float, ...], line: str | None
) -> None:
    """F13: paired by index, such a mask labelled every slice with its neighbour's heart."""
    image, beside = turned(0), turned(0)
    beside[:3, 3] = image[:3, :3] @ np.array(voxels_xyz)
    if line is None:
        check_same_grid(placed(image), placed(beside))
    else:
        with pytest.raises(InputError, match=line):
            check_same_grid(placed(image), placed(beside))
