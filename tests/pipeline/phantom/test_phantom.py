"""The phantom: M&Ms' layout, reproducible bytes, vendors as the table says, hearts that beat as they should."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from experiments.cli.main import main
from pipeline.phantom import PhantomConfig, is_written, vendors, write_phantom
from pipeline.phantom.anatomy import draw_patient, section
from pipeline.phantom.plan import SPLITS, orders, share_out
from pipeline.phantom.vendors import VENDORS
from pipeline.phantom.write import COLUMNS, INFORMATION_CSV, TERMS, PhantomSubject
from storage.errors import InputError
from storage.layouts import LayoutOptions, read
from storage.layouts.splits import assign

LV, MYO, RV = 1, 2, 3
TINY = PhantomConfig(
    labelled_a=3, labelled_b=2, unlabelled_c=1, testing=1, validation=1, frames=3, field_scale=0.75, seed=7
)
ONE = PhantomConfig(
    labelled_a=1, labelled_b=0, unlabelled_c=0, testing=0, frames=2, slices=(3, 3), field_scale=0.55, seed=7
)


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
        *[(v, "Validation") for v in "ABCD"],
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


@pytest.mark.parametrize("frames", [2, 5])
def test_a_cine_has_the_frames_asked_for_and_ed_and_es_are_two_of_them(tmp_path: Path, frames: int) -> None:
    for s in write_phantom(tmp_path / "data", ONE.model_copy(update={"frames": frames, "labelled_a": 8})):
        image, _ = fourth_dimension(tmp_path / "data" / s.folder / f"{s.code}_sa.nii.gz")
        mask, _ = fourth_dimension(tmp_path / "data" / s.folder / f"{s.code}_sa_gt.nii.gz")
        ed_es = {int(s.row[COLUMNS.index("ED")]), int(s.row[COLUMNS.index("ES")])}
        assert image.shape[3] == mask.shape[3] == frames
        assert ed_es == set(np.flatnonzero(mask.any(axis=(0, 1, 2)))) and len(ed_es) == 2


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    small = ONE.model_copy(update={"testing": 1, "validation": 1})
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        write_phantom(tmp_path / name, small.model_copy(update={"seed": seed}))
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.pop("TERMS.txt") == other.pop("TERMS.txt")
    assert not set(one.values()) & set(other.values())


def test_a_subject_does_not_depend_on_how_many_others_there_are(
    tmp_path: Path, phantom: tuple[Path, list[PhantomSubject]]
) -> None:
    out, subjects = phantom
    fewer = write_phantom(tmp_path / "few", PhantomConfig.model_validate(TINY.model_dump() | {"subjects": 11}))
    few, all_of_them = files(tmp_path / "few"), files(out)
    images = [name for name in few if name.endswith(".nii.gz")]
    assert len(fewer) == 11 < len(subjects) and len(images) == 2 * 11 - 1
    assert all(few[name] == all_of_them[name] for name in images)
    assert {s.row for s in fewer} < {s.row for s in subjects}


@pytest.mark.parametrize("subjects", [7, 12, 35, 36, 37, 345])
def test_as_many_subjects_as_asked_for_and_no_vendor_or_split_is_lost(subjects: int) -> None:
    wanted = orders(PhantomConfig(subjects=subjects))
    groups = [(order.vendor, order.split) for order in wanted]
    assert len(groups) == subjects
    assert set(groups) == {(order.vendor, order.split) for order in orders(PhantomConfig())}
    if subjects == 36:
        assert wanted == orders(PhantomConfig())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any), st.integers(0, 500))
def test_shares_add_up_and_stay_within_one_of_their_proportion(counts: list[int], more: int) -> None:
    total = sum(count > 0 for count in counts) + more
    shares = share_out(total, counts)
    assert sum(shares) == total
    assert share_out(sum(counts), counts) == counts
    assert all((share > 0) == (count > 0) for share, count in zip(shares, counts, strict=True))
    large = [i for i, share in enumerate(shares) if share > 1]
    for i in large:
        for j in large:
            assert abs(shares[i] * counts[j] - shares[j] * counts[i]) <= counts[i] + counts[j]


def test_a_phantom_is_read_as_mnms_and_its_validation_subjects_follow_the_rules(
    phantom: tuple[Path, list[PhantomSubject]],
) -> None:
    out, subjects = phantom
    found, skipped = read(str(out))
    assert not skipped and {s.layout for s in found} == {"mnms"}
    split = {(s.vendor, s.split, s.labelled) for s in assign(found, LayoutOptions())}
    assert {name for _, name, _ in split} == {"train", "validation", "test", "excluded"}
    assert {part for part in split if part[1] == "validation"} == {("A", "validation", True), ("B", "validation", True)}
    # C has no labelled training subject and D none at all: they may not choose a checkpoint.
    assert {vendor for vendor, name, _ in split if name == "excluded"} == {"C", "D"}
    named = {s.subject: s for s in assign(found, LayoutOptions())}
    for s in subjects:
        want = {"Training/Labeled": "train", "Training/Unlabeled": "train", "Testing": "test"}.get(s.split)
        assert named[s.code].split == (want or ("validation" if s.vendor in "AB" else "excluded"))


def test_a_phantom_carries_its_own_terms_and_not_those_of_mnms(phantom: tuple[Path, list[PhantomSubject]]) -> None:
    terms = {s.terms for s in read(str(phantom[0]))[0]}
    assert terms == {TERMS.splitlines()[0]}
    assert "synthetic, of no patient" in terms.pop()


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


def test_every_number_of_the_vendors_table_has_its_source_in_the_docstring() -> None:
    for table in (vendors.Vendor, vendors.TissueSignal):
        for field in dataclasses.fields(table):
            assert f"`{field.name}`" in str(vendors.__doc__), field.name


def test_a_phantom_that_replaces_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    first = ONE.model_copy(update={"testing": 1, "validation": 1, "unlabelled_c": 1})
    second = ONE.model_copy(update={"seed": 8})
    write_phantom(tmp_path / "data", first)
    (tmp_path / "data/TERMS.txt").write_text("other terms")
    assert is_written(tmp_path / "data", first) and not is_written(tmp_path / "data", second)
    write_phantom(tmp_path / "data", second)
    write_phantom(tmp_path / "fresh", second)
    assert is_written(tmp_path / "data", second) and not is_written(tmp_path / "data", first)
    assert files(tmp_path / "data") == files(tmp_path / "fresh")
    assert [p.name for p in (tmp_path / "data").iterdir() if p.is_dir()] == ["Training"]


def test_a_phantom_cut_short_is_not_whole_and_the_next_call_makes_it_so(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    two = ONE.model_copy(update={"labelled_a": 2})
    write_phantom(tmp_path / "data", ONE)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "data", two, stop)
    assert not is_written(tmp_path / "data", ONE) and not is_written(tmp_path / "data", two)
    with pytest.raises(InputError, match="information table is absent"):
        read(str(tmp_path / "data"))
    write_phantom(tmp_path / "data", ONE)
    write_phantom(tmp_path / "fresh", ONE)
    assert files(tmp_path / "data") == files(tmp_path / "fresh")


def test_foreign_data_are_left_alone(tmp_path: Path) -> None:
    for place in (*SPLITS, "OpenDataset", "notes"):
        foreign = tmp_path / place.replace("/", "-") / place / "A1B2C3"
        foreign.mkdir(parents=True)
        with pytest.raises(InputError, match="holds something else than a phantom; choose an empty folder"):
            write_phantom(tmp_path / place.replace("/", "-"), ONE)
        assert foreign.is_dir()
    (tmp_path / "a_file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_phantom(tmp_path / "a_file", ONE)
    with pytest.raises(InputError, match="cannot be written"):
        write_phantom(tmp_path / "a_file" / "data", ONE)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/phantom.json").write_text('{"subjects": ["../.."]}')
    with pytest.raises(InputError, match="not a phantom's note"):
        write_phantom(tmp_path / "odd", ONE)


def test_progress_is_told_of_every_subject_and_no_part_of_a_file_stays(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_phantom(tmp_path, ONE.model_copy(update={"unlabelled_c": 1}), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 1}, "frames"),
        ({"slices": (9, 7)}, "fewest"),
        ({"seed": -1}, "seed"),
        ({"vendors": 5}, "vendors"),
        ({"subjects": 0}, "greater than or equal to 1"),
        ({"subjects": 6}, "must be at least 7"),
        ({"subjects": 10, "validation": 1}, "must be at least 11"),
        ({"labelled_a": 0, "labelled_b": 0, "unlabelled_c": 0, "testing": 0}, "every count is 0"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PhantomConfig.model_validate(wrong)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of `cardiomix phantom …`."""
    monkeypatch.setattr(sys, "argv", ["cardiomix", "phantom", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--subjects", "0"), "--subjects 0: phantom.subjects"),
        (("--subjects", "6"), "must be at least 7"),
        (("--frames", "1"), "--frames 1: phantom.frames"),
        (("--frames", "101"), "phantom.frames"),
        (("--seed", "-1"), "--seed -1: phantom.seed"),
        (("--set", "frame=3"), "no field phantom.frame"),
        (("--set", "field_scale=9"), "phantom.field_scale"),
        (("--set", "labelled_a=0", "--set", "subjects=5"), "must be at least 6"),
    ],
)
def test_a_bad_value_on_the_command_line_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert command(monkeypatch, str(tmp_path / "data"), *arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ") and message in told and "\n" not in told
    assert not list(tmp_path.iterdir())


def test_the_command_line_draws_what_its_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"frames": 2, "seed": 3, "subjects": 2}
    fields = {"labelled_b": 0, "unlabelled_c": 0, "testing": 0, "slices": [3, 3], "field_scale": 0.55}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments += [text for name, value in fields.items() for text in ("--set", f"{name}={value}")]
    assert command(monkeypatch, str(tmp_path / "told"), *arguments) == 0
    write_phantom(tmp_path / "called", PhantomConfig.model_validate(options | fields))
    assert files(tmp_path / "told") == files(tmp_path / "called")
