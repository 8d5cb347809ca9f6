"""From a folder as it comes from a scanner to the short-axis cine in it, and what is said of the rest."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from pipeline.inference.find_studies import find_studies
from storage.dicom.study import DicomStudy, dicom_folders
from storage.errors import InputError
from storage.images import open_image, write_mask_of
from storage.layouts import LayoutOptions, detect, read
from storage.slices.frames import read_frames
from storage.slices.writer import finalise, write_subject
from storage.survey.survey import survey
from tests.dicom_files import LONG_AXIS, PERSON, TRANSVERSE, Place, Writer, everything_below, trigger

PHASES, SLICES, ROWS, COLUMNS = 6, 4, 14, 12


def volume(seed: int = 0, phases: int = PHASES, slices: int = SLICES, size: tuple[int, int] = (ROWS, COLUMNS)) -> Any:
    """(T, Z, H, W) int16, every image different."""
    return np.random.default_rng(seed).integers(0, 1500, (phases, slices, *size)).astype(np.int16)


def read_volume(folder: Path) -> npt.NDArray[Any]:
    with DicomStudy(str(folder)) as study:
        return np.stack([study.frame(t) for t in range(study.header.frames)])


def problem(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        DicomStudy(str(folder))
    return str(caught.value)


# ---- the stack


@settings(max_examples=8)
@given(
    order=st.randoms(use_true_random=False),
    split=st.sampled_from(["one series", "a series a slice", "two series"]),
    backwards=st.booleans(),
)
def test_the_stack_is_the_volume_whatever_the_order_names_and_series_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, split: str, backwards: bool
) -> None:
    folder, expected = tmp_path_factory.mktemp("study"), volume(order.randrange(100), phases=5)
    names = [
        f"{order.choice('ab')}/{order.choice(['', 'x/'])}{k:03d}{order.choice(['', '.dcm', '.IMA'])}" for k in range(99)
    ]
    order.shuffle(names)
    writer = Writer(folder, names)
    of_series = {"one series": [range(4)], "a series a slice": [[2], [0], [3], [1]], "two series": [[0, 2], [3, 1]]}
    for number, slices in enumerate(of_series[split], start=1):
        times: dict[str, Any] = {"slices": reversed(list(slices)) if backwards else slices}
        writer.cine(expected, number=number, **times)
    np.testing.assert_array_equal(read_volume(folder), expected)
    assert DicomStudy(str(folder)).left_out == ()


def test_phases_follow_the_trigger_time_and_not_the_numbers_of_the_images(tmp_path: Path) -> None:
    expected, writer = volume(), Writer(tmp_path)
    for z in range(SLICES):
        for t in range(PHASES):
            tags = {"SeriesInstanceUID": f"1.2.{z}", "SeriesNumber": z, "TriggerTime": trigger(t, PHASES)}
            writer.image(expected[t, z], z=z, InstanceNumber=PHASES - t, **tags)
    np.testing.assert_array_equal(read_volume(tmp_path), expected)
    for path in writer.written:  # without trigger times, the numbers count
        dataset = pydicom.dcmread(path)
        del dataset.TriggerTime
        dataset.save_as(path)
    np.testing.assert_array_equal(read_volume(tmp_path), expected[::-1])


def test_the_grid_is_the_scanners_in_right_front_head(tmp_path: Path) -> None:
    place = Place()
    Writer(tmp_path).cine(volume(), place)
    header = DicomStudy(str(tmp_path)).header
    assert header.shape == (COLUMNS, ROWS, SLICES, PHASES)
    np.testing.assert_allclose(header.spacing_mm, (8.0, 1.5, 1.25), atol=1e-3)  # PixelSpacing is row, then column
    affine, flip = np.array(header.affine), np.array([-1, -1, 1])
    for column, row, z in ((0, 0, 0), (5, 0, 0), (0, 7, 0), (3, 2, 3)):
        right, down = (np.asarray(d) for d in place.directions)
        expected = np.array(place.position(z)) + column * 1.25 * right + row * 1.5 * down
        np.testing.assert_allclose(affine @ [column, row, z, 1], flip * expected, atol=1e-2)
    assert DicomStudy(str(tmp_path), (10.0, 1.0, 2.0)).header.spacing_mm == (10.0, 1.0, 2.0)


def test_the_distance_of_slices_is_that_of_their_positions_and_not_their_thickness(tmp_path: Path) -> None:
    Writer(tmp_path).cine(volume(), Place(step=10.0), SliceThickness=6.0, SpacingBetweenSlices=6.0)
    assert DicomStudy(str(tmp_path)).header.spacing_mm[0] == pytest.approx(10.0, abs=1e-3)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_images_are_the_same_images(tmp_path: Path, syntax: str) -> None:
    expected = volume(phases=5, slices=3)
    Writer(tmp_path).cine(expected, syntax=syntax)
    found = read_volume(tmp_path)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, expected)


def test_slope_and_intercept_are_applied_and_monochrome1_is_inverted(tmp_path: Path) -> None:
    expected = volume(phases=5, slices=3)
    Writer(tmp_path / "scaled").cine(expected, RescaleSlope=0.5, RescaleIntercept=-3)
    np.testing.assert_array_equal(read_volume(tmp_path / "scaled"), expected * 0.5 - 3)
    inverted = (4095 - expected).astype(np.uint16)
    Writer(tmp_path / "inverted").cine(inverted, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_volume(tmp_path / "inverted"), expected)


def test_one_enhanced_object_is_a_whole_study(tmp_path: Path) -> None:
    expected = volume()
    Writer(tmp_path).enhanced(expected)
    np.testing.assert_array_equal(read_volume(tmp_path), expected)
    header = DicomStudy(str(tmp_path)).header
    np.testing.assert_allclose(header.spacing_mm, (8.0, 1.5, 1.25), atol=1e-3)


# ---- what is left out


def test_other_series_of_the_study_are_left_out_and_said(tmp_path: Path) -> None:
    expected, writer = volume(), Writer(tmp_path)
    for k, directions in enumerate((TRANSVERSE, LONG_AXIS)):
        writer.image(expected[0, k], Place(directions), SeriesNumber=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    writer.cine(expected[:1], Place(TRANSVERSE), number=2)  # a survey of one phase
    writer.cine(expected, Place(LONG_AXIS), number=3)
    writer.cine(expected, number=4)
    writer.cine(volume(1), number=5, ImageType=["ORIGINAL", "PRIMARY", "P", "RETRO"])
    writer.cine(volume(2, phases=9, slices=3), number=6, TriggerTime=500.0)  # perfusion: one time of every beat
    writer.cine(volume(3, slices=3), number=7, SequenceVariant="SP")  # tagged
    writer.image(expected[0, 0], SeriesNumber=8, PhotometricInterpretation="RGB", SamplesPerPixel=3)
    writer.image(expected[0, 0], SeriesNumber=9, Modality="CT")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    (tmp_path / "IM9999").write_bytes(writer.written[-3].read_bytes()[:400])
    np.testing.assert_array_equal(read_volume(tmp_path), expected)
    assert DicomStudy(str(tmp_path)).left_out == (
        "series 1: 2 images, localisers",
        "series 2: 4 images, fewer than 5 phases",
        "series 3: 24 images, cines along the long axis or oblique to it",
        "series 5: 24 images, not magnitude",
        "series 6: 27 images, one time of the beat, no cine",
        "series 7: 18 images, another short-axis stack, of 3 slices",
        "series 8: 1 image, no grey values",
        "1 images that are not MR",
        "1 DICOM files that cannot be read",
    )


def test_of_a_slice_taken_twice_the_last_counts_unless_it_was_broken_off(tmp_path: Path) -> None:
    expected, writer = volume(), Writer(tmp_path)
    again, broken = volume(1), volume(2)
    writer.cine(expected, number=4)
    writer.cine(again, number=9, slices=[2])
    writer.cine(broken[:5], number=10, slices=[1])
    found = read_volume(tmp_path)
    np.testing.assert_array_equal(found[:, 2], again[:, 2])
    np.testing.assert_array_equal(found[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert DicomStudy(str(tmp_path)).left_out == (
        "series 4: 6 images, a slice that series 9 has too, later or with more phases",
        "series 10: 5 images, a slice that series 4 has too, later or with more phases",
    )


def test_a_file_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    writer, expected = Writer(tmp_path), volume()
    writer.cine(expected)
    (tmp_path / "copy").write_bytes(writer.written[3].read_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path), expected)
    assert DicomStudy(str(tmp_path)).left_out == ("series 5: 1 image, copies of the same image",)


def test_a_second_stack_between_the_slices_of_the_first_is_not_mixed_in(tmp_path: Path) -> None:
    expected, writer = volume(slices=5), Writer(tmp_path)
    writer.cine(expected, number=4)
    moved = Place(origin=tuple(np.asarray(Place().origin) + 3 * Place().normal))
    writer.cine(volume(1, slices=4), moved, number=5)
    np.testing.assert_array_equal(read_volume(tmp_path), expected)
    assert DicomStudy(str(tmp_path)).left_out == ("series 5: 24 images, not at the distances of the stack's slices",)


# ---- what is refused


def test_a_missing_slice_or_phase_is_named(tmp_path: Path) -> None:
    expected = volume(phases=8, slices=6)
    Writer(tmp_path / "slice").cine(expected, slices=[0, 1, 3, 4, 5])
    assert problem(tmp_path / "slice").startswith(
        "slice: slices 2 and 3 of 5 lie 16 mm apart, others 8: a slice is missing; export the study again"
    )
    writer = Writer(tmp_path / "phase")
    writer.cine(expected, number=7)
    writer.written[2 * 8 + 1].unlink()
    assert problem(tmp_path / "phase").startswith("phase: slice 3 of 6 (series 7) has 7 phases, others 8; export")
    writer.written[2 * 8 + 2].write_bytes(writer.written[0].read_bytes()[:300])
    assert "; 1 DICOM files cannot be read; export" in problem(tmp_path / "phase")


def test_a_slice_with_another_matrix_is_refused(tmp_path: Path) -> None:
    expected, writer = volume(slices=6), Writer(tmp_path / "p1")
    writer.cine(expected, number=4, slices=[0, 1, 2, 3, 4])
    writer.cine(volume(1, slices=6, size=(ROWS, 10)), number=5, slices=[5])
    assert problem(tmp_path / "p1").startswith(
        "p1: series 5 has a slice of the stack with 10 × 14 pixels of 1.25 × 1.5 mm, the other slices have 12 × 14 "
    )


def test_a_study_without_a_short_axis_cine_says_what_it_has(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "p1")
    writer.cine(volume(), Place(LONG_AXIS), number=3)
    writer.cine(volume(), number=4, slices=[0])
    assert problem(tmp_path / "p1") == (
        "p1: has no short-axis cine (series 3: 24 images, cines along the long axis or oblique to it; "
        "series 4: 6 images, 1 slice across the long axis, fewer than 3); name the folder of a study that has one, or "
        "convert its series to NIfTI"
    )


def test_two_studies_in_one_folder_are_refused_and_in_two_are_two(tmp_path: Path) -> None:
    small = volume(0, 5, 3)
    for folder in ("mixed", "apart/p1/DICOM/ST0/SE4"):
        Writer(tmp_path / folder).cine(small)
    for folder in ("mixed", "apart/p2/SE1"):
        Writer(tmp_path / folder, [f"B{k}" for k in range(99)], study=generate_uid()).cine(volume(1, 5, 3))
    assert problem(tmp_path / "mixed").startswith("mixed: holds 2 studies that have short-axis cines; give each")
    assert dicom_folders(str(tmp_path / "apart")) == [str(tmp_path / "apart" / p) for p in ("p1", "p2")]
    assert problem(tmp_path / "apart").startswith("apart: holds 2 studies in folders of their own; name one")
    np.testing.assert_array_equal(read_volume(tmp_path / "apart" / "p1"), small)


def test_the_one_study_of_a_folder_is_the_folder_however_deep_it_lies(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        Writer(tmp_path / patient / "DICOM", study=generate_uid()).cine(volume())
        assert dicom_folders(str(tmp_path / patient)) == [str(tmp_path / patient)]
    found, _ = find_studies([str(tmp_path / "p1"), str(tmp_path / "p2")], str(tmp_path / "out"))
    assert [study.name for study in found] == ["p1", "p2"]
    (subject,), skipped = read(str(tmp_path / "p2"))
    assert subject.subject == "p2" and not skipped


def test_stacks_of_several_folders_without_a_study_number_are_not_taken_for_one_patients(tmp_path: Path) -> None:
    """An anonymiser may blank StudyInstanceUID: two patients then look like one study."""
    for k, patient in enumerate(("p1", "p2")):
        place = Place(pixel=(1.5 - 0.1 * k, 1.25))
        Writer(tmp_path / patient, [f"{patient}{i}" for i in range(99)], study="").cine(volume(k), place)
    assert problem(tmp_path).endswith(
        "several folders hold a short-axis stack, and no StudyInstanceUID says whether of one patient; "
        "name each study's folder by itself"
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "p2"), volume(1))


def test_images_that_cannot_be_decoded_are_one_line(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "p1")
    writer.cine(volume(), syntax=RLELossless)
    path = writer.written[0]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"^p1: an image of series 5 is damaged or compressed in a way that is not"):
        read_volume(tmp_path / "p1")


# ---- the layout


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients' folders, one of an unknown scanner, and one without a short axis."""
    folder = tmp_path_factory.mktemp("hospital")
    Writer(folder / "p1" / "sa").cine(volume(1))
    Writer(folder / "p1" / "la").cine(volume(1), Place(LONG_AXIS), number=3)
    Writer(folder / "p2", study=generate_uid()).cine(volume(2), Manufacturer="SIEMENS")
    Writer(folder / "p3", study=generate_uid()).cine(volume(3), Manufacturer="")
    Writer(folder / "p4", study=generate_uid()).cine(volume(4), Place(LONG_AXIS))
    return folder


def test_the_layout_names_subjects_by_folder_and_vendors_by_scanner(hospital: Path) -> None:
    assert detect(str(hospital)) == "dicom"
    subjects, skipped = read(str(hospital))
    assert [(s.subject, s.vendor, s.centre) for s in subjects] == [
        ("p1", "GE", "unknown"),
        ("p2", "Siemens", "unknown"),
    ]
    assert [(f.phase, f.frame, f.image_index, f.mask) for f in subjects[0].frames] == [
        ("-", 0, 0, None),
        ("-", 3, 3, None),
    ]
    assert subjects[0].left_out == ("series 3: 24 images, cines along the long axis or oblique to it",)
    assert [(s.subject, s.file) for s in skipped] == [("p3", "p3"), ("p4", "p4")]
    assert (skipped[0].reason, skipped[0].remedy) == (
        "does not say who made the scanner",
        "--set layouts.dicom_vendor=NAME",
    )
    options = LayoutOptions(frames="all", dicom_vendor="C", dicom_centre="North")
    subjects, skipped = read(str(hospital), options=options)
    assert [(s.subject, s.vendor, s.centre, len(s.frames)) for s in subjects] == [
        (name, "C", "North", PHASES) for name in ("p1", "p2", "p3")
    ]
    (alone,), _ = read(str(hospital / "p2"))  # the files lie in the folder itself
    assert alone.subject == "p2"


def test_inspect_says_what_is_left_out_of_subjects_that_come_in(hospital: Path) -> None:
    found = survey([str(hospital)])
    assert [(s.subject, s.vendor, s.height, s.width) for s in found.subjects] == [
        ("p1", "GE", ROWS, COLUMNS),
        ("p2", "Siemens", ROWS, COLUMNS),
    ]
    assert found.left_out == ("p1: left out: series 3: 24 images, cines along the long axis or oblique to it",)
    assert [s.subject for s in found.skipped] == ["p3", "p4"]


def test_the_slice_store_holds_the_stack_and_no_person(hospital: Path, tmp_path: Path, caplog: Any, capfd: Any) -> None:
    caplog.set_level(0)
    subjects, skipped = read(str(hospital), options=LayoutOptions(frames="all"))
    stored = {s.subject: write_subject(str(tmp_path), s) for s in subjects}
    finalise(str(tmp_path), stored, skipped, subjects)
    for number, subject in enumerate(subjects, start=1):
        found = np.stack([f.image.stored * f.image.scale + f.image.offset for f in read_frames(subject)])
        np.testing.assert_allclose(found, volume(number), atol=1e-6)
    mask = np.zeros((SLICES, ROWS, COLUMNS), np.uint8)
    write_mask_of(str(tmp_path / "mask.nii"), mask, subjects[0].frames[0].image)
    written = everything_below(tmp_path) + caplog.text.encode() + "".join(capfd.readouterr()).encode()
    written += repr((subjects, skipped)).encode()
    assert b"p1" in written
    for tag, value in PERSON.items():
        assert value.encode() not in written, tag


def test_a_subject_is_read_again_when_one_of_its_files_changes(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data" / "p1")
    writer.cine(volume())
    (subject,), _ = read(str(tmp_path / "data"))
    before = write_subject(str(tmp_path / "run"), subject)
    assert write_subject(str(tmp_path / "run"), subject) == before
    (tmp_path / "data" / "p1" / "IM0000").unlink()
    other = pydicom.dcmread(writer.written[1])
    tags = {tag: getattr(other, tag) for tag in ("SeriesInstanceUID", "SeriesNumber")}
    new = Writer(tmp_path / "data" / "p1", ["new"])
    new.image(volume(7)[0, 0], **tags, TriggerTime=trigger(0, PHASES), InstanceNumber=1)
    assert write_subject(str(tmp_path / "run"), subject).digests[0] != before.digests[0]


def test_a_link_out_of_the_data_folder_is_not_followed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data" / "p1")
    writer.cine(volume())
    outside = writer.written[0].rename(tmp_path / "outside")
    writer.written[0].symlink_to(outside)
    _, (skipped,) = read(str(tmp_path / "data"))
    assert (skipped.subject, skipped.reason) == ("data", "is a link that leaves the data folder")
    assert len(read(str(tmp_path / "data"), options=LayoutOptions(follow_links=True))[0]) == 1


def test_a_mask_is_nifti_on_the_studys_grid(tmp_path: Path) -> None:
    Writer(tmp_path / "p1").cine(volume())
    mask = np.random.default_rng(0).integers(0, 4, (PHASES, SLICES, ROWS, COLUMNS)).astype(np.uint8)
    write_mask_of(str(tmp_path / "mask.nii.gz"), mask, str(tmp_path / "p1"))
    with open_image(str(tmp_path / "p1")) as image, open_image(str(tmp_path / "mask.nii.gz")) as written:
        assert written.header.shape == image.header.shape
        np.testing.assert_allclose(written.header.spacing_mm, image.header.spacing_mm, atol=1e-3)
        np.testing.assert_allclose(np.array(written.header.affine), np.array(image.header.affine), atol=1e-3)
        np.testing.assert_array_equal(written.frame(2), mask[2])


def test_a_table_pairs_a_study_with_masks_on_its_grid(tmp_path: Path) -> None:
    expected = volume()
    Writer(tmp_path / "data" / "p1").cine(expected)
    mask = np.zeros((PHASES, SLICES, ROWS, COLUMNS), np.uint8)
    mask[[0, 2], :, 4:10, 3:9], mask[[0, 2], :, 5:9, 4:8], mask[[0, 2], :, 4:10, :3] = 2, 1, 3
    write_mask_of(str(tmp_path / "data" / "mask.nii.gz"), mask, str(tmp_path / "data" / "p1"))
    table = "subject,image,mask,vendor,centre,ed,es\np1,p1,mask.nii.gz,GE,North,0,2\n"
    (tmp_path / "data" / "subjects.csv").write_text(table)
    (subject,), skipped = read(str(tmp_path / "data"))
    assert (subject.layout, skipped) == ("table", [])
    for frame in read_frames(subject):
        found = frame.image.stored * frame.image.scale + frame.image.offset
        np.testing.assert_allclose(found, expected[frame.source.frame], atol=1e-6)
        np.testing.assert_array_equal(frame.mask, mask[frame.source.frame])


# ---- real studies


def by_the_documents_script(folder: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """What the script made that docs/data.md held before cardiomix read DICOM: (x, y, slice, frame) and its affine."""
    files = [pydicom.dcmread(p) for p in sorted(folder.rglob("*.dcm"))]
    along_row, along_column = np.array(files[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    slices: dict[float, list[Any]] = {}
    for f in files:
        slices.setdefault(round(float(normal @ np.array(f.ImagePositionPatient, float)), 1), []).append(f)
    depths = sorted(slices)
    frames = [sorted(slices[d], key=lambda f: (float(f.get("TriggerTime", 0)), int(f.InstanceNumber))) for d in depths]
    data = np.stack([np.stack([f.pixel_array.T for f in s], axis=-1) for s in frames], axis=2)
    first, (row_mm, col_mm) = frames[0][0], map(float, frames[0][0].PixelSpacing)
    step = (depths[-1] - depths[0]) / (len(depths) - 1)
    axes = [along_row * col_mm, along_column * row_mm, normal * step, np.array(first.ImagePositionPatient, float)]
    return data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.vstack([np.column_stack(axes), [0, 0, 0, 1]])


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # what the data set's own anonymiser wrote
@pytest.mark.parametrize(("code", "converted"), [("SCD0000301", "SC-HF-I-4"), ("SCD0000401", "SC-HF-I-5")])
def test_real_studies_are_stacked_as_they_were_converted(
    real_sunnybrook: Path, real_dicom: Path, code: str, converted: str
) -> None:
    with DicomStudy(str(real_dicom / code)) as study:
        header, left_out = study.header, study.left_out
        found = np.stack([study.frame(t) for t in range(header.frames)])
    data, affine = by_the_documents_script(real_dicom / code)
    np.testing.assert_array_equal(found, data.transpose(3, 2, 1, 0))
    np.testing.assert_allclose(np.array(header.affine), affine[:3], atol=0.05)
    assert left_out == ()
    nifti = nib.load(real_sunnybrook / f"{converted}_sa.nii.gz")
    for frame in np.asanyarray(nifti.dataobj).transpose(3, 2, 1, 0):  # ED and ES, slices the other way, some cut off
        turned, count = found[:, ::-1], len(frame)
        assert any(
            np.array_equal(frame, phase[at : at + count]) for phase in turned for at in range(len(phase) - count + 1)
        )


def test_masks_among_the_studies_are_listed_as_not_read(hospital: Path) -> None:
    (hospital / "masks").mkdir()
    for name in ("a.nii.gz", "b.nii"):
        (hospital / "masks" / name).write_bytes(b"")
    before = read(str(hospital))[1]
    assert ("masks", "a.nii.gz", "one of 2 NIfTI files among DICOM files") in [
        (s.subject, s.file, s.reason) for s in before
    ]


def test_a_study_whose_files_have_gone_since_is_told_as_changed(tmp_path: Path) -> None:
    Writer(tmp_path / "p1").cine(volume())
    study = DicomStudy(str(tmp_path / "p1"))
    for file in list((tmp_path / "p1").rglob("*")):
        file.unlink()
    with pytest.raises(InputError, match="have changed while they were read"):
        study.frame(0)
