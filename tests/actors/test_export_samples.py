"""Samples on disk: what they hold, that they are the stream's, and that an export goes on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.export_samples import UNIT, export
from actors.extraction import ExtractionActors, extract
from actors.extractor import ExtractionSpec
from actors.waiting import Patience
from pipeline.samples.maker import SampleMaker
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import normalise, stored_statistics, working_slice
from pipeline.samples.stream_config import StreamConfig, open_bank
from storage.errors import FinalError, InputError
from storage.nifti import nnunet
from storage.nifti.file import NiftiFile
from storage.slices.store import SliceStore
from tests.actors.tiny_runs import PREPROCESS, digests, own_processes, write_lender, write_run, write_sdnet


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> StreamConfig:
    folder = tmp_path_factory.mktemp("export")
    run = write_run(folder)
    sdnet = write_sdnet(folder / "sdnet", seed=0)
    extract(ExtractionSpec(run, sdnet, f"{run}/bank.zarr", PREPROCESS, shard_slices=4), ExtractionActors(cpus=0.5))
    return StreamConfig(
        run=run,
        bank=f"{run}/bank.zarr",
        preprocess=PREPROCESS,
        plan=PlanConfig(),
        seed=0,
        semi_supervised=True,
        ra=True,
        fa=True,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def nnunet_folder(stream: StreamConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of twelve labelled samples as nnU-Net's raw data set."""
    out = tmp_path_factory.mktemp("nnunet") / "Dataset503_Tiny"
    assert export(stream, str(out), "nnunet", 12, cpus=0.5) == 12
    return out


@pytest.fixture(scope="module")
def slices_folder(stream: StreamConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of sixteen samples as a slice store."""
    out = tmp_path_factory.mktemp("slices") / "samples"
    assert export(stream, str(out), "slices", 16, cpus=0.5) == 16
    return out


def listed(out: Path) -> list[dict[str, str]]:
    with (out / "samples.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_nnunet_data_set_holds_the_streams_labelled_samples_on_their_own_grid(
    stream: StreamConfig, nnunet_folder: Path
) -> None:
    out = nnunet_folder
    document = json.loads((out / "dataset.json").read_text())
    assert document["numTraining"] == 12 and document["labels"] == {"background": 0, "LV": 1, "MYO": 2, "RV": 3}
    maker = SampleMaker(stream)
    for i, row in enumerate(listed(out)):
        sample = maker.plan.labelled(i)
        image, mask = maker.make(sample)
        with NiftiFile(str(out / "imagesTr" / f"{row['case']}_0000.nii.gz")) as file:
            np.testing.assert_array_equal(file.frame(None)[0], image)
            _, row_mm, col_mm = file.header.spacing_mm
        with NiftiFile(str(out / "labelsTr" / f"{row['case']}.nii.gz")) as file:
            np.testing.assert_array_equal(file.frame(None)[0], mask)
        assert sample.area is not None
        # a pixel of the small grid is that of the plan's native one, shrunk by the same factor
        assert row_mm * col_mm == pytest.approx(sample.area / PREPROCESS.factor**2, rel=1e-4)
        assert (row["kind"] == "fa") == (sample.donor_id is not None) and row["labelled"] == "1"


def test_no_subject_is_in_both_parts_of_an_nnunet_fold(nnunet_folder: Path) -> None:
    subject = {row["case"]: row["subject"] for row in listed(nnunet_folder)}
    for fold in json.loads((nnunet_folder / nnunet.SPLITS).read_text()):
        assert fold["train"] and fold["val"] and len(fold["train"]) + len(fold["val"]) == 12
        assert not {subject[c] for c in fold["train"]} & {subject[c] for c in fold["val"]}


def test_a_slice_store_of_samples_reads_as_the_samples_whatever_the_normalisation(
    stream: StreamConfig, slices_folder: Path
) -> None:
    store, maker = SliceStore.open(str(slices_folder)), SampleMaker(stream)
    planned = [p for step in range(2) for p in maker.plan.samples(step)]
    assert len(store) == 16 and store.column("labelled").sum() == sum(ok for _, ok in planned)
    vendors = {int(row["case"][-6:]): row["vendor"] for row in listed(slices_folder)}
    for i in range(len(store)):
        number = int(store.column("frame")[i])
        sample, labelled = planned[number]
        image, mask = maker.make(sample)
        for kind in ("zscore", "minmax", "percentile", "foreground"):
            config = PREPROCESS.model_copy(update={"normalisation": kind})
            stats = stored_statistics(store, i, config)
            np.testing.assert_allclose(normalise(store.image(i), stats, config), image, atol=1e-4)
        np.testing.assert_array_equal(store.mask(i), mask if labelled else 0 * mask)
        assert store.column("vendor")[i] == vendors[number]
    same = working_slice(store, 0, PREPROCESS.model_copy(update={"size": 48}))
    assert same.area == pytest.approx(float(store.column("pixel_area_mm2")[0]))


def test_samples_with_codes_of_a_lent_bank_name_its_vendor_and_its_terms(stream: StreamConfig, tmp_path: Path) -> None:
    lender = write_lender(str(stream.bank), tmp_path / "lender.zarr", "far", terms="lent for research")
    out = tmp_path / "samples"
    export(stream.model_copy(update={"donors": lender}), str(out), "slices", 16, cpus=0.5)
    drawn = [row for row in listed(out) if row["kind"] == "fa"]
    assert drawn and {row["vendor"] for row in drawn} == {"far"}
    assert "lent for research" in SliceStore.open(str(out)).texts("terms")[0].split("; ")
    with pytest.raises(InputError, match="holds another export"):
        export(stream, str(out), "slices", 16, cpus=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnunet", "slices"])
def test_an_export_that_was_cut_short_goes_on_to_the_same_bytes(
    stream: StreamConfig, tmp_path: Path, kind: Any
) -> None:
    whole, cut = tmp_path / "a" / "Dataset503_Tiny", tmp_path / "b" / "Dataset503_Tiny"
    export(stream, str(whole), kind, 12, cpus=0.5)
    export(stream, str(cut), kind, 12, actors=2, cpus=0.5)
    lost = ("*_0000.nii.gz", "dataset.json") if kind == "nnunet" else ("frames.json", "slices.parquet")
    for pattern in lost:
        for path in sorted(cut.rglob(pattern))[::2]:
            path.unlink()
    export(stream, str(cut), kind, 12, cpus=0.5)
    assert digests(cut) == digests(whole)


@pytest.mark.slow
def test_an_export_whose_actor_is_killed_ends_with_the_same_bytes(stream: StreamConfig, tmp_path: Path) -> None:
    whole, shaken = tmp_path / "a", tmp_path / "b"
    killed: list[int] = []

    def kill(_: str, done: int, total: int) -> None:
        if not killed and done < total:
            killed.extend(own_processes("ray::_Exporter"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    export(stream, str(whole), "slices", 6 * UNIT, cpus=0.5)
    export(stream, str(shaken), "slices", 6 * UNIT, cpus=0.5, progress=kill)
    assert killed and digests(shaken) == digests(whole)


def test_an_export_refuses_a_folder_that_is_not_its_own(
    stream: StreamConfig, slices_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="Dataset501_Heart"):
        export(stream, str(tmp_path / "heart"), "nnunet", 1)
    with pytest.raises(InputError, match="another export"):
        export(stream, str(slices_folder), "slices", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        export(stream, str(tmp_path / "full"), "slices", 2)
    assert open_bank(stream, SliceStore.open(stream.run)) is not None


@pytest.mark.slow
def test_actors_that_no_node_has_room_for_are_given_up(stream: StreamConfig, no_room: None, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(FinalError, match=r"export: waited .* for 0.5 CPUs for an export actor"):
        export(stream, str(tmp_path / "x"), "slices", 2, cpus=0.5, patience=Patience(0.05, lines.append))
    assert lines


def test_nnunets_own_check_accepts_the_data_set(nnunet_folder: Path) -> None:
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    verify.verify_dataset_integrity(str(nnunet_folder), num_processes=1)
