"""A node's copy of a bank: each row at its image's own extent, against every row on the bank's canvas.

The bank has extents as M&Ms has them (sides of 176 to 224) and one subject of ten slices as large as the canvas of
512². Both copies are filled from the compressed bank, its checksums verified, and then read in random order, each row
cut to its extent and copied. One thread each; the files stay in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.bank.bank import BankSpec, FactorBank
from storage.bank.index import BANK_INDEX_SCHEMA
from storage.bank.node_cache import BankView

SLICES, LARGE, CANVAS, ROUNDS = 640, 10, (512, 512), 5
Read = Callable[[int], npt.NDArray[np.uint8]]


def run() -> dict[str, Any]:
    """Megabytes of the anatomies' file; the times of filling and reading are printed."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-cache-") as place:
        root = Path(place)
        bank = _bank(root / "bank.zarr")
        places = [bank.index[name].to_numpy() for name in ("top", "left", "height", "width")]

        def ours(number: int) -> tuple[Read, Path]:
            cache = root / f"ours{number}"
            rows = BankView(bank, cache=str(cache)).anatomy
            return lambda row: rows[row].copy(), next(cache.rglob("anatomy.bin"))

        def whole_canvas(number: int) -> tuple[Read, Path]:
            path = root / f"canvas{number}.bin"
            out = np.memmap(path, dtype=np.uint8, mode="w+", shape=(SLICES, *CANVAS))
            for shard in range(bank.shards()):
                rows = bank.shard_rows(shard)
                out[rows.start : rows.stop] = bank.read_array("anatomy", shard)

            def read(row: int) -> npt.NDArray[np.uint8]:
                top, left, height, width = (int(values[row]) for values in places)
                return out[row, top : top + height, left : left + width].copy()

            return read, path

        order = np.random.default_rng(1).permutation(SLICES).tolist()
        sides = {"own extent": ours, "whole canvas": whole_canvas}
        fill: dict[str, list[float]] = {name: [] for name in sides}
        reads: dict[str, list[float]] = {name: [] for name in sides}
        size = {}
        for number in range(ROUNDS):
            for name, side in sides.items():
                began = time.perf_counter()
                read, path = side(number)
                filled = time.perf_counter()
                for row in order:
                    read(row)
                fill[name].append(1e6 * (filled - began) / SLICES)
                reads[name].append(1e6 * (time.perf_counter() - filled) / SLICES)
                size[name] = path.stat().st_size / 1e6
                path.unlink()
        for name in sides:
            times = f"filled in {median(fill[name]):.0f} µs a slice, read in {median(reads[name]):.1f} µs a slice"
            print(f"{name}: {size[name]:.1f} MB, {times}")
        return {
            "ratio": round(size["whole canvas"] / size["own extent"], 2),
            "ours": round(size["own extent"], 1),
            "reference": round(size["whole canvas"], 1),
            "unit": "MB",
        }


def _bank(path: Path) -> FactorBank:
    """Anatomies of blocks of 16 × 16 pixels with one channel each, and nothing else."""
    rng = np.random.default_rng(0)
    extents = rng.integers(88, 113, (SLICES, 2)) * 2
    extents[:LARGE] = CANVAS
    corners = (np.array(CANVAS) - extents) // 2
    facts = {
        **{"vendor": "A", "centre": "-", "phase": "ED", "frame": 0, "labelled": False, "split": "train"},
        **{"pixel_area_mm2": 1.0, "terms": "benchmark", "native_row_mm": 1.0, "native_col_mm": 1.0},
    }
    index = []
    for row, ((height, width), (top, left)) in enumerate(zip(extents.tolist(), corners.tolist(), strict=True)):
        extent = {"height": height, "width": width, "top": top, "left": left}
        own = {"row": row, "subject": f"s{row // 10}", "slice": row % 10}
        index.append({**own, **extent, "native_height": height, "native_width": width, **facts})
    spec = BankSpec(
        channels=8, modality_size=8, canvas=CANVAS, shard_slices=64, sdnet_fingerprint="benchmark", preprocess={}
    )
    bank = FactorBank.create(str(path), spec, pa.Table.from_pylist(index, schema=BANK_INDEX_SCHEMA), b"", {})
    for shard in range(bank.shards()):
        draft = bank.draft(shard)
        for row in bank.shard_rows(shard):
            anatomy = np.zeros(CANVAS, np.uint8)
            (height, width), (top, left) = extents[row], corners[row]
            blocks = 1 << rng.integers(0, 8, (height // 16 + 1, width // 16 + 1))
            anatomy[top : top + height, left : left + width] = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
            draft.append(anatomy, rng.standard_normal(8).astype(np.float32), np.zeros(CANVAS, np.uint8))
        draft.commit()
    return bank
