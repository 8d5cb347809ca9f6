"""From folders to subjects: every layout's traps, and who ends in which split."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError
from storage.layouts import LayoutOptions, collect, detect, read, splits
from storage.slices.frames import read_frames
from storage.subjects import Skipped, Subject

Write = Callable[..., Path]
Build = Callable[[dict[str, tuple[str, str]]], Path]

RELEASE = {
    "A1": ("Training/Labeled", "A"),
    "B1": ("Training/Labeled", "B"),
    "C1": ("Training/Unlabeled", "C"),
    "A2": ("Validation", "A"),
    "D1": ("Validation", "D"),
    "D2": ("Testing", "D"),
}


def by_name(folder: Path, **options: Any) -> tuple[dict[str, Subject], list[Skipped]]:
    subjects, skipped = read(str(folder), options=LayoutOptions(**options))
    return {s.subject: s for s in subjects}, skipped


# ---- M&Ms


def test_mnms_is_read_by_its_folders_and_its_table(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    assert detect(str(folder)) == detect(str(folder / "OpenDataset")) == "mnms"
    subjects, skipped = by_name(folder)
    assert skipped == [] and sorted(subjects) == sorted(RELEASE)
    assert {n: s.vendor for n, s in subjects.items()} == {n: vendor for n, (_, vendor) in RELEASE.items()}
    frames = subjects["A1"].frames
    assert [(f.phase, f.frame, f.image_index, f.mask_index) for f in frames] == [("ED", 0, 0, 0), ("ES", 2, 2, 2)]
    assert subjects["A1"].labels == ((1, 1), (2, 2), (3, 3))
    assert subjects["D2"].split == "test" and subjects["D2"].labelled
    assert by_name(folder / "OpenDataset")[0].keys() == subjects.keys()


def test_mnms_unlabelled_subjects_ignore_their_masks_and_their_zero_phases(mnms_folder: Build) -> None:
    subject = by_name(mnms_folder(RELEASE))[0]["C1"]
    assert not subject.labelled and subject.split == "train"
    assert [(f.phase, f.frame) for f in subject.frames] == [("-", 0), ("-", 2)]  # half a beat apart
    three = by_name(mnms_folder(RELEASE), unlabelled_frames=3)[0]["C1"]
    assert [f.frame for f in three.frames] == [0, 1, 2]


def test_mnms_all_frames_keep_masks_at_ed_and_es_alone(mnms_folder: Build) -> None:
    subject = by_name(mnms_folder(RELEASE), frames="all")[0]["B1"]
    assert [(f.frame, f.phase, f.mask is not None) for f in subject.frames] == [
        (0, "ED", True),
        (1, "-", False),
        (2, "ES", True),
        (3, "-", False),
    ]


def test_mnms_finds_a_mask_in_another_splits_folder(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    data = folder / "OpenDataset"
    (data / "Testing" / "A2").mkdir()
    (data / "Validation" / "A2" / "A2_sa_gt.nii.gz").rename(data / "Testing" / "A2" / "A2_sa_gt.nii.gz")
    subjects, skipped = by_name(folder)
    assert skipped == []
    assert subjects["A2"].split == "validation"
    assert all(f.mask and "Testing" in f.mask for f in subjects["A2"].frames)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mnms_table_is_read_however_it_was_saved(mnms_folder: Build, delimiter: str, mark: str, end: str) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    expected = by_name(folder)
    assert rows_of(table)[0][0] == ""  # a nameless index, as the release has it
    for start in (0, 1):
        text = mark + end.join(delimiter.join(row[start:]) for row in rows_of(table)) + end
        saved = table.with_name("M&Ms Information.csv")
        saved.write_bytes(text.encode())
        content = table.read_bytes()
        table.unlink()
        assert by_name(folder) == expected
        saved.unlink()
        table.write_bytes(content)


def rows_of(table: Path) -> list[list[str]]:
    return [line.split(",") for line in table.read_text().splitlines()]


def write_excel(path: Path, rows: list[list[str]]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append([int(cell) if cell.isdigit() else cell or None for cell in row])
    book.save(path)


@pytest.mark.parametrize("place", [".", "OpenDataset"])
@pytest.mark.parametrize(
    "name",
    [
        "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv",
        "201014_M&Ms_Dataset_Information_-_opendataset.csv",
        "M&Ms_Dataset_Information.csv",
        "M&Ms Dataset Information.xlsx",
        "211230_M&Ms_Dataset_information_diagnosis_opendataset.xlsx",
    ],
)
def test_mnms_table_is_found_under_any_of_its_names(mnms_folder: Build, name: str, place: str) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    expected, rows = by_name(folder), rows_of(table)
    table.unlink()
    if name.endswith(".xlsx"):
        write_excel(folder / place / name, rows)
    else:
        (folder / place / name).write_text("\n".join(map(",".join, rows)))
    assert by_name(folder) == expected
    assert by_name(folder / "OpenDataset") == expected


def test_mnms_newest_table_is_taken_and_csv_before_excel(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    expected, rows = by_name(folder), rows_of(table)
    other = [rows[0], *([*row[:3], "Z", *row[4:]] for row in rows[1:])]
    write_excel(folder / "220101_M&Ms_Dataset_information.xlsx", other)
    (folder / "201014_M&Ms_Dataset_Information_-_opendataset.csv").write_text("\n".join(map(",".join, other)))
    assert by_name(folder) == expected
    (folder / "220101_M&Ms_Dataset_information.csv").write_text("\n".join(map(",".join, other)))
    assert {s.vendor for s in by_name(folder)[0].values()} == {"Z"}


def test_mnms_vendor_names_stand_in_for_codes(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    makers = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}
    rows = rows_of(table)
    expected = by_name(folder)
    named = [[*row[:2], makers[row[3]], *row[4:]] for row in rows[1:]]
    table.write_text("\n".join(map(",".join, [[*rows[0][:3], *rows[0][4:]], *named])))
    assert by_name(folder) == expected


@pytest.mark.parametrize(("name", "shown"), [(b"A\nB", r"A\nB"), (b"A\xff", r"A\udcff"), (b"A\x1b[2J", r"A\x1b[2J")])
def test_mnms_folder_whose_name_would_break_a_line_is_skipped(mnms_folder: Build, name: bytes, shown: str) -> None:
    folder = mnms_folder(RELEASE)
    broken = os.fsencode(folder / "OpenDataset" / "Testing") + b"/" + name
    os.mkdir(broken)
    Path(os.fsdecode(broken) + os.fsdecode(b"/" + name + b"_sa.nii.gz")).write_bytes(b"")
    subjects, skipped = by_name(folder)
    assert subjects.keys() == RELEASE.keys()
    reason = "its name has a line break, control or undecodable character"
    assert skipped == [Skipped(shown, shown, reason, "rename it")]


def test_mnms_faults_skip_the_subject_and_the_rest_goes_on(mnms_folder: Build) -> None:
    folder = mnms_folder({**RELEASE, "E1": ("Training/Labeled", "A"), "E2": ("Testing", "B"), "E3": ("Testing", "B")})
    data = folder / "OpenDataset"
    (table,) = folder.glob("*.csv")
    text = table.read_text().replace(",E1,some,A,1,0,2,", ",E1,some,A,1,0,,").replace(",E2,", ",gone,")
    table.write_text(text)
    for code in ("E3", "B1"):
        for file in data.glob(f"*/**/{code}_sa_gt.nii.gz"):
            file.unlink()
    (data / "Training" / "Labeled" / "A1" / "A1_sa.nii.gz").unlink()
    subjects, skipped = by_name(folder)
    assert sorted(subjects) == ["A2", "C1", "D1", "D2"]
    reasons = {s.subject: s.reason for s in skipped}
    assert reasons == {
        "-": "1 of its subjects have no folder (gone)",
        "A1": "no image in its folder",
        "B1": "no mask in any part of the data set",
        "E1": "has ED 0 and ES empty for a labelled subject",
        "E2": "has no row for this subject",
        "E3": "no mask in any part of the data set",
    }
    assert all(s.remedy for s in skipped)


def test_mnms_row_with_a_cell_too_many_is_skipped(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    table.write_text(table.read_text().replace(",A1,some,A,1,", ",A1,some, maker,A,1,"))
    subjects, skipped = by_name(folder)
    assert sorted(subjects) == sorted(set(RELEASE) - {"A1"})
    reason = "has more cells than the table has columns; '70' is left over"
    assert [(s.subject, s.reason) for s in skipped] == [("A1", reason)]


def test_mnms_subject_in_two_parts_enters_once(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    copy = folder / "OpenDataset" / "Testing" / "A1"
    copy.mkdir()
    for file in (folder / "OpenDataset" / "Training" / "Labeled" / "A1").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    subjects, skipped = by_name(folder)
    assert subjects["A1"].split == "train"
    assert [s.reason for s in skipped] == ["is in Training/Labeled and again in Testing, which is left out"]


@pytest.mark.parametrize("column", ["External code", "Vendor", "Centre", "ED", "ES"])
def test_mnms_table_without_a_column_is_named(mnms_folder: Build, column: str) -> None:
    folder = mnms_folder(RELEASE)
    (table,) = folder.glob("*.csv")
    header = table.read_text().replace(f",{column},", ",other,", 1)
    table.write_text(header.replace(",VendorName,", ",make,", 1))  # which would stand in for Vendor
    with pytest.raises(InputError, match=f"has no column {column.lower()}"):
        read(str(folder))
    table.unlink()
    with pytest.raises(InputError, match="information table is absent"):
        read(str(folder))


# ---- ACDC


@pytest.fixture
def acdc_folder(tmp_path: Path, write_nifti: Write, study: Callable[..., Any]) -> Path:
    """patient003, 004 and 006; ED is frame 1 and ES frame 3 of four."""
    for number in (3, 4, 6):
        name = f"patient{number:03d}"
        image, mask = study(number)
        for frame in (1, 3):
            stem = tmp_path / "acdc" / name / f"{name}_frame{frame:02d}"
            write_nifti(Path(f"{stem}.nii.gz"), image[..., frame - 1])
            write_nifti(Path(f"{stem}_gt.nii.gz"), mask[..., frame - 1])
        write_nifti(tmp_path / "acdc" / name / f"{name}_4d.nii.gz", image)
        (tmp_path / "acdc" / name / "Info.cfg").write_text("ED: 1\nES: 3\nGroup: DCM\nHeight: 160.0\n")
    return tmp_path / "acdc"


def test_acdc_phases_count_from_one_and_labels_run_the_other_way(acdc_folder: Path) -> None:
    assert detect(str(acdc_folder)) == "acdc"
    subjects, skipped = by_name(acdc_folder)
    assert skipped == []
    subject = subjects["patient006"]
    assert [(f.phase, f.frame, f.image_index) for f in subject.frames] == [("ED", 0, None), ("ES", 2, None)]
    assert dict(subject.labels) == {1: 3, 2: 2, 3: 1}
    assert (subject.vendor, subject.centre) == ("Siemens", "Dijon")
    assert {n: s.split for n, s in subjects.items()} == {
        "patient003": "validation",
        "patient004": "test",
        "patient006": "train",
    }


def test_acdc_cine_gives_all_frames_or_stands_in_for_frame_files(acdc_folder: Path) -> None:
    frames = by_name(acdc_folder, frames="all")[0]["patient006"].frames
    assert [(f.frame, f.image_index, f.phase, f.mask is not None) for f in frames] == [
        (0, 0, "ED", True),
        (1, 1, "-", False),
        (2, 2, "ES", True),
        (3, 3, "-", False),
    ]
    assert [f.mask_index for f in frames if f.mask] == [None, None]
    (acdc_folder / "patient006" / "patient006_frame03.nii.gz").unlink()
    frames = by_name(acdc_folder)[0]["patient006"].frames
    assert [(f.phase, f.image_index, f.mask is not None) for f in frames] == [("ED", 0, True), ("ES", 2, True)]
    (acdc_folder / "patient006" / "patient006_frame03_gt.nii.gz").unlink()
    subjects, skipped = by_name(acdc_folder)
    assert "patient006" not in subjects and skipped[0].reason == "no mask of ES, though the other phase has one"
    (acdc_folder / "patient006" / "patient006_frame01_gt.nii.gz").unlink()
    assert not by_name(acdc_folder)[0]["patient006"].labelled


def test_acdc_testing_folder_is_tested_on_when_it_is_named_itself(acdc_folder: Path) -> None:
    acdc_folder.rename(acdc_folder.parent / "testing")
    assert {s.split for s in by_name(acdc_folder.parent / "testing")[0].values()} == {"test"}


def test_acdc_patient_in_training_and_in_testing_enters_once(acdc_folder: Path) -> None:
    for part in ("training", "testing"):
        (acdc_folder / "database" / part).mkdir(parents=True)
    for name in ("patient003", "patient006"):
        (acdc_folder / name).rename(acdc_folder / "database" / "training" / name)
    shutil.copytree(acdc_folder / "database" / "training" / "patient006", acdc_folder / "database/testing/patient006")
    shutil.rmtree(acdc_folder / "patient004")
    subjects, skipped = collect([str(acdc_folder)], LayoutOptions())
    assert [(s.subject, s.split) for s in subjects] == [("patient003", "validation"), ("patient006", "test")]
    assert [(s.subject, s.reason) for s in skipped] == [("patient006", "a subject of that name came in from acdc")]


def test_acdc_release_folders_are_searched_and_testing_is_tested_on(acdc_folder: Path) -> None:
    for part, name in (("training", "patient003"), ("training", "patient006"), ("testing", "patient004")):
        (acdc_folder / part).mkdir(exist_ok=True)
        (acdc_folder / name).rename(acdc_folder / part / name)
    (acdc_folder / "testing" / "patient004").rename(acdc_folder / "testing" / "patient101")
    for file in (acdc_folder / "testing" / "patient101").iterdir():
        file.rename(file.with_name(file.name.replace("patient004", "patient101")))
    subjects, _ = by_name(acdc_folder)
    assert {n: s.split for n, s in subjects.items()} == {
        "patient003": "validation",
        "patient006": "train",
        "patient101": "test",
    }


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "is absent, so which frame is ED and which ES is unknown"),
        ("ED: 1\n", "has no line ES"),
        ("ED: one\nES: 3\n", "ED is 'one'"),
        ("ED: 0\nES: 3\n", "ED is '0'"),
        ("ED: 3\nES: 3\n", "ED and ES are the same frame"),
        ("ED: 1\nES: 9\n", "ES is frame 8, but the image has frames 0 to 3"),
    ],
)
def test_acdc_patient_with_a_bad_info_file_is_skipped(acdc_folder: Path, info: str | None, reason: str) -> None:
    path = acdc_folder / "patient004" / "Info.cfg"
    path.unlink() if info is None else path.write_text(info)
    subjects, skipped = by_name(acdc_folder)
    assert sorted(subjects) == ["patient003", "patient006"]
    assert [(s.subject, s.reason) for s in skipped] == [("patient004", reason)]


def test_real_acdc_patient_without_info_is_skipped_and_the_rest_comes(real_acdc: Path) -> None:
    subjects, skipped = by_name(real_acdc)
    assert [(s.subject, s.file) for s in skipped] == [("patient001", "Info.cfg")]
    assert sorted(subjects) == [f"patient{n:03d}" for n in range(2, 31)]
    tested = {n for n, s in subjects.items() if s.split == "test"}
    assert tested == {f"patient{n:03d}" for n in (4, 5, 10, 15, 24, 25, 29, 30)}
    assert {n for n, s in subjects.items() if s.split == "validation"} == {f"patient{n:03d}" for n in (3, 12, 23, 27)}


# ---- table

HEADER = "subject,image,mask,vendor,centre,ed,es"


@pytest.fixture
def table_folder(tmp_path: Path, write_nifti: Write, study: Callable[..., Any]) -> Path:
    """Images and masks `p1_sa.nii.gz` (4D) and `p1_ed.nii.gz` (3D), no table yet."""
    image, mask = study(0)
    folder = tmp_path / "study"
    write_nifti(folder / "images" / "p1_sa.nii.gz", image)
    write_nifti(folder / "images" / "p1_sa_gt.nii.gz", mask)
    write_nifti(folder / "images" / "p1_ed.nii.gz", image[..., 0])
    write_nifti(folder / "images" / "p1_ed_gt.nii.gz", mask[..., 0])
    return folder


def test_one_image_file_is_one_subjects_whatever_its_frames(table_folder: Path) -> None:
    rows = [f"{name},images/p1_sa.nii.gz,,X,c,{ed},{ed + 1}" for ed, name in enumerate("ab")]
    (table_folder / "subjects.csv").write_text("\n".join([HEADER, *rows]))
    subjects, skipped = collect([str(table_folder)], LayoutOptions())
    assert [s.subject for s in subjects] == ["a"]
    assert [(s.subject, s.file, s.reason) for s in skipped] == [
        ("b", "p1_sa.nii.gz", "its image file is subject a's too")
    ]


def one_row(folder: Path, row: str, header: str = HEADER, **options: Any) -> Subject | Skipped:
    """The only answer to a table of one row."""
    (folder / "subjects.csv").write_text(f"{header}\n{row}\n")
    subjects, skipped = by_name(folder, **options)
    (answer,) = [*subjects.values(), *skipped]
    return answer


FRAMES = {
    "p,images/p1_sa.nii.gz,images/p1_sa_gt.nii.gz,X,here,0,2": [("ED", 0, 0, 0), ("ES", 2, 2, 2)],
    "p,images/p1_sa.nii.gz,images/p1_ed_gt.nii.gz,X,here,0,": [("ED", 0, 0, None)],
    "p,images/p1_ed.nii.gz,images/p1_ed_gt.nii.gz,X,here,0,": [("ED", 0, None, None)],
    "p,images/p1_ed.nii.gz,images/p1_ed_gt.nii.gz,X,here,,": [("-", 0, None, None)],
    "p,images/p1_sa.nii.gz,,X,here,1,3.0": [("ED", 1, 1, None), ("ES", 3, 3, None)],
    "p,images/p1_sa.nii.gz,,X,here,,": [("-", 0, 0, None), ("-", 2, 2, None)],
    "p,images/p1_sa.nii.gz,,X,here,0,0": [("-", 0, 0, None), ("-", 2, 2, None)],
}


@pytest.mark.parametrize(("row", "frames"), FRAMES.items())
def test_table_rows_name_the_frames(table_folder: Path, row: str, frames: list[tuple[Any, ...]]) -> None:
    subject = one_row(table_folder, row)
    assert isinstance(subject, Subject), subject
    assert [(f.phase, f.frame, f.image_index, f.mask_index) for f in subject.frames] == frames
    assert (subject.vendor, subject.centre, subject.labels) == ("X", "here", ((1, 1), (2, 2), (3, 3)))


FAULTS = {
    ",images/p1_sa.nii.gz,,X,c,0,2": "subject is empty",
    "p,,,X,c,0,2": "image is empty",
    "p,images/p1_sa.nii.gz,,,c,0,2": "vendor is empty",
    "p,images/absent.nii.gz,,X,c,0,2": "no such file",
    "p,../outside.nii.gz,,X,c,0,2": "a path leaves the data folder",
    "p,images/../../outside.nii.gz,,X,c,0,2": "a path leaves the data folder",
    "p,/etc/passwd,,X,c,0,2": "a path leaves the data folder",
    "p,s3://bucket/x.nii.gz,,X,c,0,2": "a path leaves the data folder",
    "p,images/p1_sa.nii.gz,../m.nii.gz,X,c,0,2": "a path leaves the data folder",
    "p,images/p1_sa.nii.gz,,X,c,0,4": "ES is frame 4, but the image has frames 0 to 3",
    "p,images/p1_sa.nii.gz,,X,c,-1,2": "ed is '-1'",
    "p,images/p1_sa.nii.gz,,X,c,end,2": "ed is 'end'",
    "p,images/p1_sa.nii.gz,images/p1_sa_gt.nii.gz,X,c,1,1": "ed and es are the same frame",
    "p,images/p1_sa.nii.gz,images/p1_sa_gt.nii.gz,X,c,,": "a mask, but neither ed nor es",
    "p,images/p1_sa.nii.gz,images/p1_ed_gt.nii.gz,X,c,0,2": "a mask of one frame, but both ed and es",
}


@pytest.mark.parametrize(("row", "reason"), FAULTS.items())
def test_table_faults_skip_the_row_with_reason_and_remedy(table_folder: Path, row: str, reason: str) -> None:
    skipped = one_row(table_folder, row)
    assert isinstance(skipped, Skipped)
    assert reason in skipped.reason and skipped.remedy
    assert str(table_folder) not in f"{skipped}"


def test_masks_are_trusted_of_the_subjects_that_are_named_alone(table_folder: Path) -> None:
    shutil.copy(table_folder / "images" / "p1_sa.nii.gz", table_folder / "images" / "p2_sa.nii.gz")
    rows = [f"{name},images/p{n}_sa.nii.gz,,X,c,0,2" for n, name in enumerate(("p 1*", "p2"), start=1)]
    (table_folder / "subjects.csv").write_text("\n".join([HEADER, *rows]))
    for names, trusted in (((), []), (("p2",), ["p2"]), (("p 1*",), ["p 1*"]), (("p*",), ["p 1*", "p2"])):
        for field in ("trust_mask_place", "trust_label_order"):
            found = by_name(table_folder, **{field: names})[0].values()
            assert [s.subject for s in found if getattr(s, field)] == trusted
            assert sum(s.trust_mask_place + s.trust_label_order for s in found) == len(trusted)


LABELS = {
    "LV 500, MYO 205, RV 600": ((205, 2), (500, 1), (600, 3)),
    "MYO 2 MYO 5 background=65535": ((2, 2), (5, 2), (65535, 0)),
    "LV 70000": "labels is 'LV 70000': '70000' is no whole number from 1 to 65535",
    f"LV {'9' * 5000}": "is no whole number from 1 to 65535",
    "LV 0": "labels is 'LV 0': '0' is no whole number from 1 to 65535",
    "LV": "labels is 'LV': '' is no whole number from 1 to 65535",
    "3 LV": "labels is '3 LV': '3' is none of LV, MYO, RV and background",
    "LV 1, RV 1": "labels is 'LV 1, RV 1': the value 1 comes twice",
}


@pytest.mark.parametrize(("cell", "wanted"), LABELS.items(), ids=range(len(LABELS)))
def test_table_labels_say_what_is_wrong_with_them(table_folder: Path, cell: str, wanted: Any) -> None:
    answer = one_row(table_folder, f'p,images/p1_sa.nii.gz,,X,c,0,2,"{cell}"', f"{HEADER},labels")
    if isinstance(wanted, str):
        assert isinstance(answer, Skipped) and wanted in answer.reason
        assert answer.remedy == "write name and value of each: LV 3, MYO 2, RV 1"
    else:
        assert isinstance(answer, Subject) and answer.labels == wanted


@pytest.mark.parametrize("end", ["", ","])  # a header that ends in a comma has a column without a name
def test_table_row_with_a_cell_beyond_its_columns_is_skipped_alone(table_folder: Path, end: str) -> None:
    """F16: `labels` without quotes kept `LV 1`; a comma in a centre's name moved `train` out of `split`."""
    shutil.copy(table_folder / "images" / "p1_sa.nii.gz", table_folder / "images" / "p2_sa.nii.gz")
    rows = ["p,images/p1_sa.nii.gz,,X,c,0,2,LV 3, MYO 2, RV 1", "q,images/p2_sa.nii.gz,,X,c,0,2,,,"]
    (table_folder / "subjects.csv").write_text("\n".join([f"{HEADER},labels{end}", *rows]))
    subjects, skipped = by_name(table_folder)
    assert sorted(subjects) == ["q"]
    ((name, file, reason, remedy),) = [(s.subject, s.file, s.reason, s.remedy) for s in skipped]
    assert (name, file) == ("p", "subjects.csv row 2")
    assert reason == "has more cells than the table has columns; 'MYO 2, RV 1' is left over"
    assert remedy.startswith("put a cell that holds the separator into quotes")


def test_table_mask_of_one_frame_is_the_labelled_frame_s_whether_3d_or_4d(
    table_folder: Path, write_nifti: Write, study: Callable[..., Any]
) -> None:
    write_nifti(table_folder / "images" / "xyz1.nii.gz", study(0)[1][..., 2:3])
    write_nifti(table_folder / "images" / "xyz.nii.gz", study(0)[0][..., 2])
    subject = one_row(table_folder, "p,images/p1_sa.nii.gz,images/xyz1.nii.gz,X,c,,2")
    assert isinstance(subject, Subject)
    (frame,) = read_frames(subject)
    assert frame.mask is not None and np.array_equal(frame.mask, study(0)[1][..., 2].T)
    alone = one_row(table_folder, "p,images/xyz.nii.gz,images/xyz1.nii.gz,X,c,0,2")
    assert isinstance(alone, Skipped) and alone.reason == "an image of one frame, but both ed and es"
    both = one_row(table_folder, "p,images/p1_sa.nii.gz,images/xyz1.nii.gz,X,c,0,2")
    assert isinstance(both, Skipped) and both.reason == "a mask of one frame, but both ed and es"


def test_table_split_spacing_and_terms_are_optional_columns(table_folder: Path) -> None:
    header = f"{HEADER},Split,Spacing,terms"
    start = "p,images/p1_sa.nii.gz,,X,c,0,2"
    subject = one_row(table_folder, f"{start},Val,8 x 1.5 x 1.25,CC0", header)
    assert isinstance(subject, Subject)
    assert (subject.split, subject.spacing, subject.terms) == ("validation", (8.0, 1.5, 1.25), "CC0")
    for row, reason in ((f"{start},dev,,", "split is 'dev'"), (f"{start},,8,", "spacing is '8'")):
        skipped = one_row(table_folder, row, header)
        assert isinstance(skipped, Skipped) and skipped.reason == reason


def test_table_may_be_parquet_or_of_another_name(table_folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"subject": 7, "image": "images/p1_sa.nii.gz", "mask": None, "vendor": "X", "centre": "c", "ed": 0, "es": 2}
    pq.write_table(pa.Table.from_pylist([row]), table_folder / "anything.parquet")
    assert detect(str(table_folder)) == detect(str(table_folder / "anything.parquet")) == "table"
    assert sorted(by_name(table_folder)[0]) == sorted(by_name(table_folder / "anything.parquet")[0]) == ["7"]
    (table_folder / "more.csv").write_text(f"{HEADER}\n")
    assert sorted(by_name(table_folder)[0]) == ["7"]
    pq.write_table(pa.Table.from_pylist([row]), table_folder / "second.parquet")
    with pytest.raises(InputError, match="several tables"):
        read(str(table_folder))


def test_table_of_parquet_may_have_empty_cells_and_whole_numbers_as_floats(table_folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = {"image": "images/p1_sa.nii.gz", "vendor": "X", "centre": 1.0}
    rows = [
        {"subject": 7.0, "mask": "images/p1_sa_gt.nii.gz", "ed": 0.0, "es": 2.0, **start},
        {"subject": 8.0, "mask": None, "ed": float("nan"), "es": None, **start},
        dict.fromkeys(["subject", "mask", "ed", "es", *start]),
    ]
    pq.write_table(pa.Table.from_pylist(rows), table_folder / "subjects.parquet")
    subjects, skipped = by_name(table_folder)
    assert skipped == [] and sorted(subjects) == ["7", "8"]
    assert [(f.phase, f.frame) for f in subjects["7"].frames] == [("ED", 0), ("ES", 2)]
    assert [(f.phase, f.frame) for f in subjects["8"].frames] == [("-", 0), ("-", 2)]
    assert {s.centre for s in subjects.values()} == {"1"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_table_is_read_however_it_was_saved(table_folder: Path, delimiter: str) -> None:
    lines = [HEADER.title(), "p,images\\p1_sa.nii.gz, images/./p1_sa_gt.nii.gz ,X,,0,2", ",,,,,,", ""]
    text = "\ufeff" + "\r\n".join(line.replace(",", delimiter) for line in lines)
    (table_folder / "subjects.csv").write_bytes(text.encode())
    subjects, skipped = by_name(table_folder)
    assert skipped == []
    assert [f.image for f in subjects["p"].frames] == [str(table_folder / "images" / "p1_sa.nii.gz")] * 2
    assert [f.mask for f in subjects["p"].frames] == [str(table_folder / "images" / "p1_sa_gt.nii.gz")] * 2


def test_table_row_that_repeats_a_subject_is_skipped(table_folder: Path) -> None:
    row = "p,images/p1_sa.nii.gz,,X,c,0,2"
    (table_folder / "subjects.csv").write_text(f"{HEADER}\n{row}\n{row}\n")
    subjects, skipped = by_name(table_folder)
    assert sorted(subjects) == ["p"]
    assert [s.reason for s in skipped] == ["row 3 repeats the subject"]


@pytest.mark.parametrize("column", HEADER.split(","))
def test_table_without_a_column_is_named(table_folder: Path, column: str) -> None:
    (table_folder / "subjects.csv").write_text(HEADER.replace(column, "other", 1) + "\n" + "x," * 6 + "x\n")
    with pytest.raises(InputError, match=f"has no column {column} "):
        read(str(table_folder), "table")


def test_folders_that_are_nothing_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the known layouts; give a folder in the layout of M&Ms"):
        detect(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        read(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no such layout"):
        read(str(tmp_path), "bids")
    with pytest.raises(InputError, match=r"has no subjects\.csv"):
        read(str(tmp_path), "table")


def test_terms_beside_the_data_replace_the_usual_ones(mnms_folder: Build) -> None:
    folder = mnms_folder(RELEASE)
    assert "Campello" in by_name(folder)[0]["A1"].terms
    (folder / "TERMS.txt").write_text("\nCC0\nmore\n")
    assert by_name(folder)[0]["A1"].terms == "CC0"


# ---- splits


def person(name: str, vendor: str, split: str | None, labelled: bool = True) -> Subject:
    from storage.subjects import FrameSource

    frame = FrameSource("ED", 0, "i.nii", 0, "m.nii" if labelled else None, 0 if labelled else None)
    return Subject(name, "table", vendor, "c", (frame,), split, "given" if split else "", ((1, 1),), "")


def assigned(*people: Subject, **options: Any) -> dict[str, str | None]:
    out = splits.assign(people, LayoutOptions(**options))
    assert [s.subject for s in out] == [p.subject for p in people]
    assert all(s.split and s.split_reason for s in out)
    return {s.subject: s.split for s in out}


def test_validation_of_an_unseen_vendor_is_excluded(mnms_folder: Build) -> None:
    out = {s.subject: s for s in splits.assign(read(str(mnms_folder(RELEASE)))[0], LayoutOptions())}
    assert {n: s.split for n, s in out.items()} == {
        "A1": "train",
        "A2": "validation",
        "B1": "train",
        "C1": "train",
        "D1": "excluded",
        "D2": "test",
    }
    assert out["D1"].split_reason == "M&Ms Validation, but vendor D has no labelled training subject"


def test_labelled_vendors_without_validation_hold_some_out_and_unlabelled_subjects_never() -> None:
    people = [person(f"x{n}", "X", "train" if n % 2 else None) for n in range(20)]
    people += [person(f"u{n}", "X", None, labelled=False) for n in range(20)]
    people += [person(f"g{n}", "G", None, labelled=False) for n in range(5)]
    out = assigned(*people)
    held = {n for n, s in out.items() if s == "validation"}
    assert len(held) == 3 and all(n.startswith("x") for n in held)
    assert set(out.values()) == {"train", "validation"}
    assert assigned(*reversed(people)) == out
    other = {n for n, s in assigned(*people, split_seed=1).items() if s == "validation"}
    assert other != held and len(other) == 3


def test_a_vendor_with_validation_subjects_holds_nobody_out() -> None:
    out = assigned(*[person(f"x{n}", "X", None) for n in range(9)], person("v", "X", "validation"))
    assert [n for n, s in out.items() if s == "validation"] == ["v"]


def test_a_single_labelled_subject_trains() -> None:
    assert assigned(person("x", "X", None)) == {"x": "train"}


def test_a_held_out_choice_hardly_moves_when_a_subject_comes_in() -> None:
    names = [f"s{n}" for n in range(40)]
    before = {n for n, s in assigned(*[person(n, "X", None) for n in names]).items() if s == "validation"}
    after = assigned(*[person(n, "X", None) for n in [*names, "new"]])
    assert len(before - {n for n, s in after.items() if s == "validation"}) <= 1


def test_options_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        LayoutOptions(frame="all")  # type: ignore[call-arg]
    assert np.isclose(LayoutOptions().validation_fraction, 0.15)
