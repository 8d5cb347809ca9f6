"""The report from run folders on disk: complete, partial, empty, hostile."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.report import figures
from experiments.report.build import build_report
from experiments.report.findings import work_out
from experiments.report.first_screen import first_screen
from experiments.report.paper_table import PAPER_DICE
from experiments.report.run_files import cut_off, failures
from experiments.report.tables import render_terminal_table
from experiments.report.verdicts import sentences
from pipeline.inference.trust import foretold
from pipeline.scores.compare_arms import compare_arms
from pipeline.scores.examples import example, pack
from pipeline.scores.tables import (
    TABLE_FIELDS,
    TRUST_FIELDS,
    read_cases,
    read_slices,
    read_trust,
    summarise,
    write_cases,
    write_slices,
    write_trust,
)
from storage import fs
from storage.subjects import STRUCTURES

PNG = b"\x89PNG\r\n\x1a\n"
MINUS = "\N{MINUS SIGN}"


def _cases(arm: str, vendors: str = "AD", seed: int = 0, lift: float = 0.0, n: int = 6) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for vendor in vendors:
        for number in range(n):
            for phase in ("ED", "ES"):
                for structure in STRUCTURES:
                    missed = vendor == "D" and structure == "RV" and number == 0
                    dice = 0.0 if missed else 0.7 + 0.01 * number + lift
                    distance = np.inf if missed else 4.0
                    rows.append({
                        "arm": arm, "seed": seed, "subject": f"{vendor}{number}", "vendor": vendor, "centre": "1",
                        "phase": phase, "structure": structure, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
                        "missed": missed, "dice_slices": dice, "hd_mm": distance, "reference_ml": 100.0,
                        "predicted_ml": 0.0 if missed else 95.0, "outside": 0.0,
                    })  # fmt: skip
    return rows


def _slices(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case | {"slice": 0, "position": "mid"} for case in cases]


def _examples() -> bytes:
    heart = np.zeros((3, 30, 30), dtype=np.uint8)
    heart[:, 8:20, 8:20], heart[:, 11:17, 11:17], heart[:, 8:20, 2:8] = 2, 1, 3
    image = np.random.default_rng(0).uniform(0, 500, heart.shape).astype(np.float32)
    spacing = (8.0, 1.4, 1.2)
    return pack({
        "best": example("A5", "A", "ED", spacing, image, heart, heart),
        "worst": example("A0", "A", "ES", spacing, image, heart, np.roll(heart, 4, axis=2)),
    })  # fmt: skip


def _trust(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Half of the volumes are bad, and one of them was not expected to be."""
    rows = [case for case in cases if case["structure"] == "LV"]
    dice = [0.5 if i % 2 else 0.9 for i in range(len(rows))]
    return [
        {name: row[name] for name in TRUST_FIELDS[:6]}
        | {"dice": one, "expected_dice": 0.8 if i == 1 else one, "ece": 0.25, "ece_tempered": np.nan}
        for i, (row, one) in enumerate(zip(rows, dice, strict=True))
    ]


def _write_run(run: Path, arms: dict[str, float], vendors: str = "AD", seeds: int = 1) -> Path:
    for arm, lift in arms.items():
        for seed in range(seeds):
            folder = run / "arms" / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            cases = _cases(arm, vendors, seed, lift + 0.02 * seed)
            write_cases(str(folder / "cases.csv"), cases)
            write_slices(str(folder / "slices.csv"), _slices(cases))
            write_trust(str(folder / "trust.csv"), _trust(cases))
            (folder / "examples.npz").write_bytes(_examples())
            (folder / "model.json").write_text(json.dumps({"fingerprint": f"weights-of-{arm}-{seed}"}))
            lines = [
                json.dumps({"epoch": e, "step": 5 * e, "loss/total": 1 / (e + 1), "val/dice": 0.2 * e})
                for e in range(4)
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
    (run / "report").mkdir()
    (run / "report" / "config.yaml").write_text("preset: demo\nseeds: 1\n")
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of three arms with its report: folder, HTML, Markdown."""
    run = _write_run(tmp_path_factory.mktemp("run"), {"fs_sdnet": 0.0, "fs_sdnet_ra": 0.1, "unet_ra": 0.05})
    pictures = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16)).astype(np.float32)
    matrix = pictures.reshape(2, 3, 16, 16)
    ways = {"decoded": matrix, "residual": matrix}
    mosaic = figures.fa_mosaic(pictures[:2], pictures[2:5], ways, ["A", "B"], ["A", "B", "C"])
    note = {"date": "2025-01-01", "data": "phantom", "versions": {"torch": "2.13"}}
    paths = build_report(str(run), "Demo", note, mosaic, problems={"ss_sdnet_ra": "out of memory"})
    return run / "report", Path(paths.html).read_text(), Path(paths.table_md).read_text()


def test_what_the_networks_know_of_their_mistakes_is_counted_by_arm_and_vendor(report: tuple[Path, str, str]) -> None:
    folder, html, _ = report
    rows = read_trust(str(folder / "trust.csv"))
    first = next(row for row in foretold(rows) if (row["arm"], row["vendor"]) == ("unet_ra", rows[0]["vendor"]))
    assert first["bad"] == first["doubtful"] + 1 == first["found"] + 1 == first["volumes"] // 2
    section = html[html.index("What the networks know of their mistakes") :]
    section = section[: section.index("</section>")]
    cells = [row.split("</td>")[:-1] for row in section.split("<tr><td>")[1:]]
    assert len(cells) == 3 * 2
    assert [cell.removeprefix("<td>") for cell in cells[0][2:6]] == [
        str(first[name]) for name in ("volumes", "bad", "doubtful", "found")
    ]
    assert [cell.removeprefix("<td>") for cell in cells[0][8:]] == [".250", "–"]


PICTURES = ("dice", "cases", "agreement", "learning", "mosaic", "resolutions")
TABLES = ("table.csv", "cases.csv", "slices.csv", "ranking.csv", "comparisons.csv", "function.csv", "agreement.csv")
TABLES = (*TABLES, "trust.csv")


def test_every_promised_file_is_there(report: tuple[Path, str, str]) -> None:
    folder, _, _ = report
    pictures = {f"{name}.png" for name in PICTURES}
    assert {p.name for p in folder.iterdir()} == {"index.html", "table.md", "config.yaml", *TABLES} | pictures
    assert all((folder / name).read_bytes().startswith(PNG) for name in pictures)
    assert len(read_cases(str(folder / "cases.csv"))) == len(read_slices(str(folder / "slices.csv"))) == 3 * 2 * 6 * 6
    tables = {name: list(csv.DictReader((folder / name).open())) for name in TABLES}
    rows = tables["table.csv"]
    assert tuple(rows[0]) == TABLE_FIELDS and len(rows) == 3 * 2 * 3
    assert [row["arm"] for row in rows[::6]] == ["unet_ra", "fs_sdnet", "fs_sdnet_ra"]  # the paper's order
    assert len(tables["comparisons.csv"]) == 2 * 3 * 4  # steps × (vendors and all) × (structures and their mean)
    ranked = [(row["arm"], row["verdict"], row["reference"]) for row in tables["ranking.csv"]]
    beside = "unet_ra"
    assert ranked[:2] == [("fs_sdnet_ra", "descriptive", beside), ("unet_ra", "", beside)] and len(ranked) == 3
    assert len(tables["function.csv"]) == 3 * 12 * 7 and len(tables["agreement.csv"]) == 3 * 7


def test_the_page_needs_no_network_and_no_other_file(report: tuple[Path, str, str]) -> None:
    _, html, _ = report
    assert html.count("data:image/png;base64,") == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:)', html) and "@import" not in html and "<script" not in html
    assert "url(" not in html and "@media print" in html
    assert len(re.findall(r'<img [^>]*alt="[^"]{20,}', html)) == len(PICTURES)


def test_the_page_begins_with_the_best_arm_and_says_that_one_training_is_descriptive(
    report: tuple[Path, str, str],
) -> None:
    _, html, text = report
    answer = (
        "+.049 mean Dice [.046, .052] against the reference, U-Net+RA (n = 12, 1 seed an arm). One training: "
        "descriptive. The interval is over subjects alone. Another training may turn the order round; a verdict needs "
        "3 seeds."
    )
    title = "Highest mean Dice of 3 arms, over all vendors and structures"
    assert title in html and answer in html and html.index(answer) < html.index("<table")
    assert f"**{title}: FS SDNet+RA, .803.** {answer}" in text and text.index(answer) < text.index("| arm |")
    power = "With 3 seeds, these subjects would show a true difference of .048 to .121 in four of five"
    assert power in html and power in text
    verdict = (
        "RA over all vendors (one training: descriptive): +.097 mean Dice [.091, .103] (LV +.10, MYO +.10, RV +.09), "
        "n = 12, 1 seed."
    )
    headline = "One training: descriptive, on A (+.100), over all vendors (+.097) and on D (+.094)."
    assert headline in html and f"- {verdict}" in text
    assert html.index(headline) < html.index("What each step changes") < html.index("<h2>Failures")
    for word in ("helps", "harms", "established", "seeds_share_bank"):
        assert word not in html.lower() and word not in text.lower()
    lacking = "Not compared, since an arm has no scores: Unlabelled data (SS SDNet+RA against FS SDNet+RA), FA ("
    assert lacking in html and lacking in text


def test_the_page_says_how_to_repeat_the_run(report: tuple[Path, str, str]) -> None:
    _, html, _ = report
    assert "cardiomix ablate config.yaml --run again" in html and "preset: demo" in html
    assert "weights-of-unet_ra-0" in html and "torch 2.13" in html


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
    (line,) = [line for line in text.splitlines() if line.startswith("| FS SDNet+RA |")]
    assert line.startswith(f"| FS SDNet+RA | **.825** / .905 ({MINUS}.080) |") and line.endswith(
        "| **.692** / .624 (+.068) |"
    )
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


def test_another_protocol_than_the_papers_stands_beside_no_number_of_the_papers(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", {"fs_sdnet_ra": 0.0})
    paths = build_report(str(run), "Left out", {"date": "2025-01-01", "protocol": "leave_one_vendor_out A"})
    text, html = Path(paths.table_md).read_text(), Path(paths.html).read_text()
    assert "protocol: leave_one_vendor_out A" in text and "leave_one_vendor_out A" in html
    assert "paper" not in text and "Table 1" not in html


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
            fs.write_bytes(fs.join(remote, path.relative_to(local).as_posix()), path.read_bytes())
    paths = build_report(remote, "Remote", {})
    assert fs.read_text(paths.table_csv) == Path(build_report(str(local), "Local", {}).table_csv).read_text()


def test_a_report_of_the_same_run_is_the_same_bytes(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", {"fs_sdnet": 0.0})
    pages = [Path(build_report(str(run), "Twice", {}).html).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def _compared(lift: float, n: int = 8, seeds: int = 3) -> list[str]:
    cases = [
        case
        for seed in range(seeds)
        for arm, more in (("fs_sdnet", 0.0), ("fs_sdnet_ra", lift + 0.001 * seed))
        for case in _cases(arm, "A", seed, more, n)
    ]
    return sentences(compare_arms(cases, [("fs_sdnet_ra", "fs_sdnet")]))


def test_verdicts_are_sentences_with_their_numbers() -> None:
    assert _compared(0.1)[0] == (
        "RA helps on A: +.101 mean Dice [.099, .103] (LV +.10, MYO +.10, RV +.10), n = 8, 3 seeds, p < .001."
    )
    assert _compared(-0.1)[0].startswith(f"RA harms on A: {MINUS}.099 mean Dice [{MINUS}.101, {MINUS}.097]")
    assert _compared(-0.001)[0] == (
        f"RA on A: no evidence either way: .000 mean Dice [{MINUS}.002, .002], n = 8, 3 seeds, p = 1.000."
    )
    assert _compared(0.1, n=3)[0].startswith(
        "RA on A: too few subjects to test (n = 3, 3 seeds, at least 6 needed): +.101"
    )
    assert _compared(0.1, seeds=2)[0].startswith("RA on A (two trainings: descriptive): +.101 mean Dice [")


def test_three_seeds_are_judged_and_what_they_share_is_said(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", {"unet_ra": 0.0, "ss_sdnet_ra_fa": 0.1}, seeds=3)
    paths = build_report(str(run), "Seeds", {"seeds_share_bank": "yes"}, arms=("unet_ra", "ss_sdnet_ra_fa"))
    for page in (unescape(Path(paths.html).read_text()), Path(paths.table_md).read_text()):
        assert "against the reference, U-Net+RA: established (n = 12, 3 seeds an arm, p < .001)" in page
        assert "SS SDNet+RA+FA" in page and "share one SDNet and one bank (seeds_share_bank)" in page
        assert re.search(r"vary as here show a true difference of \.\d+ in four of five", page)
        assert "training: descriptive" not in page


def test_the_reference_may_be_the_best_or_alone() -> None:
    def first(arms: dict[str, float], seeds: int) -> dict[str, Any]:
        cases = [case for arm, lift in arms.items() for seed in range(seeds) for case in _cases(arm, "AD", seed, lift)]
        return first_screen(work_out(cases).ranking, shared_bank=False)

    both = first({"unet_ra": 0.1, "unet_ra_bigaug": 0.0}, 3)
    assert both["best"] == "U-Net+RA" and both["state"] == "worse"
    assert both["answer"].startswith(f"This is the reference. The next, U-Net+RA+BigAug-like: {MINUS}.097 mean Dice [")
    alone = first({"fs_sdnet": 0.0}, 1)["answer"]
    assert alone.endswith("nothing to compare it with (n = 12, 1 seed; one training: descriptive).")


def test_several_seeds_are_a_mean_and_a_standard_deviation(tmp_path: Path) -> None:
    paths = build_report(str(_write_run(tmp_path / "run", {"fs_sdnet": 0.0}, seeds=3)), "Seeds", {})
    line = next(line for line in Path(paths.table_md).read_text().splitlines() if line.startswith("| FS SDNet"))
    assert line.startswith(f"| FS SDNet | .745 ± .020 / .901 ({MINUS}.156) |")
    assert "± .020" in Path(paths.html).read_text()


def test_failures_of_several_arms_are_one_row_and_lost_hearts_are_listed() -> None:
    cases = [*_cases("unet_ra", "D"), *_cases("fs_sdnet", "D"), *_cases("fs_sdnet", "D", seed=1)]
    rows = failures(cases)
    assert [(row["subject"], row["phase"], row["structure"], row["kind"]) for row in rows] == [
        ("D0", "ED", "RV", "missed"),
        ("D0", "ES", "RV", "missed"),
    ]
    assert rows[0]["arms"] == "U-Net+RA, FS SDNet (2 seeds)" and rows[0]["ml"] == 100
    cases[3]["outside"], cases[40]["outside"] = 0.1, 0.3
    assert [row["outside"] for row in cut_off(cases)] == [0.3, 0.1]


def test_the_terminal_table_of_the_whole_ablation_fits_80_columns() -> None:
    from rich.console import Console

    cases = [case for arm in PAPER_DICE for case in _cases(arm, "ABCD")]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_terminal_table(summarise(cases)))
    text = console.export_text()
    assert "SS SDNet+RA+FA" in text and "…" not in text
    assert "one training: descriptive; 10 missed" in text


def test_every_arm_has_a_name_and_a_look_of_its_own() -> None:
    from experiments.arms import ARMS
    from experiments.report.figures import arm_style
    from experiments.report.paper_table import arm_label

    assert len({arm_label(arm) for arm in ARMS} - set(ARMS)) == len(ARMS)
    assert len({arm_style(arm) for arm in ARMS}) == len(ARMS)
