"""Anatomy of one slice, modality of another, at random over two epochs: a bank's view against the plain ways.

Every side begins with nothing open and nothing of its files in the page cache, and opening and loading count: ours
fills the node's cache from the compressed bank and checks its checksums on the way. References: naive indexing of the
bank's Zarr arrays (of part of the pairs, it is slow), and a NumPy memmap of packed bytes that were written before, for
which somebody has already paid, which nothing checks and which takes as much disk as it has pixels. One thread each.

The bank is one of CARDIOMIX_BENCH_RUN if that is given, whose slices are shifted to have enough of them; else each
channel is a band of a phantom's intensities.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks import data
from storage.bank.bank import BankSpec, FactorBank, PackedBank
from storage.bank.index import BANK_INDEX_SCHEMA
from storage.bank.node_cache import BankView

SLICES, EPOCHS, ROUNDS, CANVAS = 3200, 2, 5, (256, 256)
NAIVE_PAIRS = 300
Pairs = list[tuple[int, int]]


def run() -> dict[str, Any]:
    """Slices a second; the JSON line's reference is naive Zarr indexing."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-read-") as place:
        root = Path(place)
        factors = _factors(root)
        bank = _bank(root / "bank.zarr", factors)
        factors.anatomy.tofile(root / "anatomy.raw")
        factors.modality.tofile(root / "modality.raw")
        rng = np.random.default_rng(0)
        orders = [(rng.permutation(SLICES).tolist(), rng.permutation(SLICES).tolist()) for _ in range(EPOCHS)]
        pairs = [pair for order in orders for pair in zip(*order, strict=True)]
        sides: dict[str, Callable[[int], float]] = {
            "ours": lambda number: _ours(bank.uri, root / f"cache{number}", pairs),
            "naive": lambda _: _naive(bank.uri, pairs[:NAIVE_PAIRS]),
            "memmap": lambda _: _memmap(root, factors.anatomy.shape, factors.modality.shape, pairs),
        }
        for title, forget in (("cold", True), ("files in the page cache", False)):
            seen: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(ROUNDS):
                for name, side in sides.items():
                    if forget:
                        _forget(root)
                    seen[name].append(side(2 * number + forget))
            rates = {name: median(values) for name, values in seen.items()}
            shown = ", ".join(f"{name} {rate:,.0f} slices/s" for name, rate in rates.items())
            against = {n: median(a / b for a, b in zip(seen["ours"], seen[n], strict=True)) for n in rates}
            print(f"{title}: {shown}; ours against naive {against['naive']:.1f}, memmap {against['memmap']:.2f}")
            if forget:
                cold, ratio = rates, against["naive"]
        size = sum(path.stat().st_size for path in (root / "cache0").rglob("*.bin"))
        packed = sum(path.stat().st_size for path in (root / "bank.zarr").rglob("*") if path.is_file())
        print(f"cache {size / 1e6:.0f} MB a node, bank {packed / 1e6:.1f} MB, masks included; {SLICES} slices")
    return {
        "ratio": round(ratio, 1),
        "ours": round(cold["ours"]),
        "reference": round(cold["naive"]),
        "unit": "slices/s",
    }


def _ours(uri: str, cache: Path, pairs: Pairs) -> float:
    def load() -> tuple[Any, Any]:
        view = BankView(FactorBank.open(uri), cache=str(cache))
        return view.anatomy, view.modality

    return _rate(load, pairs)


def _naive(uri: str, pairs: Pairs) -> float:
    import zarr

    def load() -> tuple[Any, Any]:
        group = zarr.open_group(uri, mode="r")
        return group["anatomy"], group["modality"]

    return _rate(load, pairs)


def _memmap(root: Path, anatomy: tuple[int, ...], modality: tuple[int, ...], pairs: Pairs) -> float:
    def load() -> tuple[Any, Any]:
        maps = np.memmap(root / "anatomy.raw", dtype=np.uint8, mode="r", shape=anatomy)
        return maps, np.memmap(root / "modality.raw", dtype=np.float32, mode="r", shape=modality)

    return _rate(load, pairs)


def _rate(load: Callable[[], tuple[Any, Any]], pairs: Pairs) -> float:
    """Slices a second, each copied to where a sample is made of it."""
    began = time.perf_counter()
    anatomies, modalities = load()
    anatomy, modality = np.empty(CANVAS, np.uint8), np.empty(modalities.shape[1], np.float32)
    for a, b in pairs:
        anatomy[...] = anatomies[a]
        modality[...] = modalities[b]
    return len(pairs) / (time.perf_counter() - began)


def _forget(root: Path) -> None:
    """Have the kernel drop what it holds of the files, once they are on the disk."""
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _factors(root: Path) -> PackedBank:
    """`SLICES` rows on `CANVAS`."""
    run = os.environ.get("CARDIOMIX_BENCH_RUN")
    found = FactorBank.open(f"{run}/bank.zarr").load().anatomy if run else _bands(root)
    rows = (divmod(row, len(found)) for row in range(SLICES))
    anatomy = np.stack([np.roll(found[at], (3 * turn, 5 * turn), (0, 1)) for turn, at in rows])
    modality = np.random.default_rng(1).standard_normal((SLICES, 8)).astype(np.float32)
    return PackedBank(anatomy, np.zeros_like(anatomy), modality)


def _bands(root: Path) -> npt.NDArray[np.uint8]:
    """A phantom's slices on the canvas, channel c where the intensity is in the c-th of eight bands."""
    from scipy.ndimage import gaussian_filter

    from storage.slices.store import SliceStore
    from storage.slices.writer import finalise, write_subject

    data.phantom(root / "phantom", 4, 8)
    subjects = data.subjects_of([str(root / "phantom")])
    rows = {subject.subject: write_subject(str(root / "run"), subject) for subject in subjects}
    finalise(str(root / "run"), rows, [], subjects)
    store = SliceStore.open(str(root / "run"))
    out = np.zeros((len(store), *CANVAS), dtype=np.uint8)
    for i in range(len(store)):
        image = gaussian_filter(store.image(i), 1.0)[: CANVAS[0], : CANVAS[1]]
        bands = np.digitize(image, np.quantile(image, np.arange(1, 8) / 8))
        out[i, : image.shape[0], : image.shape[1]] = 1 << bands
    return out


def _bank(path: Path, factors: PackedBank) -> FactorBank:
    facts = {
        **{"vendor": "A", "centre": "-", "phase": "ED", "frame": 0, "labelled": False, "split": "train"},
        **{"pixel_area_mm2": 1.0, "height": CANVAS[0], "width": CANVAS[1], "top": 0, "left": 0, "terms": "phantom"},
        **{"native_height": CANVAS[0], "native_width": CANVAS[1], "native_row_mm": 1.0, "native_col_mm": 1.0},
    }
    rows = [{"row": r, "subject": f"s{r // 10}", "slice": r % 10, **facts} for r in range(SLICES)]
    index = pa.Table.from_pylist(rows, schema=BANK_INDEX_SCHEMA)
    spec = BankSpec(
        channels=8, modality_size=8, canvas=CANVAS, shard_slices=64, sdnet_fingerprint="benchmark", preprocess={}
    )
    bank = FactorBank.create(str(path), spec, index, b"", {})
    for shard in range(bank.shards()):
        rows_of = bank.shard_rows(shard)
        part = slice(rows_of.start, rows_of.stop)
        bank.write_shard(shard, factors.anatomy[part], factors.modality[part], factors.mask[part])
    return bank
