"""A small bank for tests: ten slices of two subjects in three shards, the last of which is not full."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.bank.bank import ARRAYS, BANK_INDEX_SCHEMA, BankSpec, FactorBank, PackedBank
from storage.bank.node_cache import BankView

N, SHARD, CANVAS, MODALITY = 10, 4, (32, 48), 8
DECODER, DECODER_CONFIG = b"weights", {"anatomy_channels": 8, "modality_size": MODALITY}
SUBJECTS = ("s0", "s1")


def spec(**changes: Any) -> BankSpec:
    fields: dict[str, Any] = {
        "channels": 8,
        "modality_size": MODALITY,
        "canvas": CANVAS,
        "shard_slices": SHARD,
        "sdnet_fingerprint": "0123456789abcdef",
        "preprocess": {"size": 32, "field": 32, "normalisation": "zscore", "clip_sigma": 3.0},
    }
    return BankSpec(**(fields | changes))


def index(subjects: Sequence[str] = SUBJECTS, **changes: Any) -> pa.Table:
    """Five slices a subject; the last two of each odd one are not labelled."""
    rows = []
    for row in range(5 * len(subjects)):
        name, z = subjects[row // 5], row % 5
        odd = int(name[1:]) % 2
        facts = {
            "row": row,
            "subject": name,
            "vendor": "AB"[odd],
            "centre": "é",
            "phase": "ED",
            "frame": 0,
            "slice": z,
            "labelled": not odd or z < 3,
            "split": "train",
            "pixel_area_mm2": 1.0 + z / 7,
            "height": 30,
            "width": 40,
            "top": 1,
            "left": 4,
            "native_height": 30,
            "native_width": 40,
            "native_row_mm": 1.1,
            "native_col_mm": 1.2,
            "terms": "CC BY 4.0",
        }
        rows.append(facts | changes)
    return pa.Table.from_pylist(rows, schema=BANK_INDEX_SCHEMA)


def factors(subjects: Sequence[str] = SUBJECTS, canvas: tuple[int, int] = CANVAS) -> PackedBank:
    """Blobs, masks that are empty where not labelled, and vectors; of each subject always the same."""
    anatomy, modality = [], []
    for name in subjects:
        rng = np.random.default_rng([7, int(name[1:])])
        blobs = rng.integers(0, 256, (5, canvas[0] // 8, canvas[1] // 8), dtype=np.uint8)
        anatomy.append(np.repeat(np.repeat(blobs, 8, axis=1), 8, axis=2))
        modality.append(rng.standard_normal((5, MODALITY)).astype(np.float32))
    maps = np.concatenate(anatomy)
    top, left = (canvas[0] - 30) // 2, (canvas[1] - 40) // 2
    inside = np.zeros_like(maps)
    inside[:, top : top + 30, left : left + 40] = 255
    maps &= inside
    mask = (maps % 4).astype(np.uint8)
    mask[~index(subjects)["labelled"].to_numpy()] = 0
    return PackedBank(maps, mask, np.concatenate(modality))


FACTORS = factors()


def write(bank: FactorBank, shard: int, found: PackedBank = FACTORS) -> None:
    rows = bank.shard_rows(shard)
    part = slice(rows.start, rows.stop)
    bank.write_shard(shard, found.anatomy[part], found.modality[part], found.mask[part])


def made(
    path: Path | str, shards: Sequence[int] | None = None, subjects: Sequence[str] = SUBJECTS, **changes: Any
) -> FactorBank:
    """A bank of some subjects, of which some shards (None: all that are missing) are written."""
    bank = FactorBank.create(str(path), spec(**changes), index(subjects), DECODER, DECODER_CONFIG)
    found = factors(subjects, bank.spec.canvas)
    for shard in sorted(set(range(bank.shards())) - bank.committed()) if shards is None else shards:
        write(bank, shard, found)
    return bank


def digests(folder: Path) -> dict[str, str]:
    """Every file's path and SHA-256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def viewed(view: BankView) -> PackedBank:
    """What a view gives slice by slice."""
    items = [view[i] for i in range(len(view))]
    return PackedBank(**{name: np.stack([item[name] for item in items]) for name in ARRAYS})


def same(found: Any, rows: Any, expected: PackedBank = FACTORS) -> bool:
    """Whether `found` has the factors of these rows, bit for bit."""
    return all(np.array_equal(getattr(found, name), getattr(expected, name)[rows]) for name in ARRAYS)
