"""The whole flow on a small phantom: a real local Ray, real training, a real MLflow database."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.config import load
from experiments.run.preview import mosaic_png
from storage.errors import InputError
from storage.slices.store import subject_folder

PAPER = ("unet_ra", "fs_sdnet", "fs_sdnet_ra", "ss_sdnet_ra", "ss_sdnet_ra_fa")
ARMS = ("unet_ra", "ss_sdnet_ra_fa")  # both networks, and all that an arm can need; the slow test trains the five
TINY = (
    "phantom.labelled_a=3",
    "phantom.labelled_b=3",
    "phantom.unlabelled_c=2",
    "phantom.testing=1",
    "phantom.frames=3",
    "phantom.slices=[3,3]",
    "preprocess.size=64",
    "unet.width=4",
    "sdnet.anatomy_width=4",
    "sdnet.modality_width=4",
    "sdnet.segmentor_width=4",
    "sdnet.decoder_width=4",
    "train.epochs=2",
    "train.steps_per_epoch=5",
    "pretrain.epochs=1",
    "pretrain.steps_per_epoch=4",
    "bank_shard=8",
)


def cardiomix(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=cwd)


PLACE, REMARK = "folder-of-mrs-smith", "remark-of-dr-jones"  # what must not get about


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom in a telling folder, with telling headers, and one subject that is cut off."""
    folder = tmp_path_factory.mktemp("data") / PLACE / "mnms"
    fields = [part for a in TINY if a.startswith("phantom.") for part in ("--set", a.removeprefix("phantom."))]
    done = cardiomix("phantom", str(folder), *fields)
    assert done.returncode == 0, done.stderr
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        image.header["descrip"] = REMARK
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", REMARK.encode()))
        nib.save(image, path)
    victim = next((folder / "Training" / "Unlabeled").glob("*/*_sa.nii.gz"))
    victim.write_bytes(victim.read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the ablation printed."""
    return []


def ablated(folder: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A tiny ablation that ended well."""
    sets = [part for assignment in TINY for part in ("--set", assignment)]
    # a relative path, as a user types it; Ray's workers have working directories of their own
    done = cardiomix("ablate", "demo", "--data", str(data), "--run", folder.name, *sets, *options, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path, said: list[str]) -> Path:
    """A finished tiny ablation of two arms, made by the command line."""
    folder = tmp_path_factory.mktemp("ablation") / "tiny"
    done = ablated(folder, data, "--arms", ",".join(ARMS))
    assert "SS SDNet+RA+FA" in done.stdout
    assert "mlflow ui" in done.stdout
    said += [done.stdout, done.stderr]
    return folder


@pytest.mark.timeout(600)
def test_arms_are_trained_with_equal_steps_and_scored_by_vendor(run: Path) -> None:
    trained_with_equal_steps(run, ARMS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_five_arms_are_trained_with_equal_steps_and_scored_by_vendor(tmp_path: Path, data: Path) -> None:
    ablated(tmp_path / "five", data)
    trained_with_equal_steps(tmp_path / "five", PAPER)


def trained_with_equal_steps(run: Path, arms: tuple[str, ...]) -> None:
    for arm in arms:
        done = json.loads((run / "arms" / arm / "seed0" / "done.json").read_text())
        assert done["steps"] == 10
    with (run / "report" / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    assert {(c["arm"], c["vendor"]) for c in cases} == {(arm, vendor) for arm in arms for vendor in "ABCD"}
    assert {c["phase"] for c in cases} == {"ED", "ES"}
    assert all(0 <= float(c["dice"]) <= 1 or np.isnan(float(c["dice"])) for c in cases)
    for name in ("index.html", "table.csv", "table.md"):
        assert (run / "report" / name).stat().st_size > 200


def test_no_test_or_validation_subject_is_in_the_bank(run: Path) -> None:
    from storage.bank.bank import FactorBank
    from storage.bank.verify import verify
    from storage.slices.store import SliceStore

    store = SliceStore.open(str(run))
    split_of = dict(zip(store.column("subject").tolist(), store.column("split").tolist(), strict=True))
    bank = FactorBank.open(str(run / "bank.zarr"))
    assert {split_of[s] for s in bank.index["subject"].to_pylist()} == {"train"}
    assert verify(bank) == []
    assert set(bank.index["vendor"].to_pylist()) == {"A", "B", "C"}


def test_mlflow_holds_a_parent_and_a_child_for_each_arm(run: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    children = {r.data.tags["arm"]: r for r in runs if "arm" in r.data.tags}
    assert set(children) == {*ARMS, "pretrain"}
    fa = children["ss_sdnet_ra_fa"].data
    assert {"dice/D/LV", "val/dice", "loss/total", "data_wait_fraction"} <= set(fa.metrics)
    assert fa.tags["bank_fingerprint"]
    watched = {"factors/code_spread", "factors/dead_channels", "factors/distance_correlation", "factors/swap_error"}
    assert watched <= set(fa.metrics) and "factors/code_spread" not in children["unet_ra"].data.metrics
    assert 0 <= fa.metrics["factors/vendor_modality"] <= 1 and 0 <= fa.metrics["factors/vendor_anatomy"] <= 1
    assert len(client.get_metric_history(children["unet_ra"].info.run_id, "val/dice")) == 2


@pytest.mark.slow
def test_a_second_start_reuses_every_stage_and_gives_the_same_table(run: Path) -> None:
    table = (run / "report" / "table.csv").read_bytes()
    kept = {p: p.stat().st_mtime_ns for p in run.glob("arms/*/seed0/model.safetensors")}
    again = cardiomix("ablate", str(run / "config.yaml"), "--run", str(run))
    assert again.returncode == 0, again.stderr
    assert (run / "report" / "table.csv").read_bytes() == table
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.slow
def test_scoring_every_arm_again_gives_the_same_scores(run: Path) -> None:
    tables = {path: path.read_bytes() for arm in ARMS for path in (run / "arms" / arm / "seed0").glob("*.csv")}
    assert len(tables) == 3 * len(ARMS)  # cases, slices, trust
    for path in tables:
        path.unlink()  # so that it must be written again
    done = cardiomix("evaluate", "--run", str(run))
    assert done.returncode == 0, done.stderr
    assert [f"{arm}/seed0: " in done.stderr for arm in ARMS] == [True] * len(ARMS) and "✓ score" in done.stderr
    assert {path: path.read_bytes() for path in tables} == tables


def test_status_says_what_is_done(run: Path) -> None:
    done = cardiomix("status", "--run", str(run))
    assert done.returncode == 0
    assert done.stdout.count("done") >= len(ARMS) + 3


def test_a_picture_of_one_vendors_anatomy_shows_no_image_of_another(run: Path, tmp_path: Path) -> None:
    copy, settings = Path(shutil.copytree(run, tmp_path / "copy")), load(str(run))
    index = pq.read_table(copy / "slices.parquet").to_pylist()
    for subject in {row["subject"] for row in index if row["vendor"] != "A"}:
        shutil.rmtree(subject_folder(str(copy), subject))
    assert mosaic_png(str(copy), settings, 1, "A") == mosaic_png(str(run), settings, 1, "A")
    with pytest.raises(InputError, match="--anatomy Q: the bank has no such vendor's slice"):
        mosaic_png(str(run), settings, 1, "Q")


@pytest.mark.slow
def test_what_is_made_anew_is_said_before_it_is_made(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    options = ("--arms", "unet_ra", "--set", "train.epochs=1")
    done = cardiomix("ablate", str(copy / "config.yaml"), "--run", str(copy), *options)
    assert done.returncode == 0, done.stderr
    assert "made anew, since the configuration, data or bank are others now: unet_ra/seed0" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_dry_run_says_what_is_done_and_what_a_changed_setting_makes_anew(run: Path) -> None:
    def said(*arguments: str) -> dict[str, str]:
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        done = cardiomix("ablate", str(run / "config.yaml"), "--run", str(run), "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
        lines = [line.strip().partition("  ") for line in done.stdout.splitlines() if line.startswith("  ")]
        return {name: state.strip() for name, _, state in lines} | {"time": done.stdout}

    same = said()
    assert [same[f"{arm}/seed0"] for arm in ARMS] == ["done"] * len(ARMS)
    assert same["pretrain"] == "done" and same["extract"].startswith("done") and same["ingest"].startswith("done")
    assert "time: nothing is left to train" in same["time"]
    longer = said("--set", "train.epochs=3")
    assert all(longer[f"{arm}/seed0"].startswith("made anew") for arm in ARMS)
    assert longer["pretrain"] == "done" and longer["extract"].startswith("done")
    other = said("--set", "pretrain.epochs=2")
    assert other["pretrain"].startswith("made anew") and other["extract"].startswith("to do anew")
    assert other["ss_sdnet_ra_fa/seed0"].startswith("made anew") and other["unet_ra/seed0"] == "done"


def test_a_prediction_lies_on_the_grid_of_its_image(run: Path, data: Path, tmp_path: Path) -> None:
    image = next((data / "Testing").glob("*/*_sa.nii.gz"))
    done = cardiomix("predict", str(run / "arms" / "unet_ra" / "seed0"), str(image), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    ours, theirs = nib.load(tmp_path / f"{image.name[:-7]}_pred.nii.gz"), nib.load(image)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert set(np.unique(np.asarray(ours.dataobj))) <= {0, 1, 2, 3}
    assert REMARK.encode() not in gzip.decompress((tmp_path / f"{image.name[:-7]}_pred.nii.gz").read_bytes())


def test_folders_and_headers_of_the_data_reach_no_store_page_database_or_terminal(run: Path, said: list[str]) -> None:
    assert "skipped" in said[1] and "is damaged or cut off" in said[1]
    for words in said:
        assert PLACE not in words and REMARK not in words
    for path in run.rglob("*"):
        if path.is_file() and path != run / "config.yaml":  # which repeats the run, and so names its data
            content = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
            assert PLACE.encode() not in content and REMARK.encode() not in content, path.relative_to(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bank_and_its_sdnet_serve_another_hospitals_subjects(run: Path, tmp_path: Path) -> None:
    fields = [part for a in TINY if a.startswith("phantom.") for part in ("--set", a.removeprefix("phantom."))]
    assert cardiomix("phantom", str(tmp_path / "theirs"), "--seed", "77", *fields).returncode == 0
    sets = [part for assignment in TINY for part in ("--set", assignment)]
    again = tmp_path / "again"
    command = [
        "ablate",
        "demo",
        "--data",
        str(tmp_path / "theirs"),
        "--run",
        str(again),
        "--arms",
        "unet_ra_fa_residual",
    ]
    refused = cardiomix(*command, "--bank", str(run / "bank.zarr"), *sets)
    assert refused.returncode == 2 and "pass the SDNet that filled the bank too" in refused.stderr
    done = cardiomix(*command, "--bank", str(run / "bank.zarr"), "--sdnet", str(run / "sdnet"), *sets)
    assert done.returncode == 0, done.stderr
    assert (again / "bank.zarr").exists() and not (again / "sdnet").exists()
    theirs = set(pq.read_table(again / "bank.zarr" / "index.parquet")["subject"].to_pylist())
    assert not theirs & set(pq.read_table(run / "bank.zarr" / "index.parquet")["subject"].to_pylist())
    status = cardiomix("status", "--run", str(again))
    assert "unet_ra_fa_residual" in status.stdout and "done" in status.stdout


@pytest.mark.slow
def test_a_copied_bank_trains_an_fa_arm_when_the_run_that_made_it_is_gone(
    run: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "bank.zarr", tmp_path / "elsewhere" / "factors.zarr")
    sets = [part for assignment in TINY for part in ("--set", assignment)]
    gone = run.rename(run.with_name("gone"))
    try:
        bank, again = str(tmp_path / "elsewhere" / "factors.zarr"), tmp_path / "again"
        places = ("--data", str(data), "--run", str(again), "--bank", bank)
        done = cardiomix("ablate", "demo", *places, "--arms", "ss_sdnet_ra_fa", *sets)
    finally:
        gone.rename(run)
    assert done.returncode == 0, done.stderr
    assert not (again / "sdnet").exists() and not (again / "bank.zarr").exists()
    assert json.loads((again / "arms" / "ss_sdnet_ra_fa" / "seed0" / "done.json").read_text())["steps"] == 10
