"""`cardiomix inspect`: the same subjects left out as by ingest, a page that stands alone, and exit statuses."""

from __future__ import annotations

import csv
import html
import io
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from experiments.inspection.figures import histogram, outline, png
from experiments.inspection.page import PER_VENDOR, findings, groups, page, terminal_tables
from storage.layouts import LayoutOptions
from storage.survey.survey import Survey, survey

Write = Callable[..., Path]
Build = Callable[[dict[str, tuple[str, str]]], Path]

MARKER = "Muster-Erika-1964"
PEOPLE = {
    "A1": ("Training/Labeled", "A"), "A2": ("Training/Labeled", "A"), "A3": ("Training/Labeled", "A"),
    "B1": ("Training/Labeled", "B"), "C1": ("Training/Unlabeled", "C"), "D1": ("Testing", "D"),
}  # fmt: skip


def cardiomix(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=None)


@pytest.fixture
def people(mnms_folder: Build) -> str:
    """A M&Ms folder of six subjects of four vendors."""
    return str(mnms_folder(PEOPLE))


@pytest.fixture
def faulty(mnms_folder: Build, tmp_path: Path, write_nifti: Write, study: Callable[..., Any]) -> list[str]:
    """Two folders with every kind of reason to leave a subject out."""
    codes = ("ok", "cut", "nan", "coding", "empty", "grid", "zero", "nomask", "twin")
    folder = mnms_folder({code: ("Training/Labeled", "A") for code in codes})
    own = {code: folder / "OpenDataset" / "Training" / "Labeled" / code for code in codes}
    image, mask = study(1)
    cut = own["cut"] / "cut_sa.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    write_nifti(own["nan"] / "nan_sa.nii.gz", np.where(image > 800, np.nan, image).astype(np.float32))
    write_nifti(own["coding"] / "coding_sa_gt.nii.gz", np.array([0, 3, 2, 1], np.uint8)[mask])
    write_nifti(own["empty"] / "empty_sa_gt.nii.gz", 0 * mask)
    write_nifti(own["grid"] / "grid_sa_gt.nii.gz", mask[:-1])
    write_nifti(own["zero"] / "zero_sa.nii.gz", 0 * image)
    (own["nomask"] / "nomask_sa_gt.nii.gz").unlink()
    twin = own["twin"] / "twin_sa.nii.gz"
    twin.write_bytes((own["ok"] / "ok_sa.nii.gz").read_bytes())
    table = tmp_path / "table"
    write_nifti(table / "g.nii.gz", image)
    long = "x" * 201
    rows = ["g,g.nii.gz,,GE,c,0,1", "gone,gone.nii.gz,,GE,c,0,1", f"{long},g.nii.gz,,GE,c,0,1", "ok,g.nii.gz,,GE,c,0,1"]
    rows += ["late,g.nii.gz,,GE,c,0,9", "out,../g.nii.gz,,GE,c,0,1"]
    (table / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es\n" + "\n".join(rows) + "\n")
    return [str(folder), str(table)]


@pytest.mark.usefixtures("ray_local")
def test_whom_it_lists_as_skipped_is_whom_ingest_skips_with_reason_and_remedy(
    faulty: list[str], tmp_path: Path
) -> None:
    from actors.ingest import ingest

    ingest(faulty, str(tmp_path / "run"), LayoutOptions())
    with (tmp_path / "run" / "skipped.csv").open(newline="") as file:
        theirs = list(csv.DictReader(file))
    found = survey(faulty)
    assert [vars(s) for s in found.skipped] == theirs
    assert len(theirs) == 13
    with (tmp_path / "run" / "splits.csv").open(newline="") as file:
        assert [(s.subject, s.split) for s in found.subjects] == [
            (r["subject"], r["split"]) for r in csv.DictReader(file)
        ]


def test_groups_are_those_counted_by_hand(people: str) -> None:
    rows = groups(survey([people]).subjects)
    assert [(g.vendor, g.centre, g.subjects, g.volumes, g.slices, g.labelled) for g in rows] == [
        ("A", "1", 3, 6, 18, 18),
        ("B", "1", 1, 2, 6, 6),
        ("C", "1", 1, 2, 6, 0),
        ("D", "1", 1, 2, 6, 6),
        ("all", "", 6, 12, 36, 30),
    ]
    assert {(g.pixel_area_mm2, g.slice_mm, g.matrix) for g in rows} == {(("2.25", ""), ("8", ""), ("20", "24"))}
    assert [g.splits for g in rows] == [(2, 1, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (4, 1, 1, 0)]


def test_flags_of_one_kind_and_group_are_one_line(people: str) -> None:
    lines = {(f.check.about, f.vendor): f for f in findings(survey([people]).subjects)}
    few = lines["slices", "A"]
    assert (few.subjects, few.of, few.number) == (("A1", "A2", "A3"), 3, "3")  # the fixture's studies have 3 slices
    assert few.check.finding == "outside 6–20"
    ratio = lines["mask", "A"].number  # and noise for blood
    assert re.fullmatch(r"(0\.\d\d to )?[01]\.\d\d times", ratio)


def test_terminal_tables_keep_within_their_columns_and_read_names_as_they_are(
    tmp_path: Path, write_nifti: Write, study: Callable[..., Any]
) -> None:
    from rich.console import Console

    for n in range(12):
        write_nifti(tmp_path / "data" / f"{n}.nii.gz", study(n)[0])
    rows = [f"[red]subject of a long name {n},{n}.nii.gz,,Some Long Vendor,Centre of the North,0,1" for n in range(12)]
    rows += [f"gone{n},absent.nii.gz,,X,c,0,1" for n in range(30)]
    (tmp_path / "data" / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es\n" + "\n".join(rows) + "\n")
    out = io.StringIO()
    for table in terminal_tables(survey([str(tmp_path / "data")])):
        Console(file=out, width=120).print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 120
    assert "12 subjects, 24 volumes, 72 slices, of which 0 labelled; 30 would be skipped" in text
    assert "[red]subject" in text and "…" not in text
    assert "gone26" in text and "gone27" not in text and "and 10 more" in text


class _Page(HTMLParser):
    """What a page refers to, shows and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.graphics: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object", "img")
        if tag == "svg" and "aria-hidden" not in given:
            assert given["role"] == "img"
            self.graphics.append(given["aria-label"] or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_from_elsewhere_and_describes_its_graphics(people: str) -> None:
    text = page(survey([people]), ["mnms"])
    parsed = _Page(text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert len(parsed.links) == 6  # at most four of each of the four vendors
    assert "A1: ED, slice 2, with LV, MYO, RV outlined" in parsed.graphics
    assert "C1: slice 2, without labels" in parsed.graphics
    assert "Histogram of A: 3 subjects, median 2.25, 2.25 to 2.25 mm²" in parsed.graphics
    assert len(parsed.graphics) == 6 + 4 + 4
    assert "0.954 to 2.692 mm²" in " ".join(parsed.words)
    assert "This page holds images of the data set." in parsed.words


def test_without_images_no_pixel_is_on_the_page(people: str) -> None:
    found = survey([people])
    text = page(found, ["mnms"], images=False)
    assert "data:image" not in text and "holds images" not in text
    assert "Histogram of A" in text


def test_only_names_that_are_codes_are_on_the_page_and_they_are_no_markup(
    tmp_path: Path, study: Callable[..., Any]
) -> None:
    folder = tmp_path / MARKER / "study"
    path = folder / "p1_sa.nii.gz"
    folder.mkdir(parents=True)
    header = nib.Nifti1Header()
    header["descrip"] = header["aux_file"] = header["db_name"] = MARKER.encode()
    nib.save(nib.Nifti1Image(study(1)[0], np.eye(4), header), path)
    (folder / "subjects.csv").write_text(
        f"subject,image,mask,vendor,centre,ed,es\n<b>p1</b>,{path.name},,<i>X</i>,c,0,1\np2,gone.nii.gz,,X,c,0,1\n"
    )
    assert cardiomix(str(folder), cwd=tmp_path).returncode == 0
    text = (tmp_path / "inspect.html").read_text()
    assert MARKER not in text and str(tmp_path) not in text and "study" in text
    assert "<b>p1</b>" not in text and html.escape("<b>p1</b>") in text
    assert "<i>X</i>" not in text and "gone.nii.gz" in text


def test_equal_data_give_equal_pages(people: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cardiomix(people, "--out", f"{name}.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_page_shows_few_subjects_of_a_vendor_labelled_ones_first(mnms_folder: Build) -> None:
    people = {f"A{n}": ("Training/Labeled", "A") for n in range(9)} | {
        "B1": ("Training/Labeled", "B"), "B0": ("Training/Unlabeled", "B"), "B2": ("Training/Unlabeled", "B"),
    }  # fmt: skip
    graphics = _Page(page(survey([str(mnms_folder(people))]), ["mnms"])).graphics
    shown = [label.split(":")[0] for label in graphics if "slice" in label]
    assert len(shown) == PER_VENDOR + 3
    assert shown == ["A0", "A2", "A4", "A6", "B1", "B0", "B2"]


def test_a_page_of_nothing_but_skipped_subjects_still_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es\np,x.nii.gz,,X,c,0,1\n")
    found = survey([str(tmp_path / "data")])
    assert found.subjects == ()
    text = page(found, ["data"])
    assert "0 subjects" in text and "x.nii.gz" in text and "no such file" in text
    done = cardiomix("data", cwd=tmp_path)
    assert done.returncode == 2
    assert "p, x.nii.gz: no such file (no subject can come in)" in done.stderr
    assert (tmp_path / "inspect.html").exists()


def test_exit_status_is_0_for_skipped_subjects_unless_strict(people: str, tmp_path: Path) -> None:
    next(Path(people).glob("**/A2_sa.nii.gz")).write_bytes(b"no image")
    done = cardiomix(people, "--no-images", cwd=tmp_path)
    assert done.returncode == 0
    assert "A2" in done.stdout and "is not a NIfTI file" in done.stdout and "page: inspect.html" in done.stdout
    assert "data:image" not in (tmp_path / "inspect.html").read_text()
    strict = cardiomix(people, "--strict", cwd=tmp_path)
    assert strict.returncode == 2
    assert strict.stderr.splitlines()[-1].startswith("error: A2, A2_sa.nii.gz: is not a NIfTI file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "no such folder"),
        ((".", "--layout", "bids"), "no such layout"),
        ((".",), "none of the known layouts"),
        ((".", "--set", "train.epochs=1"), "is not about reading data"),
        ((".", "--set", "layouts.frame=all"), "there is no field layouts.frame"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cardiomix(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "inspect.html").exists()


def test_a_page_that_cannot_be_written_is_told(people: str, tmp_path: Path) -> None:
    done = cardiomix(people, "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and "is a folder; name a file" in done.stderr and "Traceback" not in done.stderr


def test_layout_fields_are_set_as_for_ingest(people: str, tmp_path: Path) -> None:
    done = cardiomix(people, "--set", "layouts.frames=all", cwd=tmp_path)
    assert done.returncode == 0 and "24 volumes" in done.stdout


def test_help_has_an_example() -> None:
    done = cardiomix("--help", cwd=Path(__file__).parent)
    assert done.returncode == 0 and "Example" in done.stdout


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([2.25], False), ([0.63, 25.0], False), ([1.9, 1.9, 2.0, 2.1, 2.3], False), ([0.3, 0.6, 0.9], False),
        ([4095.0] * 3, True), ([0.97, 1000.0, 32767.0], True), ([100.0, 200.0, 500.0, 1000.0], True),
    ],
)  # fmt: skip
def test_a_histogram_holds_every_value_within_its_axes(values: list[float], log: bool) -> None:
    drawn = histogram("X", values, values, "subjects", "", log, None if log else (0.954, 2.692))
    counts = {y: int(label) for y, label in drawn.y_ticks}
    (bottom, zero), (_, most) = max(counts.items()), min(counts.items())
    assert zero == 0
    unit = (bottom - min(counts)) / most
    assert round(sum(height for *_, height in drawn.bars) / unit) == len(values)
    assert all(width > 0 and x >= 26 and x + width <= 238 for x, _, width, _ in drawn.bars)
    assert all(26 <= x <= 238 for x, _ in drawn.x_ticks)
    assert len(drawn.x_ticks) in range(1, 9)
    assert len(drawn.bars) <= 34


def test_an_outline_follows_pixel_edges() -> None:
    region = np.zeros((4, 5), bool)
    region[1, 2] = True
    assert outline(region) == "M2 1v1M3 1v1M2 1h1M2 2h1"
    region[1, 3] = True
    assert outline(region) == "M2 1v1M4 1v1M2 1h2M2 2h2"
    assert outline(np.ones((2, 2), bool)) == "M0 0v2M2 0v2M0 0h2M0 2h2"  # up to the image's rim


def test_a_png_is_read_back_as_it_was() -> None:
    from matplotlib.image import imread

    image = np.random.default_rng(0).integers(0, 256, (7, 11)).astype(np.uint8)
    assert np.array_equal(np.rint(imread(io.BytesIO(png(image))) * 255), image)


def test_an_empty_survey_has_no_tables() -> None:
    assert terminal_tables(Survey((), ())) == []


def test_real_data_have_a_short_list_worth_a_look(real_acdc: Path, real_sunnybrook: Path) -> None:
    found = survey([str(real_acdc), str(real_sunnybrook)])
    assert [s.subject for s in found.skipped] == ["patient001"]
    lines = findings(found.subjects)
    assert [(f.vendor, f.check.about, len(f.subjects), f.of) for f in lines] == [
        ("GE", "pixel area", 1, 4),
        ("Siemens", "pixel area", 4, 29),
        ("Siemens", "intensity p99.5", 8, 29),
    ]


def test_of_a_folder_of_all_real_data_what_is_not_read_is_listed(real_acdc: Path) -> None:
    found = survey([str(real_acdc.parent.parent)])
    assert [s.subject for s in found.subjects] == ["sunnybrook_dicom_SCD0000301", "sunnybrook_dicom_SCD0000401"]
    listed = {s.subject: s.reason for s in found.skipped}
    assert listed["sunnybrook_ge"] == "one of 4 NIfTI files among DICOM files"
    assert set(listed) == {"acdc", "mnms_dev", "sunnybrook_ge"}
