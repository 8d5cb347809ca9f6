"""Which files of a folder are images to segment, and what is told of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.inference.find_studies import find_studies
from storage.errors import InputError
from tests.dicom_files import Writer
from tests.tiny_networks import volume_zhw

IMAGES = (
    *("cine", "patient001_frame01", "ges_01", "p1_label_free_cine", "unmasked", "GE_sa", "gtx", "presegmented"),
    *("imagesTr/heart_001_0000", "study/masked/a", "SA_ES"),
)
MASKS = (
    *("x_gt", "x-mask", "x_seg", "x_labels", "x_pred", "patient001_frame01_gt"),  # as before
    *(
        "SEG",
        "p9-segmentation",
        "p9_gt_corrected",
        "p9_seg_v2",
        "mask",
        "Segmentation",
        "p9.label.final",
        "p_gt_frame01",
    ),
    *("labelsTr/heart_001", "labelsTs/sub/heart_002", "study/masks/a", "p/Segmentation/cine"),
)


def touched(place: Path, *names: str) -> str:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    return str(place)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_segmented(tmp_path: Path, name: str) -> None:
    studies, left_out = find_studies([touched(tmp_path / "in", f"{name}.nii.gz")], str(tmp_path / "out"))
    assert [study.name for study in studies] == [name.rpartition("/")[2]] and left_out.lines() == []


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_in_a_folder_is_left_out_and_told_but_segmented_if_it_is_named_itself(tmp_path: Path, name: str) -> None:
    place, file = touched(tmp_path / "in", "cine.nii", f"{name}.nii.gz"), f"{name}.nii.gz".rpartition("/")[2]
    studies, left_out = find_studies([place], str(tmp_path / "out"))
    assert [study.name for study in studies] == ["cine"]
    assert left_out.lines() == [f"1 file left out, named like masks: {file}"]
    studies, left_out = find_studies([f"{place}/{name}.nii.gz"], str(tmp_path / "out"))
    assert [study.images for study in studies] == [(f"{place}/{name}.nii.gz",)] and left_out.lines() == []


def test_images_of_other_formats_are_left_out_and_told(tmp_path: Path) -> None:
    place = touched(
        tmp_path / "in", "a.nii", "pair.hdr", "pair.img", "s/1.DCM", "p.ima/b.nii", "notes.txt", "mask.nrrd"
    )
    studies, left_out = find_studies([place], str(tmp_path / "out"))
    assert [study.name for study in studies] == ["a", "b"]
    what = "4 files left out, images of other formats: mask.nrrd, …"
    assert left_out.lines() == [f"{what}; to segment them, convert them to .nii.gz"]


def test_a_name_that_no_table_can_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/M\xfcller.nii.gz", os.O_CREAT))
    with pytest.raises(InputError, match=r"^M\\udcfcller: its name has .* undecodable character; rename it$"):
        find_studies([str(tmp_path)], str(tmp_path / "out"))


def test_a_folder_without_an_image_to_segment_says_what_it_holds(tmp_path: Path) -> None:
    pairs, labels = touched(tmp_path / "pairs", "p.hdr", "p.img"), touched(tmp_path / "labelsTr", "a.nii", "b.nii")
    with pytest.raises(
        InputError, match=r"^pairs: .*; 2 are of other formats, such as p\.hdr; convert them to \.nii\.gz"
    ):
        find_studies([pairs], str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"^labelsTr: .*; 2 are named like masks; name images"):
        find_studies([labels], str(tmp_path / "out"))
    assert len(find_studies([touched(tmp_path / "labels", "a.nii")], str(tmp_path / "out"))[0]) == 1


def test_dicom_studies_are_found_by_folder_and_one_of_their_files_is_refused(tmp_path: Path) -> None:
    writer, other = (Writer(tmp_path / "in" / p, [f"SE{k % 2}/IM{k}" for k in range(10)], p) for p in ("p1", "p3"))
    for _ in range(4):
        writer.image(volume_zhw(0)[0])
        other.image(volume_zhw(1)[0])
    touched(tmp_path / "in", "p1/cine.nii", "p1/SE0/empty.dcm", "p2.ima")
    out = str(tmp_path / "out")
    studies, left_out = find_studies([str(tmp_path / "in")], out)
    assert [(study.name, study.report) for study in studies] == [
        ("cine", f"{out}/p1/cine_pred.json"),
        ("p1", f"{out}/p1_pred.json"),
        ("p3", f"{out}/p3_pred.json"),
    ]
    assert "images of other formats" in left_out.lines()[0] and len(left_out.others) == 2
    ((study,), _) = find_studies([str(tmp_path / "in" / "p1" / "SE1")], out)
    assert (study.name, study.report) == ("SE1", f"{out}/SE1_pred.json")
    with pytest.raises(InputError, match=r"^IM0: is one image of a DICOM study; name the study's folder$"):
        find_studies([str(writer.written[0])], out)
