from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors.extraction import ExtractionReport, extract
from pipeline.networks.files import load_decoder, load_sdnet, save_model
from pipeline.networks.sdnet import SDNet, SDNetConfig
from pipeline.preprocess import PreprocessConfig, working_slice
from pipeline.rescale import resample_crop
from storage.anatomy_codec import unpack
from storage.errors import InputError
from storage.factor_bank import FactorBank
from storage.nifti import write_volume
from storage.run_lock import lock
from storage.slice_store import SliceStore, finalise, write_subject
from storage.subjects import FrameSource, Subject

PREPROCESS = PreprocessConfig(size=32, field=48)
# name, vendor, split, labelled, slices, (height, width), (row, column) in mm
SUBJECTS = (
    ("a1", "A", "train", True, 5, (60, 50), (1.4, 1.4)),
    ("b1", "B", "train", True, 4, (51, 77), (1.5, 1.2)),
    ("c1", "C", "train", False, 4, (40, 40), (1.0, 1.0)),
    ("d1", "D", "test", True, 3, (96, 96), (0.8, 0.8)),
    ("v1", "A", "validation", True, 3, (60, 50), (1.4, 1.4)),
    ("x1", "C", "excluded", True, 3, (60, 50), (1.4, 1.4)),
)
TRAIN_SLICES, SHARD = 13, 3

Extract = Callable[..., ExtractionReport]


def write_run(folder: Path, seed: int = 0, unseen_seed: int = 1) -> str:
    """A slice store of smooth noise; `unseen_seed` draws the subjects that are not for training."""
    subjects, rows = [], {}
    for number, (name, vendor, split, labelled, slices, shape, (row_mm, col_mm)) in enumerate(SUBJECTS):
        rng = np.random.default_rng([seed if split == "train" else unseen_seed, number])
        spacing = (8.0, row_mm, col_mm)
        image = (100 * rng.random((slices, *shape))).cumsum(axis=1).cumsum(axis=2) / shape[0]
        files = folder / "nifti"
        files.mkdir(parents=True, exist_ok=True)
        write_volume(str(files / f"{name}.nii.gz"), image.round(), spacing, np.int16)
        if labelled:
            mask = np.broadcast_to(np.arange(shape[1]) * 4 // shape[1], image.shape)
            write_volume(str(files / f"{name}_gt.nii.gz"), mask, spacing, np.uint8)
        gt = str(files / f"{name}_gt.nii.gz") if labelled else None
        source = FrameSource("ED", 0, str(files / f"{name}.nii.gz"), None, gt, None)
        labels = ((1, 1), (2, 2), (3, 3))
        terms = f"terms of {vendor}"
        # The masks are stripes, not hearts.
        made = Subject(name, "table", vendor, "X", (source,), split, "given", labels, terms, check_masks=False)
        subjects.append(made)
        rows[name] = write_subject(str(folder / "run"), subjects[-1])
    finalise(str(folder / "run"), rows, [], subjects)
    return str(folder / "run")


def write_sdnet(folder: Path, seed: int, channels: int = 8) -> str:
    config = SDNetConfig(
        anatomy_width=4, anatomy_channels=channels, modality_width=4, segmentor_width=4, decoder_width=4, style_width=8
    )
    torch.manual_seed(seed)
    model = SDNet(config)
    with torch.no_grad():  # an untrained softmax over eight channels seldom passes one half
        for parameter in model.anatomy_encoder.parameters():
            parameter.mul_(3.0)
    save_model(str(folder), model, config, PREPROCESS.model_dump(), ["terms"])
    return str(folder)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def own_extractors() -> list[int]:
    """Process ids of the extractors among this process's descendants; of nobody else's Ray."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, names[int(folder.name)] = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, name in names.items() if name.startswith("ray::Extractor") and mine(pid)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sdnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sdnet(tmp_path_factory.mktemp("network") / "sdnet", seed=1)


@pytest.fixture(scope="module")
def fill(ray_local: None, run: str, sdnet: str) -> Extract:
    """`extract` of the module's run into a bank, with what a test wants otherwise."""

    def call(bank: Path, **changes: object) -> ExtractionReport:
        arguments = {"run": run, "sdnet_dir": sdnet, "preprocess": PREPROCESS} | {"num_cpus": 0.5} | changes
        return extract(bank_uri=str(bank), shard_slices=SHARD, **arguments)  # type: ignore[arg-type]

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
    assert bank.verify() == []
    assert bank.spec.terms == ("terms of A", "terms of B", "terms of C")
    assert [p.name for p in whole.parent.iterdir()] == ["bank.zarr"]


def test_only_training_slices_enter(whole: Path, run: str) -> None:
    index, store = FactorBank.open(str(whole)).index, SliceStore.open(run)
    train = np.flatnonzero(store.column("split") == "train")
    assert index["slice_id"].to_pylist() == train.tolist()
    assert set(index["split"].to_pylist()) == {"train"}
    assert set(index["subject"].to_pylist()) == {"a1", "b1", "c1"}


def test_unseen_images_replaced_by_others_leave_every_byte_as_it_is(fill: Extract, whole: Path, tmp_path: Path) -> None:
    fill(tmp_path / "bank.zarr", run=write_run(tmp_path / "other", unseen_seed=99))
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_two_actors_write_the_same_bytes_as_one(fill: Extract, whole: Path, tmp_path: Path) -> None:
    fill(tmp_path / "bank.zarr", actors=2)
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_anatomy_is_of_the_whole_field_and_modality_of_the_training_crop(whole: Path, run: str, sdnet: str) -> None:
    bank, store, model = FactorBank.open(str(whole)), SliceStore.open(run), load_sdnet(sdnet)
    found, (height, width) = bank.load(), bank.spec.canvas
    assert height % 16 == 0 and width % 16 == 0
    assert len(np.unique(found.anatomy)) > 4
    for row in bank.index.to_pylist():
        i, top, left = row["row"], row["top"], row["left"]
        working = working_slice(store, row["slice_id"], PREPROCESS)
        inside = (slice(top, top + row["height"]), slice(left, left + row["width"]))
        canvas = np.full((height, width), working.image.min(), dtype=np.float32)
        canvas[inside] = working.image
        crop, _ = resample_crop(working.image, working.mask, 1.0, PREPROCESS.size, float(working.image.min()))
        with torch.inference_mode():
            anatomy = model.encode_anatomy(torch.from_numpy(canvas)[None, None])[0].numpy()
            modality = model.encode_modality(torch.from_numpy(crop)[None, None])[0].numpy()
        # Another batch size and memory format: a few pixels near one half may flip.
        assert (unpack(found.anatomy[i], 8) == anatomy).mean() > 0.999
        assert np.allclose(found.modality[i], modality, atol=1e-5)
        assert np.array_equal(found.mask[i][inside], working.mask)
        assert found.mask[i].sum() == working.mask.sum()
        assert row["pixel_area_mm2"] == pytest.approx(working.area)
        assert (row["native_height"], row["native_width"]) == store.image(row["slice_id"]).shape


def test_the_bank_alone_decodes_as_the_network_does(whole: Path, sdnet: str) -> None:
    bank, model = FactorBank.open(str(whole)), load_sdnet(sdnet)
    found = bank.read([2, 11])
    anatomy = torch.from_numpy(unpack(found.anatomy[:1], bank.spec.channels)).float()
    modality = torch.from_numpy(found.modality[1:])
    with torch.inference_mode():
        assert torch.equal(load_decoder(*bank.decoder())(anatomy, modality), model.decode(anatomy, modality))


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


def test_a_finished_bank_is_left_as_it_is(fill: Extract, whole: Path) -> None:
    report = fill(whole)
    assert (report.shards_done, report.shards_reused) == (0, 5)


def test_bank_is_byte_identical_after_a_killed_extractor(fill: Extract, whole: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_: str, done: int, total: int) -> None:
        if done and not killed:
            killed.extend(own_extractors())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    fill(tmp_path / "bank.zarr", progress=kill)
    assert killed
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


def test_another_preprocessing_is_refused(fill: Extract, copy: Path) -> None:
    with pytest.raises(InputError, match="its preprocess is"):
        fill(copy, preprocess=PREPROCESS.model_copy(update={"clip_sigma": 2.5}))


def test_a_second_driver_on_the_same_bank_is_refused(fill: Extract, copy: Path) -> None:
    with lock(f"{copy}.lock", "bank.zarr"), pytest.raises(InputError, match=f"worked on by process {os.getpid()}"):
        fill(copy)


def test_a_cluster_too_small_is_told_at_once(fill: Extract, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs 64 CPUs an actor"):
        fill(tmp_path / "bank.zarr", num_cpus=64.0)


def test_more_actors_than_the_cluster_holds_are_not_waited_for(fill: Extract, whole: Path, tmp_path: Path) -> None:
    fill(tmp_path / "bank.zarr", actors=5, num_cpus=3.0)
    assert digests(tmp_path / "bank.zarr") == digests(whole)


def test_a_run_with_nothing_to_train_on_is_refused(fill: Extract, tmp_path: Path) -> None:
    run = write_run(tmp_path / "data")
    table = SliceStore.open(run).table
    at, tests = table.column_names.index("split"), pa.array(["test"] * len(table))
    pq.write_table(table.set_column(at, table.schema.field("split"), tests), f"{run}/slices.parquet")
    with pytest.raises(InputError, match="no training slices"):
        fill(tmp_path / "bank.zarr", run=run)
    assert not (tmp_path / "bank.zarr").exists()
