"""The report from run folders on disk: complete, partial, empty, hostile."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import figures
from experiments.paper_table import PAPER_DICE
from experiments.report import build_report, contrasts, read_history, render_terminal_table
from pipeline.evaluation import STRUCTURES, TABLE_FIELDS, read_cases, summarise, write_cases
from storage import uri

PNG = b"\x89PNG\r\n\x1a\n"


def _cases(arm: str, vendors: str = "AD", seed: int = 0, lift: float = 0.0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for vendor in vendors:
        for number in range(6):
            for phase in ("ED", "ES"):
                for structure in STRUCTURES:
                    missed = vendor == "D" and structure == "RV" and number == 0
                    dice = 0.0 if missed else 0.7 + 0.01 * number + lift
                    distance = np.inf if missed else 4.0
                    rows.append({
                        "arm": arm, "seed": seed, "subject": f"{vendor}{number}", "vendor": vendor, "centre": "1",
                        "phase": phase, "structure": structure, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
                        "missed": missed, "dice_slices": dice,
                    })  # fmt: skip
    return rows


def _write_run(run: Path, arms: dict[str, float], vendors: str = "AD") -> Path:
    for arm, lift in arms.items():
        folder = run / "arms" / arm / "seed0"
        folder.mkdir(parents=True)
        write_cases(str(folder / "cases.csv"), _cases(arm, vendors, lift=lift))
        lines = [
            json.dumps({"epoch": e, "step": 5 * e, "loss/total": 1 / (e + 1), "val/dice": 0.2 * e}) for e in range(4)
        ]
        (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    slices = [
        {"subject": f"{v}{i}", "vendor": v, "split": "test" if v == "D" else "train", "labelled": v == "A"}
        | {"pixel_area_mm2": 1.9}
        for v in vendors
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(slices), run / "slices.parquet")
    (run / "splits.csv").write_text("subject,vendor,centre,split,reason\nA0,A,1,train,listed\nD0,D,5,test,listed\n")
    (run / "skipped.csv").write_text("subject,file,reason,remedy\np001,/home/me/p001/Info.cfg,no Info.cfg,add one\n")
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of three arms with its report: folder, HTML, Markdown."""
    run = _write_run(tmp_path_factory.mktemp("run"), {"fs_sdnet": 0.0, "fs_sdnet_ra": 0.1, "unet_ra": 0.05})
    pictures = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16)).astype(np.float32)
    mosaic = figures.fa_mosaic(pictures[:2], pictures[2:5], pictures.reshape(2, 3, 16, 16), ["A", "B"], ["A", "B", "C"])
    note = {"date": "2025-01-01", "data": "phantom", "versions": {"torch": "2.13"}}
    paths = build_report(str(run), "Demo", note, mosaic, problems={"ss_sdnet_ra": "out of memory"})
    return run / "report", Path(paths.html).read_text(), Path(paths.table_md).read_text()


def test_every_promised_file_is_there(report: tuple[Path, str, str]) -> None:
    folder, _, _ = report
    pictures = {f"{name}.png" for name in ("dice", "learning", "resolutions", "mosaic")}
    assert {p.name for p in folder.iterdir()} == {"index.html", "table.csv", "cases.csv", "table.md"} | pictures
    assert all((folder / name).read_bytes().startswith(PNG) for name in pictures)
    assert len(read_cases(str(folder / "cases.csv"))) == 3 * 2 * 6 * 2 * 3
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TABLE_FIELDS and len(rows) == 3 * 2 * 3
    assert [row["arm"] for row in rows[::6]] == ["unet_ra", "fs_sdnet", "fs_sdnet_ra"]  # the paper's order


def test_the_page_needs_no_network_and_no_other_file(report: tuple[Path, str, str]) -> None:
    _, html, _ = report
    assert html.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', html) and "@import" not in html and "<script" not in html
    assert len(re.findall(r'<img [^>]*alt="[^"]+', html)) == 4


def test_the_page_names_failures_missing_arms_and_skipped_subjects(report: tuple[Path, str, str]) -> None:
    _, html, _ = report
    assert "out of memory" in html and "not run" in html
    assert "2/12 missed" in html and "6 of 216 scored structures" in html
    assert "no Info.cfg" in html and "/home/me" not in html
    assert "unseen in training" in html and "labelled in training" in html
    assert "Synthetic phantom" in html


def test_the_markdown_table_stands_beside_the_papers(report: tuple[Path, str, str]) -> None:
    _, _, text = report
    assert "| arm | A LV | A MYO | A RV | D LV | D MYO | D RV |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| FS SDNet+RA")]
    assert line.startswith("| FS SDNet+RA | **.825** / .905 |") and line.endswith("/ .624 |")
    assert "not a target that can be hit exactly" in text and "synthetic phantom" in text


def test_vendors_the_paper_has_not_show_only_ours(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "arms" / "fs_sdnet_ra" / "seed0"
    folder.mkdir(parents=True)
    write_cases(str(folder / "cases.csv"), [case | {"vendor": "Siemens"} for case in _cases("fs_sdnet_ra", "A")])
    paths = build_report(str(run), "ACDC", {"date": "2025-01-01"})
    text = Path(paths.table_md).read_text()
    assert "| FS SDNet+RA | .725 | .725 | .725 |" in text
    assert "paper" not in text and "phantom" not in text


def test_nothing_in_a_run_can_break_out_of_the_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    evil = '<script>alert("x")</script>'
    (run / "skipped.csv").write_text(
        f"subject,file,reason,remedy\n{evil.replace(chr(34), chr(39))},f,{evil.replace(chr(34), chr(39))},r\n"
    )
    folder = run / "arms" / "unet_ra" / "seed0"
    folder.mkdir(parents=True)
    write_cases(str(folder / "cases.csv"), [case | {"vendor": evil} for case in _cases("unet_ra", "A")])
    html = Path(build_report(str(run), evil, {evil: evil}, problems={"fs_sdnet": evil}).html).read_text()
    assert "<script" not in html and html.count("&lt;script&gt;") > 5


def test_an_empty_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    paths = build_report(str(tmp_path), "Nothing yet", {})
    assert "No arm has been evaluated yet" in Path(paths.html).read_text()
    assert paths.figures == ()


def test_a_run_in_an_object_store_gets_its_report_there(tmp_path: Path) -> None:
    local = _write_run(tmp_path / "run", {"fs_sdnet": 0.0})
    remote = f"memory://report/{tmp_path.name}"
    for path in local.rglob("*"):
        if path.is_file():
            uri.write_bytes(uri.join(remote, path.relative_to(local).as_posix()), path.read_bytes())
    paths = build_report(remote, "Remote", {})
    assert uri.read_text(paths.table_csv) == Path(build_report(str(local), "Local", {}).table_csv).read_text()


def test_a_report_of_the_same_run_is_the_same_bytes(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", {"fs_sdnet": 0.0})
    pages = [Path(build_report(str(run), "Twice", {}).html).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_contrasts_are_paired_by_subject() -> None:
    rows = contrasts([*_cases("fs_sdnet"), *_cases("fs_sdnet_ra", lift=0.1)])
    (a,) = [row for row in rows if row["vendor"] == "A"]
    assert a["n"] == 6 and a["step"].startswith("RA")
    # Every subject gains exactly 0.1: no spread is left, however much the subjects differ among themselves.
    assert (a["difference"], a["low"], a["high"]) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


def test_history_survives_a_torn_line_and_a_repeated_epoch(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 2, "v": 1}\n{"step": 1, "v": 0}\n{"step": 2, "v": 5}\n{"step": 3, "v"')
    assert read_history(str(path)) == [{"step": 1, "v": 0}, {"step": 2, "v": 5}]


def test_the_terminal_table_of_the_whole_ablation_fits_80_columns() -> None:
    from rich.console import Console

    cases = [case for arm in PAPER_DICE for case in _cases(arm, "ABCD")]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_terminal_table(summarise(cases)))
    text = console.export_text()
    assert "SS SDNet+RA+FA" in text and "…" not in text
    assert "missed" in text
