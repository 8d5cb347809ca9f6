"""The phantom: M&Ms' layout, reproducible bytes, vendors as the table says, hearts that beat as they should."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError
from scipy import ndimage

from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.phantom.anatomy import draw_patient, section
from pipeline.phantom.vendors import VENDORS
from pipeline.phantom.write import COLUMNS, INFORMATION_CSV, PhantomSubject
from storage.errors import InputError

LV, MYO, RV = 1, 2, 3
TINY = PhantomConfig(labelled_a=3, labelled_b=2, unlabelled_c=1, testing=1, frames=3, field_scale=0.75, seed=7)


def fourth_dimension(path: Path) -> tuple[npt.NDArray[Any], tuple[float, ...]]:
    image = nib.nifti1.Nifti1Image.from_filename(path)
    return np.asarray(image.dataobj), tuple(float(z) for z in image.header.get_zooms())


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PhantomSubject]]:
    out = tmp_path_factory.mktemp("phantom") / "data"
    return out, write_phantom(out, TINY)


def masks(phantom: tuple[Path, list[PhantomSubject]]) -> list[tuple[PhantomSubject, npt.NDArray[Any], float]]:
    out, subjects = phantom
    found = []
    for s in subjects:
        path = out / s.folder / f"{s.code}_sa_gt.nii.gz"
        if path.exists():
            mask, zooms = fourth_dimension(path)
            found.append((s, mask, zooms[0] * zooms[1] * zooms[2] / 1000))
    return found


def test_folders_and_files_are_named_as_in_mnms(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    out, subjects = phantom
    where = [(s.vendor, s.split) for s in subjects]
    assert where == [
        *[("A", "Training/Labeled")] * 3,
        *[("B", "Training/Labeled")] * 2,
        ("C", "Training/Unlabeled"),
        *[(v, "Testing") for v in "ABCD"],
    ]
    assert len({s.code for s in subjects}) == len(subjects)
    for s in subjects:
        names = {p.name for p in (out / s.split / s.code).iterdir()}
        expected = {f"{s.code}_sa.nii.gz"} | ({f"{s.code}_sa_gt.nii.gz"} if "Unlabeled" not in s.split else set())
        assert names == expected
        assert len(s.code) == 6 and s.code[::2].isalpha() and s.code[1::2].isdigit()


def test_the_information_csv_has_the_columns_and_zeros_for_the_unlabelled(
    phantom: tuple[Path, list[PhantomSubject]],
) -> None:
    out, subjects = phantom
    with (out / INFORMATION_CSV).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [r["External code"] for r in rows] == [s.code for s in subjects]
    for row, subject in zip(rows, subjects, strict=True):
        assert row["VendorName"] == VENDORS[subject.vendor].name
        assert int(row["Centre"]) in VENDORS[subject.vendor].centres
        ed_es = (int(row["ED"]), int(row["ES"]))
        labelled = subject.split != "Training/Unlabeled"
        assert ed_es == ((subject.protocol.ed, subject.protocol.es) if labelled else (0, 0))
        assert max(ed_es) < TINY.frames


def test_images_are_4d_and_masks_lie_on_the_same_grid(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    out, subjects = phantom
    for s in subjects:
        image, zooms = fourth_dimension(out / s.folder / f"{s.code}_sa.nii.gz")
        p = s.protocol
        assert image.shape == (p.width, p.height, p.slices, TINY.frames) and image.dtype == np.int16
        assert TINY.slices[0] <= p.slices <= TINY.slices[1]
        assert image.min() >= 0 and image.std() > 10
        assert zooms[2] == pytest.approx(p.spacing_mm)
        gt = out / s.folder / f"{s.code}_sa_gt.nii.gz"
        if gt.exists():
            mask, mask_zooms = fourth_dimension(gt)
            assert mask.shape == image.shape and mask_zooms == zooms


def test_masks_are_zero_except_at_end_diastole_and_end_systole(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    for subject, mask, _ in masks(phantom):
        labelled = {int(t) for t in np.flatnonzero(mask.any(axis=(0, 1, 2)))}
        assert labelled == {subject.protocol.ed, subject.protocol.es}
        assert set(np.unique(mask)) == {0, LV, MYO, RV}


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    small = TINY.model_copy(update={"labelled_a": 1, "labelled_b": 0, "unlabelled_c": 0})
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        write_phantom(tmp_path / name, small.model_copy(update={"seed": seed}))
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_a_subject_does_not_depend_on_how_many_others_there_are(
    tmp_path: Path, phantom: tuple[Path, list[PhantomSubject]]
) -> None:
    out, _ = phantom
    write_phantom(tmp_path / "few", TINY.model_copy(update={"labelled_a": 1, "labelled_b": 0, "unlabelled_c": 0}))
    few, all_of_them = files(tmp_path / "few"), files(out)
    images = [name for name in few if name.endswith(".nii.gz")]
    assert images and all(few[name] == all_of_them[name] for name in images)


def test_pixel_areas_are_those_of_the_vendor(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    out, subjects = phantom
    for s in subjects:
        _, zooms = fourth_dimension(out / s.folder / f"{s.code}_sa.nii.gz")
        pieces = VENDORS[s.vendor].areas
        assert pieces[0][1] - 1e-4 <= zooms[0] * zooms[1] <= pieces[-1][2] + 1e-4
        if s.vendor == "D":
            assert zooms[0] * zooms[1] == pytest.approx(0.63, abs=1e-4)


def test_the_table_of_pixel_areas_follows_the_papers_histograms() -> None:
    quantiles = (np.arange(1000) + 0.5) / 1000
    areas = {code: np.array([v.pixel_area(q) for q in quantiles]) for code, v in VENDORS.items()}
    for code in "ABC":
        assert areas[code].min() >= 0.954 and areas[code].max() <= 2.692
    assert np.mean(np.abs(areas["A"] - 2.0) < 0.05) == pytest.approx(32 / 75, abs=0.05)
    assert np.mean(np.abs(areas["C"] - 2.203) < 1e-6) == pytest.approx(24 / 25, abs=0.01)
    assert areas["B"].max() <= 1.9
    assert np.all(areas["D"] == 0.63)
    assert all(sum(share for share, _, _ in v.areas) == pytest.approx(1) for v in VENDORS.values())


def test_the_left_ventricle_empties_and_its_muscle_stays(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    for subject, mask, millilitres in masks(phantom):
        ed, es = mask[..., subject.protocol.ed], mask[..., subject.protocol.es]
        volume = {
            name: (np.sum(ed == k) * millilitres, np.sum(es == k) * millilitres) for name, k in (("LV", 1), ("MYO", 2))
        }
        ejection = 1 - volume["LV"][1] / volume["LV"][0]
        assert ejection == pytest.approx(subject.patient.ejection, abs=0.12)
        assert volume["MYO"][1] == pytest.approx(volume["MYO"][0], rel=0.15)  # whole slices leave through the base
        assert np.sum(es == RV) < np.sum(ed == RV)


def test_blood_of_the_left_ventricle_is_enclosed_by_muscle(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    for subject, mask, _ in masks(phantom):
        for t in (subject.protocol.ed, subject.protocol.es):
            for k in range(mask.shape[2]):
                plane = mask[:, :, k, t]
                around = ndimage.binary_dilation(plane == LV, np.ones((3, 3), dtype=bool)) & (plane != LV)
                assert np.all(plane[around] == MYO)


def test_each_structure_is_one_piece_in_every_slice(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    for subject, mask, _ in masks(phantom):
        for t in (subject.protocol.ed, subject.protocol.es):
            for k in range(mask.shape[2]):
                for label in (LV, MYO, RV):
                    assert ndimage.label(mask[:, :, k, t] == label, np.ones((3, 3)))[1] <= 1


def test_dilated_hearts_are_larger_and_hypertrophic_ones_thicker() -> None:
    def mean(pathology: str, squeeze: float) -> tuple[float, float]:
        cuts = []
        for i in range(20):
            patient = draw_patient(np.random.Generator(np.random.Philox(i)), pathology)
            cut = section(patient, 0.45 * patient.length, squeeze)
            cuts.append((cut.endo, cut.epi - cut.endo))
        radius, wall = np.mean(cuts, axis=0)
        return float(radius), float(wall)

    radius, wall = mean("NOR", 0.0)
    assert mean("DCM", 0.0)[0] > 1.2 * radius
    assert mean("HCM", 0.0)[1] > 1.4 * wall
    assert mean("NOR", 1.0)[1] > 1.25 * wall  # walls thicken as the cavity empties
    assert mean("DCM", 1.0)[0] > 1.5 * mean("NOR", 1.0)[0]


def test_blood_is_brighter_than_muscle_and_the_lung_darker_on_every_scanner(
    phantom: tuple[Path, list[PhantomSubject]],
) -> None:
    out, _ = phantom
    for subject, mask, _ in masks(phantom):
        image, _ = fourth_dimension(out / subject.folder / f"{subject.code}_sa.nii.gz")
        ed = subject.protocol.ed
        level = {k: float(np.median(image[..., ed][mask[..., ed] == k])) for k in (LV, MYO, RV)}
        assert level[LV] > 1.6 * level[MYO] and level[RV] > 1.6 * level[MYO]
        assert np.percentile(image[..., ed], 20) < 0.5 * level[MYO]


def test_the_heart_beats_in_the_picture_and_the_spine_does_not(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    out, _ = phantom
    for subject, mask, _ in masks(phantom):
        image, _ = fourth_dimension(out / subject.folder / f"{subject.code}_sa.nii.gz")
        ed, es, middle = subject.protocol.ed, subject.protocol.es, subject.protocol.slices // 2
        change = np.abs(image[:, :, middle, ed].astype(float) - image[:, :, middle, es])
        moved = mask[:, :, middle, ed] != mask[:, :, middle, es]
        rim = np.zeros_like(moved)
        rim[:, -12:] = True
        assert change[moved].mean() > 3 * change[rim].mean()


def test_a_second_phantom_replaces_the_first_and_foreign_data_are_left_alone(tmp_path: Path) -> None:
    small = TINY.model_copy(update={"labelled_a": 1, "labelled_b": 0, "unlabelled_c": 0, "testing": 0})
    first = write_phantom(tmp_path / "data", small)
    second = write_phantom(tmp_path / "data", small.model_copy(update={"seed": 8}))
    left = {p.name for p in (tmp_path / "data/Training/Labeled").iterdir()}
    assert left == {second[0].code} != {first[0].code}
    (tmp_path / "hospital/Training/Labeled/A1B2C3").mkdir(parents=True)
    with pytest.raises(InputError, match="another data set; choose an empty folder"):
        write_phantom(tmp_path / "hospital", small)
    (tmp_path / "a_file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_phantom(tmp_path / "a_file", small)


def test_counts_scale_progress_is_told_and_bad_settings_are_refused(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"subjects": 0.34, "labelled_b": 0, "testing": 0})
    told: list[tuple[int, int]] = []
    subjects = write_phantom(tmp_path / "data", config, lambda done, total: told.append((done, total)))
    assert [s.vendor for s in subjects] == ["A", "C"] and told == [(1, 2), (2, 2)]
    assert not list(tmp_path.rglob("*.part"))
    for wrong in ({"frames": 1}, {"slices": (9, 7)}, {"seed": -1}, {"vendors": 5}):
        with pytest.raises(ValidationError):
            PhantomConfig.model_validate(wrong)
