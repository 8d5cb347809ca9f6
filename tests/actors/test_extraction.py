from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors.extraction import ExtractionActors, ExtractionReport, extract
from actors.extractor import ExtractionSpec, Extractor
from actors.waiting import Patience
from pipeline.networks.files import load_decoder, load_sdnet, save_model
from pipeline.samples.preprocess import canvas_size, centre_on, working_slice
from pipeline.samples.rescale import resample_crop
from storage import fs
from storage.bank.anatomy_codec import unpack
from storage.bank.bank import FactorBank
from storage.bank.index import slice_keys
from storage.bank.verify import verify
from storage.errors import InputError, StageError
from storage.lock import lock
from storage.slices.store import SliceStore
from storage.subjects import SLICE_SCHEMA
from tests.actors.tiny_runs import PREPROCESS, SUBJECTS, digests, filled_bank, own_processes, write_run, write_sdnet

TRAIN_SLICES, SHARD = 13, 3

Extract = Callable[..., ExtractionReport]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sdnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sdnet(tmp_path_factory.mktemp("network") / "sdnet", seed=1)


@pytest.fixture(scope="module")
def fill(ray_local: None, run: str, sdnet: str) -> Extract:
    """`extract` of the module's run into a bank, with what a test wants otherwise."""

    spec = ExtractionSpec(run, sdnet, "", PREPROCESS, shard_slices=SHARD)

    def call(bank: Path | str, count: int = 1, cpus: float = 0.5, **changes: Any) -> ExtractionReport:
        told = {name: changes.pop(name) for name in ("progress", "patience") if name in changes}
        return extract(replace(spec, bank=str(bank), **changes), ExtractionActors(count, cpus), **told)

    return call


@pytest.fixture(scope="module")
def whole(fill: Extract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank that one actor makes."""
    bank = tmp_path_factory.mktemp("banks") / "bank.zarr"
    report = fill(bank)
    assert (report.slices, report.shards_done, report.shards_reused) == (TRAIN_SLICES, 5, 0)
    return bank


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bank.zarr"))


def test_the_bank_is_complete_clean_and_alone(whole: Path) -> None:
    bank = FactorBank.open(str(whole))
    assert verify(bank) == []
    assert bank.spec.terms == ("terms of A", "terms of B", "terms of C")
    assert [p.name for p in whole.parent.iterdir()] == ["bank.zarr"]


def test_only_training_slices_enter(whole: Path, run: str) -> None:
    index, store = FactorBank.open(str(whole)).index, SliceStore.open(run)
    train = np.flatnonzero(store.column("split") == "train")
    assert slice_keys(index) == slice_keys(store.table.take(train))
    assert set(index["split"].to_pylist()) == {"train"}
    assert set(index["subject"].to_pylist()) == {"a1", "b1", "c1"}


@pytest.mark.slow
def test_unseen_images_replaced_by_others_leave_every_byte_as_it_is(fill: Extract, whole: Path, tmp_path: Path) -> None:
    fill(tmp_path / "bank.zarr", run=write_run(tmp_path / "other", unseen_seed=99))
    assert digests(tmp_path / "bank.zarr") == digests(whole)


@pytest.mark.parametrize("actors", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_actors_write_the_same_bytes_as_one(fill: Extract, whole: Path, tmp_path: Path, actors: int) -> None:
    fill(tmp_path / "bank.zarr", count=actors)
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_anatomy_is_of_the_whole_field_and_modality_of_the_training_crop(whole: Path, run: str, sdnet: str) -> None:
    bank, store, model = FactorBank.open(str(whole)), SliceStore.open(run), load_sdnet(sdnet)
    found, (height, width) = bank.load(), bank.spec.canvas
    assert height % 16 == 0 and width % 16 == 0
    assert len(np.unique(found.anatomy)) > 3
    in_store = slice_keys(store.table)
    for row in bank.index.to_pylist():
        i, top, left = row["row"], row["top"], row["left"]
        slice_id = in_store.index((row["subject"], row["frame"], row["slice"]))
        working = working_slice(store, slice_id, PREPROCESS)
        inside = (slice(top, top + row["height"]), slice(left, left + row["width"]))
        own = canvas_size(store, [slice_id], PREPROCESS)  # whatever else is in the bank
        canvas, y, x = centre_on(working.image, own, float(working.image.min()))
        crop, _ = resample_crop(working.image, working.mask, 1.0, PREPROCESS.size, float(working.image.min()))
        with torch.inference_mode():
            anatomy = model.encode_anatomy(torch.from_numpy(canvas)[None, None])[0].numpy()
        expected = np.zeros((8, height, width))
        expected[:, *inside] = anatomy[:, y : y + row["height"], x : x + row["width"]]
        with torch.inference_mode():
            modality = model.encode_modality(torch.from_numpy(crop)[None, None])[0].numpy()
        # Another batch size and memory format: a few pixels near one half may flip.
        assert (unpack(found.anatomy[i], 8) == expected).mean() > 0.999
        assert np.allclose(found.modality[i], modality, atol=1e-5)
        assert np.array_equal(found.mask[i][inside], working.mask)
        assert found.mask[i].sum() == working.mask.sum()
        assert row["pixel_area_mm2"] == pytest.approx(working.area)
        assert (row["native_height"], row["native_width"]) == store.image(slice_id).shape


def test_the_bank_alone_decodes_as_the_network_does(whole: Path, sdnet: str) -> None:
    bank, model = FactorBank.open(str(whole)), load_sdnet(sdnet)
    found = bank.read([2, 11])
    anatomy = torch.from_numpy(unpack(found.anatomy[:1], bank.spec.channels)).float()
    modality = torch.from_numpy(found.modality[1:])
    with torch.inference_mode():
        assert torch.equal(load_decoder(*bank.decoder())(anatomy, modality), model.decode(anatomy, modality))


def test_a_shard_that_cannot_be_read_leaves_those_in_flight_beside_it_whole(
    ray_local: None, run: str, sdnet: str, whole: Path, copy: Path, tmp_path: Path
) -> None:
    for entry in (copy / "ledger").iterdir():
        entry.unlink()
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    image = next(p for p in (damaged / "slices.zarr").rglob("b1*/**/c/**/*") if p.is_file())
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    actor = Extractor(ExtractionSpec(str(damaged), sdnet, str(copy), PREPROCESS))

    def refused(shard: int) -> bool:
        try:
            actor.extract(shard)
        except InputError:
            return True
        return False

    index = FactorBank.open(str(copy), partial=True).index
    of_b1 = {row // SHARD for row, subject in enumerate(index["subject"].to_pylist()) if subject == "b1"}
    for _ in range(2):
        with ThreadPoolExecutor(3) as calls:
            answers = list(calls.map(refused, range(5)))
        assert {shard for shard, answer in enumerate(answers) if answer} == of_b1
        assert FactorBank.open(str(copy), partial=True).committed() == set(range(5)) - of_b1
    image.write_bytes(content)
    assert not any(refused(shard) for shard in of_b1)
    FactorBank.open(str(copy), partial=True).seal()  # as the driver does in the end
    assert digests(copy) == digests(whole)


def test_a_shard_without_ledger_entry_is_made_again_and_no_other(fill: Extract, whole: Path, copy: Path) -> None:
    (copy / "ledger" / "shard-00003.json").unlink()
    chunk = copy / "anatomy" / "c" / "3" / "0" / "0"
    chunk.write_bytes(b"half of it")
    kept = (copy / "anatomy" / "c" / "2" / "0" / "0").stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    report = fill(copy, progress=lambda _, done, total: told.append((done, total)))
    assert (report.shards_done, report.shards_reused) == (1, 4)
    assert told == [(TRAIN_SLICES - SHARD, TRAIN_SLICES), (TRAIN_SLICES, TRAIN_SLICES)]
    assert digests(copy) == digests(whole)
    assert (copy / "anatomy" / "c" / "2" / "0" / "0").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_subjects_that_a_run_gains_are_appended_as_if_they_had_been_there(
    fill: Extract, whole: Path, tmp_path: Path
) -> None:
    bank, first = tmp_path / "bank.zarr", SUBJECTS[:1]
    assert fill(bank, run=write_run(tmp_path / "data", made=first)).slices == 5
    kept = (bank / "anatomy" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    report = fill(bank, run=write_run(tmp_path / "data"))
    assert (report.slices, report.shards_done, report.shards_reused) == (TRAIN_SLICES, 4, 1)
    assert digests(bank) == digests(whole)
    assert (bank / "anatomy" / "c" / "0" / "0" / "0").stat().st_mtime_ns == kept


def test_a_finished_bank_is_left_as_it_is_and_its_ledger_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, run = filled_bank(tmp_path / "made")
    spec = ExtractionSpec(run, str(tmp_path / "made" / "sdnet"), bank.uri, PREPROCESS)
    assert extract(spec).shards_reused == bank.shards()  # which writes the manifest
    before, read_bytes = digests(Path(bank.uri)), fs.read_bytes
    read: list[str] = []

    def watched(uri: str) -> bytes:
        read.append(uri)
        return read_bytes(uri)

    monkeypatch.setattr(fs, "read_bytes", watched)
    report = extract(spec)
    assert (report.shards_done, report.shards_reused) == (0, bank.shards())
    assert digests(Path(bank.uri)) == before
    assert not [uri for uri in read if "/ledger/" in uri]


@pytest.mark.slow
def test_bank_is_byte_identical_after_a_killed_extractor(fill: Extract, whole: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    told: list[int] = []

    def kill(_: str, done: int, total: int) -> None:
        told.append(done)
        if done and not killed:
            killed.extend(own_processes("ray::Extractor"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    fill(tmp_path / "bank.zarr", progress=kill)
    assert killed
    assert told[0] == 0 and told[-1] == TRAIN_SLICES and told == sorted(told)  # lost work is not counted backwards
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_another_sdnet_is_refused_and_nothing_changes(fill: Extract, copy: Path, tmp_path: Path) -> None:
    before = digests(copy)
    with pytest.raises(InputError, match=r"^bank\.zarr: was made with SDNet"):
        fill(copy, sdnet_dir=write_sdnet(tmp_path / "sdnet", seed=2))
    assert digests(copy) == before


def test_a_network_that_gives_no_numbers_is_one_clear_line(fill: Extract, sdnet: str, tmp_path: Path) -> None:
    model = load_sdnet(sdnet)
    with torch.no_grad():
        model.modality_encoder[-1].bias.fill_(float("nan"))  # type: ignore[operator]
    save_model(str(tmp_path / "sdnet"), model, model.config, PREPROCESS.model_dump(), ["terms"])
    with pytest.raises(InputError, match=r"^sdnet: its modality is not finite"):
        fill(tmp_path / "bank.zarr", sdnet_dir=str(tmp_path / "sdnet"))
    assert FactorBank.open(str(tmp_path / "bank.zarr"), partial=True).committed() == set()


def test_factors_of_another_precision_are_refused(fill: Extract, copy: Path) -> None:
    with pytest.raises(InputError, match=r"was made with SDNet (\w+), not \1-bf16"):
        fill(copy, precision="bf16")


def test_what_goes_wrong_while_writing_ends_extraction_and_names_the_shard(fill: Extract, copy: Path) -> None:
    (copy / "ledger" / "shard-00003.json").unlink()
    shutil.rmtree(copy / "mask" / "c" / "3")
    (copy / "mask" / "c" / "3").write_text("where a folder is to be")
    with pytest.raises(
        StageError, match=r"^bank\.zarr, shard 3 \(3 slices, c1 frame 0 slice 0 to c1 frame 0 slice 2\): "
    ):
        fill(copy)


def test_another_preprocessing_is_refused(fill: Extract, copy: Path) -> None:
    with pytest.raises(InputError, match="its preprocess is"):
        fill(copy, preprocess=PREPROCESS.model_copy(update={"clip_sigma": 2.5}))


def test_a_second_driver_on_the_same_bank_is_refused(fill: Extract, copy: Path) -> None:
    with lock(f"{copy}.lock", "bank.zarr"), pytest.raises(InputError, match=f"worked on by process {os.getpid()}"):
        fill(copy)


def test_a_second_driver_on_a_bank_in_an_object_store_is_refused(
    fill: Extract, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.lease.LEASE_S", 4.0)
    bank = "s3://bucket/locked/bank.zarr"
    with lock(f"{bank}.lock", "bank.zarr"), pytest.raises(InputError, match=f"worked on by process {os.getpid()}"):
        fill(bank)


def test_a_cluster_too_small_is_told_at_once(fill: Extract, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an extraction actor needs 64 CPUs, the cluster has 4"):
        fill(tmp_path / "bank.zarr", cpus=64.0)


@pytest.mark.slow
def test_more_actors_than_the_cluster_holds_are_not_waited_for(fill: Extract, whole: Path, tmp_path: Path) -> None:
    fill(tmp_path / "bank.zarr", count=5, cpus=3.0)
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_a_run_with_nothing_to_train_on_is_refused(fill: Extract, tmp_path: Path) -> None:
    run = write_run(tmp_path / "data")
    table = SliceStore.open(run).table
    at, tests = table.column_names.index("split"), pa.array(["test"] * len(table))
    pq.write_table(table.set_column(at, SLICE_SCHEMA.field("split"), tests), f"{run}/slices.parquet")
    with pytest.raises(InputError, match="no training slices"):
        fill(tmp_path / "bank.zarr", run=run)
    assert not (tmp_path / "bank.zarr").exists()


@pytest.mark.slow
def test_extraction_actors_that_no_node_has_room_for_are_given_up(fill: Extract, no_room: None, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(StageError, match=r"extract: waited .* for 0.5 CPUs for an extraction actor"):
        fill(tmp_path / "bank.zarr", patience=Patience(0.05, lines.append))
    assert lines
