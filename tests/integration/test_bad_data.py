"""Bad data, one fault at a time in every layout that it can befall, through a real ingest.

Of two sound subjects the second gets a fault. The first must come in; of the second one line says who, what and what to
do, names no folder, and no slice of it is left. `faults` lists the faults.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.ingest import ingest
from storage.errors import InputError
from storage.layouts import LayoutOptions
from storage.slices.store import SliceStore
from tests.integration import faults
from tests.integration.faults import ACDC, CINES, EVERY, MNMS, NAMES, TABLE, Fault, Make, Study

Clean = Callable[..., list[Study]]

pytestmark = pytest.mark.usefixtures("ray_local")

HEADER = "subject,image,mask,vendor,centre,ed,es,labels,spacing,split"
INFORMATION = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"


@pytest.fixture
def clean(
    tmp_path: Path, write_nifti: Callable[..., Path], study: Callable[..., Any], mnms_folder: Callable[..., Path]
) -> Clean:
    """A function that writes sound subjects in a layout and returns them."""

    def build(layout: str, names: Sequence[str] = ()) -> list[Study]:
        names = names or NAMES[layout]
        if layout == MNMS:
            root = mnms_folder({name: ("Training/Labeled", "A") for name in names})
            base = root / "OpenDataset" / "Training" / "Labeled"
            files = {name: (base / name / f"{name}_sa.nii.gz", base / name / f"{name}_sa_gt.nii.gz") for name in names}
            return [Study(root, layout, name, *files[name], root / INFORMATION) for name in names]
        root = tmp_path / layout
        root.mkdir()
        make = _patient if layout == ACDC else _row
        if layout == TABLE:
            (root / "subjects.csv").write_text(f"{HEADER}\n")
        return [make(root, name, *study(seed), write_nifti) for seed, name in enumerate(names)]

    return build


def _row(root: Path, name: str, image: Any, mask: Any, write_nifti: Callable[..., Path]) -> Study:
    table = root / "subjects.csv"
    with table.open("a") as file:
        file.write(f"{name},{name}.nii.gz,{name}_gt.nii.gz,X,c,0,2,,,\n")
    files = (write_nifti(root / f"{name}.nii.gz", image), write_nifti(root / f"{name}_gt.nii.gz", mask))
    return Study(root, TABLE, name, *files, table)


def _patient(root: Path, name: str, image: Any, mask: Any, write_nifti: Callable[..., Path]) -> Study:
    turned = np.array([0, 3, 2, 1], np.uint8)[mask]
    start = str(root / name / name)
    write_nifti(Path(f"{start}_4d.nii.gz"), image)
    for frame in (3, 1):
        files = (
            write_nifti(Path(f"{start}_frame{frame:02d}.nii.gz"), image[..., frame - 1]),
            write_nifti(Path(f"{start}_frame{frame:02d}_gt.nii.gz"), turned[..., frame - 1]),
        )
    info = root / name / "Info.cfg"
    info.write_text("ED: 1\nES: 3\n")
    return Study(root, ACDC, name, *files, info)


def skipped(run: Path) -> list[dict[str, str]]:
    """The lines of skipped.csv about subjects."""
    with (run / "skipped.csv").open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["subject"] != "-"]


def subjects(run: Path) -> set[str]:
    return set(SliceStore.open(str(run)).column("subject").tolist())


def expected_file(fault: Fault, s: Study) -> str:
    names = {"image": s.image.name, "mask": s.mask.name, "table": s.table.name}
    row = r" row \d+" if fault.file == "table" and s.layout == TABLE else ""
    return re.escape(names.get(fault.file, "")) + row or fault.file.format(s.name)


def assert_told(line: dict[str, str], fault: Fault, s: Study) -> None:
    assert re.search(fault.reason, line["reason"]), line
    assert re.search(fault.remedy, line["remedy"]), line
    assert re.fullmatch(expected_file(fault, s), line["file"]), line
    told = " ".join(line.values())
    assert "\n" not in told and s.data.parent.name not in told and "/tmp" not in told, told


CASES = [pytest.param(f, layout, id=f"{layout}: {f.name}") for f in faults.FAULTS for layout in f.layouts]


@pytest.mark.parametrize(("fault", "layout"), CASES)
def test_a_bad_subject_is_one_clear_line_and_the_sound_one_comes_in(
    clean: Clean, tmp_path: Path, fault: Fault, layout: str
) -> None:
    fine, poor = clean(layout)
    fault.make(poor)
    run = tmp_path / "run"
    ingest([str(poor.data)], str(run), LayoutOptions(**fault.options))
    (line,) = skipped(run)
    assert line["subject"] == poor.name
    assert_told(line, fault, poor)
    assert subjects(run) == {fine.name}
    # Whose image is somebody else's is seen when both are stored; the index alone says who came in.
    assert not (run / "slices.zarr" / poor.name).exists()


def test_many_bad_subjects_are_a_line_each(clean: Clean, tmp_path: Path) -> None:
    befall = {f"s{n:03d}": f for n, f in enumerate(f for f in faults.FAULTS if TABLE in f.layouts and f.file != "-")}
    fine, *poor = clean(TABLE, ["fine", *befall])
    for s in poor:
        befall[s.name].make(s)
    report = ingest([str(fine.data)], str(tmp_path / "run"))
    lines = {line["subject"]: line for line in skipped(tmp_path / "run")}
    assert len(befall) > 60 and report.subjects == 1 and subjects(tmp_path / "run") == {"fine"}
    assert lines.keys() == befall.keys() and len(report.skipped) == len(befall)
    for s in poor:
        assert_told(lines[s.name], befall[s.name], s)


@pytest.mark.parametrize(
    ("name", "layout"), [("cut in the data", MNMS), ("no Info.cfg", ACDC), ("copy of another subject's", TABLE)]
)
def test_strict_ends_with_one_line_and_no_index(clean: Clean, tmp_path: Path, name: str, layout: str) -> None:
    import ray

    _, poor = clean(layout)
    (fault,) = (f for f in faults.FAULTS if f.name == name and layout in f.layouts)
    fault.make(poor)
    command = [
        sys.executable,
        "-m",
        "experiments",
        "ingest",
        str(poor.data),
        "--run",
        str(tmp_path / "run"),
        "--strict",
    ]
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | cluster)
    assert done.returncode == 2, done.stderr
    *progress, line = done.stderr.splitlines()
    file = "" if fault.file == "-" else ", " + expected_file(fault, poor)
    assert re.match(f"error: {poor.name}{file}: .*{fault.reason}.*; .*{fault.remedy}", line), line
    assert not any(word in " ".join(progress) for word in ("error", "Traceback", "poor", "skipped")), progress
    assert tmp_path.name not in done.stderr
    assert not (tmp_path / "run" / "slices.parquet").exists()


# ---- what looks odd and is sound


@dataclass(frozen=True)
class Oddity:
    """Something that keeps nobody out."""

    name: str
    make: Make
    layouts: tuple[str, ...] = EVERY
    options: dict[str, Any] = field(default_factory=dict)


SKEWED = {"srow_x": [1.45, 0.2, 0.1, 0], "srow_y": [-0.2, 1.4, 0.3, 0], "srow_z": [0.1, -0.4, 8.1, 0]}
MIRRORED = np.diag([-1.5, 1.5, 8, 1])


def in_capitals(s: Study) -> None:
    for column, path in (("image", s.image), ("mask", s.mask)):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
        if s.layout == TABLE:
            s.cell(column, path.name.replace(".nii.gz", ".NII.GZ"))


def in_windows(s: Study) -> None:
    (s.data / "in").mkdir()
    shutil.move(s.image, s.data / "in")
    s.cell("image", rf"in\{s.image.name}")


def recoded(order: tuple[int, ...], column: str) -> Make:
    def make(s: Study) -> None:
        faults.labels(*order)(s)
        s.cell("labels", column)

    return make


def in_two_parts(block: bytes) -> bytes:
    whole = gzip.decompress(block)
    return gzip.compress(whole[:999]) + gzip.compress(whole[999:])


def with_spacing_said(s: Study) -> None:
    faults.head(pixdim=[0] * 8)(s)
    faults.mask_head(pixdim=[0] * 8)(s)
    s.cell("spacing", "8 x 1.5 x 1.5")


ODDITIES = [
    Oddity("mask without directions", faults.mask_head(sform_code=0, qform_code=0)),
    Oddity("sform of nan", faults.mask_head(srow_x=[np.nan] * 4)),
    Oddity("sform of astronomers", faults.mask_head(srow_x=[1e30] * 4)),
    Oddity("cosines that are not orthonormal", faults.head(**SKEWED)),
    Oddity("quaternion longer than 1", faults.head(sform_code=0, qform_code=1, quatern_b=0.9, quatern_c=0.9)),
    Oddity("unknown unit", faults.head(xyzt_units=7)),
    Oddity("negative voxel size", faults.head(pixdim=[1, -1.5, 1.5, 8, 0, 0, 0, 0])),
    Oddity("mirrored mask, let in", faults.mask(np.array, MIRRORED), options={"check_masks": False}),
    Oddity(
        "mask beside the image, let in", faults.mask(np.array, faults.moved((0, 0, 80))), options={"check_masks": False}
    ),
    Oddity("labels in another order, let in", faults.labels(0, 1, 3, 2), options={"check_masks": False}),
    Oddity("no LV in the mask", faults.mask(lambda a: np.where(a == 1, 2, a)), CINES),
    Oddity("ACDC's order, said", recoded((0, 3, 2, 1), "RV 1, MYO 2, LV 3"), (TABLE,)),
    Oddity("CMRxMotion's order, said", recoded((0, 1, 3, 2), "LV=1; RV=2; MYO=3"), (TABLE,)),
    Oddity("other numbers, said", recoded((0, 1, 2, 200), "LV 1 MYO 2 RV 200 background 9"), (TABLE,)),
    Oddity("link that leaves, let in", faults.moved_out, options={"follow_links": True}),
    Oddity("not zipped, whatever its name", faults.unzipped(lambda _: None)),
    Oddity("zipped in two parts", faults.raw(in_two_parts)),
    Oddity("zeros behind", faults.raw(lambda block: block + bytes(512))),
    Oddity("content behind the data", lambda s: faults.content(s.image, lambda block: block + b"more")),
    Oddity("64 bits", faults.image(lambda a: a.astype(np.int64))),
    Oddity("masks of floats", faults.mask(lambda a: a.astype(np.float64))),
    Oddity("endings in capitals", in_capitals),
    Oddity("Windows' path", in_windows, (TABLE,)),
    Oddity("broken voxel size, but said", with_spacing_said, (TABLE,)),
]
ODD_CASES = [pytest.param(o, layout, id=f"{layout}: {o.name}") for o in ODDITIES for layout in o.layouts]


@pytest.mark.parametrize(("oddity", "layout"), ODD_CASES)
def test_what_is_only_odd_comes_in(clean: Clean, tmp_path: Path, oddity: Oddity, layout: str) -> None:
    fine, odd = clean(layout)
    before = ingest([str(odd.data)], str(tmp_path / "before"))
    oddity.make(odd)
    after = ingest([str(odd.data)], str(tmp_path / "run"), LayoutOptions(**oddity.options))
    assert replace(after, skipped=[]) == before and skipped(tmp_path / "run") == []
    assert subjects(tmp_path / "run") == {fine.name, odd.name}


def test_labels_in_another_order_are_ours_once_their_order_is_said(clean: Clean, tmp_path: Path) -> None:
    poor = clean(TABLE)[1]
    ingest([str(poor.data)], str(tmp_path / "before"))
    recoded((0, 3, 2, 1), "RV 1, MYO 2, LV 3")(poor)
    ingest([str(poor.data)], str(tmp_path / "after"))
    stores = [SliceStore.open(str(tmp_path / run)) for run in ("before", "after")]
    for i in range(len(stores[0])):
        assert np.array_equal(stores[0].mask(i), stores[1].mask(i))


# ---- the whole folder


def text(change: Callable[[str], str]) -> Make:
    return lambda s: s.table.write_text(change(s.table.read_text()))


def two_tables(s: Study) -> None:
    for name in ("one.csv", "two.csv"):
        shutil.copy(s.table, s.data / name)
    s.table.unlink()


FOLDERS: dict[str, tuple[str, Make, str]] = {
    "missing column": (
        TABLE,
        text(lambda t: t.replace(",vendor,", ",maker,")),
        r"subjects\.csv: has no column vendor \(",
    ),
    "repeated column": (
        TABLE,
        text(lambda t: t.replace("split", "ED", 1)),
        r"subjects\.csv: has the column ed twice; ren",
    ),
    "no rows": (TABLE, text(lambda t: t.splitlines()[0]), r"subjects\.csv: has no rows; write a header line and"),
    "empty table": (TABLE, text(lambda _: ""), r"subjects\.csv: has no rows; write a header"),
    "binary table": (
        TABLE,
        lambda s: s.table.write_bytes(b"\xff\xd8\xff\xe0"),
        r"cannot be read as a table .*; save it",
    ),
    "endless cell": (
        TABLE,
        text(lambda t: f'{t}"{"x" * 200_000}'),
        r"subjects\.csv: cannot be read as a table \(field",
    ),
    "table a folder": (TABLE, faults.in_place_of("table", Path.mkdir), r"as a table \(Is a directory\); save it again"),
    "table gone": (TABLE, lambda s: s.table.unlink(), "table: none of the known layouts; give a folder in the layout"),
    "two tables": (TABLE, two_tables, r"table: has several tables: one\.csv, two\.csv; give the path of the one"),
    "bad Parquet": (
        TABLE,
        lambda s: s.table.rename(s.data / "subjects.parquet"),
        r"subjects\.parquet: cannot be read as",
    ),
    "terms a folder": (
        TABLE,
        lambda s: (s.data / "TERMS.txt").mkdir(),
        r"TERMS\.txt: cannot be read as UTF-8 text; save",
    ),
    "M&Ms' column": (
        MNMS,
        text(lambda t: t.replace(",Centre,", ",Town,")),
        r"opendataset\.csv: has no column centre \(",
    ),
    "M&Ms' table gone": (MNMS, lambda s: s.table.unlink(), "mnms: its information table is absent; copy 211230_M&Ms_"),
    "bad Excel": (
        MNMS,
        lambda s: s.table.rename(s.table.with_suffix(".xlsx")),
        r"xlsx: .* \(not an Excel file\); save it",
    ),
    "ACDC's patients gone": (ACDC, lambda s: [shutil.rmtree(p) for p in s.data.iterdir()], "none of the known layouts"),
}


@pytest.mark.parametrize(("layout", "make", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_used_is_one_clear_line(
    clean: Clean, tmp_path: Path, layout: str, make: Make, message: str
) -> None:
    s = clean(layout)[0]
    make(s)
    with pytest.raises(InputError, match=message) as caught:
        ingest([str(s.data)], str(tmp_path / "run"))
    assert "\n" not in str(caught.value) and tmp_path.name not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_image_in_two_data_sets_enters_once(clean: Clean, tmp_path: Path) -> None:
    (mnms, _), (listed, other) = clean(MNMS), clean(TABLE, ["k1", "k2"])
    faults.saved(listed.image, faults.loaded(mnms.image).astype(np.float64), np.diag([1.2, 1.2, 9, 1]))
    faults.saved(listed.mask, faults.loaded(listed.mask), np.diag([1.2, 1.2, 9, 1]))
    faults.saved(other.image, faults.loaded(other.image) + 1)
    ingest([str(listed.data), str(mnms.data)], str(tmp_path / "run"))
    assert [(line["subject"], line["reason"]) for line in skipped(tmp_path / "run")] == [
        ("k1", "has an image that is also subject fine's")
    ]
    assert subjects(tmp_path / "run") == {"fine", "poor", "k2"}
