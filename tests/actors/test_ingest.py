"""Ingest on a real local Ray: any mix of data sets in, one slice store out, the same whoever did the work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.ingest import IngestReport, VendorCount, ingest
from storage.errors import InputError
from storage.layouts import LayoutOptions, same_images
from storage.slice_store import SliceStore

Write = Callable[..., Path]
Study = Callable[..., Any]
Build = Callable[[dict[str, tuple[str, str]]], Path]

pytestmark = pytest.mark.usefixtures("ray_local")

PEOPLE = {f"A{n}": ("Training/Labeled", "A") for n in range(9)} | {
    "C0": ("Training/Unlabeled", "C"),
    "D0": ("Testing", "D"),
}


@pytest.fixture
def table_folder(tmp_path: Path, write_nifti: Write, study: Study) -> Path:
    """A table of one unlabelled subject, g, of another vendor."""
    image, _ = study(99)
    write_nifti(tmp_path / "table" / "g.nii.gz", image)
    (tmp_path / "table" / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es\ng,g.nii.gz,,GE,c,0,1\n")
    return tmp_path / "table"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_subject_of_every_folder_comes_in(mnms_folder: Build, table_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    data = [str(mnms_folder(PEOPLE)), str(table_folder)]
    report = ingest(data, str(tmp_path / "run"), progress=lambda *call: calls.append(call))
    assert report == IngestReport(
        12,
        72,
        {"A": VendorCount(9, 54, 54), "C": VendorCount(1, 6, 0), "D": VendorCount(1, 6, 6), "GE": VendorCount(1, 6, 0)},
        [],
    )
    assert calls == [("ingest", n, 12) for n in range(1, 13)]
    store = SliceStore.open(str(tmp_path / "run"))
    assert sorted(set(store.column("subject"))) == sorted([*PEOPLE, "g"])
    assert store.column("slice_id").tolist() == list(range(72))
    assert {v.vendor for v in store.volumes("validation")} == {"A"}
    assert {v.subject for v in store.volumes("test")} == {"D0"}


def test_the_store_is_the_same_bytes_for_any_number_of_workers(
    mnms_folder: Build, table_folder: Path, tmp_path: Path
) -> None:
    data = [str(mnms_folder(PEOPLE)), str(table_folder)]
    ingest(data, str(tmp_path / "one"), num_cpus=4)
    ingest(data[::-1], str(tmp_path / "four"), num_cpus=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_a_second_ingest_reads_only_what_is_missing(mnms_folder: Build, tmp_path: Path) -> None:
    folder, run = str(mnms_folder(PEOPLE)), tmp_path / "run"
    ingest([folder], str(run))
    whole = contents(run)
    (run / "slices.parquet").unlink()  # as if killed: two subjects unfinished, one of them not begun
    (run / "slices.zarr" / "A3" / "frames.json").unlink()
    shutil.rmtree(run / "slices.zarr" / "A5")
    finished = {p: p.stat().st_mtime_ns for p in run.rglob("slices.zarr/*/*/c/**/*") if "A3" not in str(p)}
    ingest([folder], str(run))
    assert contents(run) == whole
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())


def test_a_broken_subject_is_skipped_with_its_reason_and_the_rest_goes_on(mnms_folder: Build, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    image = folder / "OpenDataset" / "Training" / "Labeled" / "A4" / "A4_sa.nii.gz"
    image.write_bytes(image.read_bytes()[:500])
    report = ingest([str(folder)], str(tmp_path / "run"))
    assert report.subjects == 10
    assert [(s.subject, s.file) for s in report.skipped] == [("A4", "A4_sa.nii.gz")]
    assert (tmp_path / "run" / "skipped.csv").read_text() == (
        "subject,file,reason,remedy\nA4,A4_sa.nii.gz,is damaged or cut off: it cannot be read to the end,"
        "copy the file again\n"
    )
    with pytest.raises(InputError, match=r"^A4, A4_sa\.nii\.gz: is damaged or cut off.*; copy the file again$"):
        ingest([str(folder)], str(tmp_path / "strict"), strict=True)
    assert not (tmp_path / "strict" / "slices.parquet").exists()


def test_a_phase_beyond_the_last_frame_is_skipped(mnms_folder: Build, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    (table,) = folder.glob("*.csv")
    table.write_text(table.read_text().replace(",A4,some,A,1,0,2,", ",A4,some,A,1,0,4,"))
    report = ingest([str(folder)], str(tmp_path / "run"))
    assert [(s.subject, s.reason) for s in report.skipped] == [("A4", "has no frame 4: its frames are 0 to 3")]


def test_of_two_subjects_with_one_name_the_first_folders_stays(
    mnms_folder: Build, table_folder: Path, tmp_path: Path
) -> None:
    table = table_folder / "subjects.csv"
    table.write_text(table.read_text().replace("\ng,", "\nA1,"))
    folder = str(mnms_folder(PEOPLE))
    report = ingest([folder, str(table_folder)], str(tmp_path / "run"))
    assert [(s.subject, s.file, s.reason) for s in report.skipped] == [
        ("A1", "table", "a subject of that name came in from mnms")
    ]
    assert "GE" not in report.by_vendor


def test_the_same_image_under_two_names_enters_once(mnms_folder: Build, table_folder: Path, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    shutil.copy(folder / "OpenDataset" / "Testing" / "D0" / "D0_sa.nii.gz", table_folder / "g.nii.gz")
    report = ingest([str(folder), str(table_folder)], str(tmp_path / "run"))
    assert [(s.subject, s.reason) for s in report.skipped] == [("g", "has an image that is also subject D0's")]
    assert report.subjects == 11
    assert same_images({"b": ["1", "2"], "a": ["2"], "c": ["3", "3"]})[0].subject == "b"


def test_nothing_that_can_enter_is_an_error_with_the_first_reason(table_folder: Path, tmp_path: Path) -> None:
    (table_folder / "g.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"g, g\.nii\.gz: is not a NIfTI file \(no subject came in\)"):
        ingest([str(table_folder)], str(tmp_path / "run"))
    with pytest.raises(InputError, match="no such folder"):
        ingest([str(table_folder), str(tmp_path / "absent")], str(tmp_path / "run"))


def test_a_task_that_no_machine_can_run_fails_at_once(table_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a task needs 64 CPUs, 4 in the cluster"):
        ingest([str(table_folder)], str(tmp_path / "run"), num_cpus=64)


def inside(region: Any, around: Any) -> float:
    """Share of the region's pixels whose four neighbours all lie in the region or in `around`."""
    both = np.pad(region | around, 1)
    held = both[:-2, 1:-1] & both[2:, 1:-1] & both[1:-1, :-2] & both[1:-1, 2:]
    return float(held[region].mean())


def test_real_data_come_in_with_the_ventricles_in_their_places(
    real_acdc: Path, real_sunnybrook: Path, tmp_path: Path
) -> None:
    report = ingest([str(real_acdc), str(real_sunnybrook)], str(tmp_path / "run"), LayoutOptions())
    assert [s.subject for s in report.skipped] == ["patient001"]
    assert {v: c.subjects for v, c in report.by_vendor.items()} == {"GE": 4, "Siemens": 29}
    store = SliceStore.open(str(tmp_path / "run"))
    assert store.column("labelled").tolist() == (store.column("vendor") == "Siemens").tolist()
    for volume in (v for v in store.volumes() if v.labelled):
        image, mask = store.volume(volume.rows)
        whole = [z for z in range(len(mask)) if len(np.unique(mask[z])) == 4]
        middle = whole[len(whole) // 2]  # the slice amid those that show all three
        lv, myo, rv = (mask[middle] == label for label in (1, 2, 3))
        assert inside(lv, myo) > 0.95, volume  # the left ventricle lies inside its wall, the right one does not
        assert inside(rv, myo) < 0.95, volume
        # Right side up: the patient's right is on the left, and blood is brighter than muscle.
        assert np.nonzero(rv)[1].mean() < np.nonzero(lv)[1].mean(), volume
        assert image[middle][lv].mean() > image[middle][myo].mean(), volume
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "slices.zarr",
        "slices.parquet",
        "skipped.csv",
        "splits.csv",
    }
