"""How an array lies, by its header: every way of storing a short axis comes out as the scanner displays it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InputError
from storage.images import open_image, write_mask_of
from storage.layouts import LayoutOptions, read
from storage.nifti.checks import TimeAxis
from storage.nifti.header import Header
from storage.nifti.orientation import (
    AS_STORED,
    HEADER,
    LONG_AXIS,
    STORED,
    Turn,
    orientation_of,
    parsed_orientation,
)
from storage.slices.frames import read_frames

Floats = npt.NDArray[np.float64]

# Two real studies of GE, by their DICOM files: along a row, along a column (to the left, back and head).
DISPLAYED = [
    ((0.7122, 0.7011, -0.0344), (-0.3077, 0.2678, -0.9130)),
    ((0.6933, 0.6737, 0.2560), (0.0220, 0.3353, -0.9419)),
]
SIZE_MM = (1.4, 1.3, 8.0)
SHAPE = (7, 6, 4)
# A turn's axes and senses, as a whole: 48 for three axes.
STORINGS = [(axes, senses) for axes in permutations(range(3)) for senses in product((1, -1), repeat=3)]


def oblique(columns: npt.ArrayLike, rows: npt.ArrayLike, origin: tuple[float, ...] = (11.0, -40.0, 83.0)) -> Floats:
    """The affine, as NIfTI has it, of an image with these directions."""
    c, r = np.array(columns, dtype=float), np.array(rows, dtype=float)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([c, r, np.cross(c, r)]) * SIZE_MM
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def rotated(degrees: float) -> Floats:
    """A displayed short axis, turned in its plane."""
    c, r = (np.array(v) for v in DISPLAYED[1])
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return oblique(cos * c + sin * r, cos * r - sin * c)


def stored(
    data_xyz: npt.NDArray[Any], affine: Floats, axes: tuple[int, ...], senses: tuple[int, ...]
) -> nib.Nifti1Image:
    """The same image with its array stored otherwise, its header right."""
    orientation = np.array([[axes.index(axis), senses[axes.index(axis)]] for axis in range(3)], dtype=float)
    return nib.Nifti1Image(data_xyz, affine).as_reoriented(orientation)


def header(affine: Floats | None, shape: tuple[int, ...] = SHAPE) -> Header:
    rows = None if affine is None else tuple(tuple(float(v) for v in row) for row in affine[:3])
    return Header(shape, SIZE_MM[::-1], "<i2", "folder/a.nii.gz", rows)


@pytest.mark.parametrize("displayed", DISPLAYED)
@pytest.mark.parametrize("way", range(len(STORINGS)))
def test_every_way_of_storing_is_turned_to_the_display_and_its_mask_back(
    tmp_path: Path, displayed: tuple[Any, Any], way: int
) -> None:
    data = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    image = stored(data, oblique(*displayed), *STORINGS[way])
    path = str(tmp_path / "a.nii.gz")
    nib.save(image, path)
    with open_image(path) as file:
        found, place = file.frame(None), file.header
        assert file.orientation.known and not file.orientation.doubt
    wanted = data.transpose(2, 1, 0)
    backwards = not np.array_equal(found, wanted)  # slices keep the file's order
    np.testing.assert_array_equal(found[:: -1 if backwards else 1], wanted)
    np.testing.assert_allclose(place.spacing_mm, SIZE_MM[::-1], rtol=1e-3)
    directions = place.directions
    assert directions is not None
    np.testing.assert_allclose(directions[:, :2], (np.diag([-1, -1, 1]) @ np.array(displayed).T), atol=1e-3)
    # The header is true of the turned array: its first voxel lies where it lies in the file.
    at = np.argwhere(np.asarray(image.dataobj) == found[0, 0, 0])[0]
    np.testing.assert_allclose(np.array(place.affine)[:, 3], (image.affine @ [*at, 1])[:3], atol=1e-3)

    mask = (found % 5 == 0).astype(np.uint8)
    write_mask_of(str(tmp_path / "m.nii.gz"), mask, path)
    written = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(image.dataobj) % 5 == 0)
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)


@given(st.permutations(range(4)), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 2**32 - 1))
def test_turning_there_and_back_changes_nothing(axes: list[int], back: tuple[bool, bool, bool], seed: int) -> None:
    turn = Turn((axes[0], axes[1], axes[2], axes[3]), back)
    data = np.random.default_rng(seed).integers(0, 99, (2, 3, 4, 5))
    np.testing.assert_array_equal(turn.back(turn.cine(data)), data)
    if not turn.moves_frames:
        np.testing.assert_array_equal(turn.volume(data[1]), turn.cine(data)[1])
        np.testing.assert_array_equal(turn.back(turn.volume(data[1])), data[1])
    assert turn.cine(data).shape == turn.header(header(None, data.shape[::-1])).shape[::-1]
    words = parsed_orientation(turn.words.upper().replace(" ", ", "), "here")
    assert words == turn.words and orientation_of(header(None), words).turn == turn


@pytest.mark.parametrize("degrees", range(0, 360, 10))
def test_an_image_turned_in_its_plane_is_turned_back_by_quarters_but_halfway_it_is_left_or_refused(
    degrees: int,
) -> None:
    quarters, rest = round(degrees / 90) % 4, abs((degrees + 45) % 90 - 45)
    if rest > 40:
        pytest.skip("nearer than 5° to halfway")
    ways = {0: "x y z", 1: "-y x z", 2: "-x -y z", 3: "y -x z"}
    try:
        found = orientation_of(header(rotated(degrees)))
    except InputError as error:
        assert rest > 30 and "halfway" in error.problem and ways[quarters] in error.remedy
    else:
        assert found.turn.words == ways[quarters] or (rest > 30 and found.doubt and found.turn == AS_STORED)


def test_halfway_between_two_ways_the_stored_one_stays_with_a_doubt_and_another_is_refused() -> None:
    near = next(d for d in range(30, 60) if orientation_of(header(rotated(d))).doubt)
    left = orientation_of(header(rotated(near)))
    assert left.turn == AS_STORED and not left.known and "halfway" in left.doubt
    affine = rotated(near)
    affine[:, 3] += affine[:, 1] * (SHAPE[1] - 1)
    affine[:, 1] *= -1  # its rows run up, so that it has to be turned
    with pytest.raises(InputError, match=r"a\.nii\.gz: .*halfway.* --orientation, .*'x -y z'"):
        orientation_of(header(affine))
    assert orientation_of(header(affine), STORED).turn == AS_STORED
    assert orientation_of(header(affine), "x -y z").turn.words == "x -y z"


@pytest.mark.parametrize(
    ("affine", "why"),
    [
        (None, "no directions"),
        (np.diag([1.4, 1.3, 8.0, 1.0]), "says nothing"),
        (np.diag([-1.4, -1.3, 8.0, 1.0]), "says nothing"),
        (np.diag([-1.0, -1.0, 1.0, 1.0]), "says nothing"),  # ACDC's
        (np.diag([0.0, 1.3, 8.0, 1.0]), "no directions"),
    ],
)
def test_headers_that_a_converter_made_up_say_nothing(affine: Floats | None, why: str) -> None:
    found = orientation_of(header(affine))
    assert found.turn == AS_STORED and not found.known and not found.doubt and why in found.why


def test_a_header_along_the_scanner_s_axes_is_followed_with_a_doubt() -> None:
    upright = np.diag([-1.4, -1.3, 8.0, 1.0])
    upright[:3, 3] = 50, 60, -20
    assert orientation_of(header(upright)).turn == AS_STORED and not orientation_of(header(upright)).doubt
    found = orientation_of(header(upright @ np.diag([1, -1, 1, 1])))
    assert found.turn.words == "x -y z" and "as no short axis does" in found.doubt


def test_slices_along_the_long_axis_are_left_as_they_are() -> None:
    along = -LONG_AXIS / np.linalg.norm(LONG_AXIS)
    across = np.cross(along, [0, 0, 1.0])
    found = orientation_of(header(oblique(across / np.linalg.norm(across), along)))
    assert found.turn == AS_STORED and not found.known and "long axis" in found.doubt


@pytest.mark.parametrize("text", ["", "x y", "x y y", "x y z z", "up", "x y t -z", "x--y z"])
def test_an_orientation_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write header, stored, or the file's axes"):
        parsed_orientation(text, "here")
    with pytest.raises(ValueError, match="write header, stored"):
        LayoutOptions(orientation=text)


def test_frames_on_the_third_axis_are_turned_when_told_so(tmp_path: Path) -> None:
    cine = np.random.default_rng(0).integers(0, 99, (6, 5, 4, 3)).astype(np.int16)  # x, y, t, z
    path = str(tmp_path / "c.nii.gz")
    nib.save(nib.Nifti1Image(cine, oblique(*DISPLAYED[0])), path)
    with open_image(path, orientation="x y t z") as file:
        assert file.header.shape == (6, 5, 3, 4) and file.header.spacing_mm == pytest.approx((8.0, 1.3, 1.4), rel=1e-3)
        frames = [file.frame(t) for t in range(4)]
        with pytest.raises(InputError, match="has no frame 4: its frames are 0 to 3"):
            file.frame(4)
    for t, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, cine[:, :, t].transpose(2, 1, 0))
    write_mask_of(str(tmp_path / "m.nii.gz"), np.stack(frames).astype(np.uint8), path, orientation="x y t z")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj), cine)
    nib.save(nib.Nifti1Image(cine[..., 0], np.eye(4)), path)
    with pytest.raises(InputError, match="has three axes, one of them frames"):
        open_image(path, orientation="x y t z")


@pytest.mark.parametrize("second", [(1.0, 0.0, 0.0), (0.9, 0.3, 0.1)])
def test_a_header_whose_axes_are_not_at_right_angles_says_nothing_and_is_told(second: tuple[float, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([(1.0, 0.0, 0.0), second, (0.0, 0.0, 1.0)]) * SIZE_MM
    affine[:3, 3] = 5.0
    found = orientation_of(header(affine))
    assert found.turn == AS_STORED and not found.known and "right angles" in found.doubt


def test_slices_that_are_more_alike_than_frames_are_frames() -> None:
    rng = np.random.default_rng(1)
    cine = rng.normal(0, 100, (4, 1, 20, 20)) + rng.normal(0, 10, (4, 9, 20, 20))  # frames, slices
    wrong, right = TimeAxis("a.nii"), TimeAxis("a.nii")
    for frame in cine:
        wrong.add(frame)
    for frame in cine.transpose(1, 0, 2, 3):
        right.add(frame)
    right.check()
    with pytest.raises(
        InputError, match=r"a\.nii: its third axis looks like time .* 'x y t z', or stored .*--orientation"
    ):
        wrong.check()


@pytest.mark.parametrize("way", [5, 18, 31, 44])
def test_ingest_turns_a_study_and_its_mask_together(
    tmp_path: Path, study: Callable[..., tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]], way: int
) -> None:
    image, mask = (volume[..., 0] for volume in study(0))
    lines = ["subject,image,mask,vendor,centre,ed,es,orientation"]
    for name, storing in (("base", STORINGS[0]), ("turned", STORINGS[way]), ("kept", STORINGS[way])):
        for data, end in ((image, ""), (mask, "_gt")):
            nib.save(stored(data, oblique(*DISPLAYED[0]), *storing), tmp_path / f"{name}{end}.nii.gz")
        lines.append(f"{name},{name}.nii.gz,{name}_gt.nii.gz,X,c,0,,{STORED if name == 'kept' else ''}")
    (tmp_path / "subjects.csv").write_text("\n".join(lines) + "\n")
    subjects, skipped = read(str(tmp_path))
    assert not skipped and {s.subject: s.orientation for s in subjects} == {
        "base": HEADER,
        "kept": STORED,
        "turned": HEADER,
    }
    base, kept, turned = (next(iter(read_frames(subject))) for subject in subjects)
    assert base.mask is not None and turned.mask is not None
    sense = 1 if np.array_equal(turned.image.stored, base.image.stored) else -1
    np.testing.assert_array_equal(turned.image.stored[::sense], base.image.stored)
    np.testing.assert_array_equal(turned.mask[::sense], base.mask)
    assert turned.statistics == base.statistics and turned.header.spacing_mm == pytest.approx(base.header.spacing_mm)
    raw = np.asarray(nib.load(tmp_path / "kept.nii.gz").dataobj)
    np.testing.assert_array_equal(kept.image.stored * kept.image.scale + kept.image.offset, raw.transpose(2, 1, 0))
