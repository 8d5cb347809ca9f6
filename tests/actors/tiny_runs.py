"""Tiny runs and networks to extract from, and how to find the extractors and compare banks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.extraction import prepare_bank
from actors.extractor import ExtractionSpec
from pipeline.factors.extract import FrozenSDNet, bank_row, view
from pipeline.networks.config import SDNetConfig
from pipeline.networks.files import load_sdnet, save_model
from pipeline.networks.sdnet import SDNet
from pipeline.samples.preprocess import PreprocessConfig
from storage.bank.bank import FactorBank
from storage.bank.index import slice_keys
from storage.nifti.write import write_volume
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject
from storage.subjects import FrameSource, Subject

Made = tuple[str, str, str, bool, int, tuple[int, int], tuple[float, float]]

PREPROCESS = PreprocessConfig(size=32, field=48)
# name, vendor, split, labelled, slices, (height, width), (row, column) in mm
SUBJECTS: tuple[Made, ...] = (
    ("a1", "A", "train", True, 5, (60, 50), (1.4, 1.4)),
    ("b1", "B", "train", True, 4, (51, 77), (1.5, 1.2)),
    ("c1", "C", "train", False, 4, (40, 40), (1.0, 1.0)),
    ("d1", "D", "test", True, 3, (96, 96), (0.8, 0.8)),
    ("v1", "A", "validation", True, 3, (60, 50), (1.4, 1.4)),
    ("x1", "C", "excluded", True, 3, (60, 50), (1.4, 1.4)),
)


def write_run(folder: Path, seed: int = 0, unseen_seed: int = 1, made: Sequence[Made] = SUBJECTS) -> str:
    """A slice store of smooth noise; `unseen_seed` draws the subjects that are not for training."""
    subjects, rows = [], {}
    for number, (name, vendor, split, labelled, slices, shape, (row_mm, col_mm)) in enumerate(made):
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
        subject = Subject(name, "table", vendor, "X", (source,), split, "given", labels, terms, check_masks=False)
        subjects.append(subject)
        rows[name] = write_subject(str(folder / "run"), subject)
    finalise(str(folder / "run"), rows, [], subjects)
    return str(folder / "run")


def write_sdnet(folder: Path, seed: int, channels: int = 8, width: int = 4) -> str:
    config = SDNetConfig(
        anatomy_width=width,
        anatomy_channels=channels,
        modality_width=width,
        segmentor_width=4,
        decoder_width=4,
        style_width=8,
    )
    torch.manual_seed(seed)
    model = SDNet(config)
    with torch.no_grad():  # an untrained softmax over eight channels seldom passes one half
        for parameter in model.anatomy_encoder.parameters():
            parameter.mul_(3.0)
    save_model(str(folder), model, config, PREPROCESS.model_dump(), ["terms"])
    return str(folder)


def filled_bank(folder: Path, masks: bool = True) -> tuple[FactorBank, str]:
    """A bank in `folder` and the run that it is of, made in this process."""
    folder.mkdir(exist_ok=True)
    work = ExtractionSpec(write_run(folder), write_sdnet(folder / "sdnet", 0), str(folder / "bank.zarr"), PREPROCESS)
    bank, store = prepare_bank(work), SliceStore.open(work.run)
    ids, network = {key: i for i, key in enumerate(slice_keys(store.table))}, FrozenSDNet(load_sdnet(work.sdnet_dir))
    keys = slice_keys(bank.index)
    for shard in range(bank.shards()):
        draft = bank.draft(shard)
        for row in bank.shard_rows(shard):
            seen = view(store, ids[keys[row]], PREPROCESS)
            anatomy, code, mask = bank_row(network.factors([seen])[0], seen, bank.spec.canvas)
            # codes of an untrained network lie close together
            draft.append(anatomy, 40 * code, mask if masks else 0 * mask)
        draft.commit()
    return bank, work.run


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def own_processes(title: str) -> list[int]:
    """Process ids with this title among this process's descendants; of nobody else's Ray."""
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

    return [pid for pid, name in names.items() if name.startswith(title) and mine(pid)]


def write_lender(bank: str, folder: Path, vendor: str, terms: str = "CC0") -> str:
    """A bank of other subjects, all of one vendor, with the same anatomies and codes that are larger by 1."""
    lent = FactorBank.open(bank)
    index = lent.index
    others = {"subject": [f"far{s}" for s in index["subject"].to_pylist()]}
    others |= {"vendor": [vendor] * len(index), "terms": [terms] * len(index)}
    for name, texts in others.items():
        index = index.set_column(index.column_names.index(name), name, pa.array(texts))
    made = FactorBank.create(str(folder), lent.spec, index, *lent.decoder()[:1], lent.decoder()[1])
    for shard in range(made.shards()):
        draft = made.draft(shard)
        rows = lent.read(list(lent.shard_rows(shard)))
        for k in range(len(rows)):
            draft.append(rows.anatomy[k], rows.modality[k] + 1.0, rows.mask[k])
        draft.commit()
    return made.uri
