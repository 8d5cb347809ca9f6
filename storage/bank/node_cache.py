"""One packed copy of a bank a node: raw bytes in a file that every process maps, so that the page cache holds it once.

    <cache>/<fingerprint>-v2-<boot>/anatomy.bin, mask.bin    row after row, of each the (height, width) of its image
    <cache>/<fingerprint>-v2-<boot>/modality.bin             (N, modality_size), little endian
    <cache>/<fingerprint>-v2-<boot>.lock                     who fills it holds it

The canvas around an image is zeros and is not kept: with it, one large image would make every row as large. Where a row
begins follows from the extents in the bank's index.

A file is made from the compressed bank by whoever comes first, its checksums verified on the way; the others wait. It
appears by a rename, so that what a killed process left is never taken for it. Not brought to disk: a file of an earlier
boot, which a lost power supply may have left full of zeros, has another name. Why it is
not kept compressed: docs/decisions/0007-a-packed-cache-a-node.md.

`<cache>` is this node's folder (see `storage.node_folder`); a process that has a removed bank mapped keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.bank.arrays import dtype
from storage.bank.bank import FactorBank
from storage.errors import InputError
from storage.node_folder import boot, elsewhere, locked, make_room, node_folder

VERSION = 2  # of these files; 1 was of whole canvases and stood in no name
EXTENT = ("top", "left", "height", "width")
Fill = Callable[[npt.NDArray[np.uint8], int], None]  # puts a shard's rows into a file's bytes


@dataclass(frozen=True, eq=False)
class MapRows:
    """A bank's anatomies or masks without the canvas: `rows[r]` is (h, w) uint8, the image's extent alone, not a copy.

    flat: their bytes; places: (N, 3) int64, where each row begins, its height and its width.
    """

    flat: npt.NDArray[np.uint8]
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """Raises IndexError."""
        start, height, width = self.places[row].tolist()
        return self.flat[start : start + height * width].reshape(height, width)


class BankView:
    """A map-style view of a bank's rows: `len(view)`, `view[i]`; torch's DataLoader takes it as it is.

    `anatomy`, `mask` and `modality` are of the whole bank and not to be written to, each filled into the node's cache
    when it is first asked for. InputError if the bank is not whole, or the cache has no room.
    """

    def __init__(
        self,
        bank: FactorBank,
        rows: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        cache: str | None = None,
    ) -> None:
        self.bank, self.cache = bank, cache
        self.rows = np.arange(len(bank)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(bank):
            raise IndexError(f"rows {self.rows.min()} to {self.rows.max()} of a bank of {len(bank)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return BankView, (self.bank, self.rows, self.cache)  # other processes map the files themselves

    @cached_property
    def anatomy(self) -> MapRows:
        """N rows of (h, w), channel c in bit c."""
        return map_rows(self.bank, "anatomy", self.cache)

    @cached_property
    def mask(self) -> MapRows:
        """N rows of (h, w), LV 1, MYO 2, RV 3; zeros where not labelled."""
        return map_rows(self.bank, "mask", self.cache)

    @cached_property
    def modality(self) -> npt.NDArray[np.float32]:
        """(N, modality_size)."""
        return map_modality(self.bank, self.cache)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The slice of the view's row `i`: `anatomy` and `mask` (H, W) on the bank's canvas, so that a batch can be
        stacked, `modality` (modality_size,), and every column of the index. Raises IndexError.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"slice {i} of {len(self)}")
        row = int(self.rows[i])
        facts = {name: self.bank.index[name][row].as_py() for name in self.bank.index.column_names}
        extent = _extent(*(facts[name] for name in EXTENT))
        anatomy, mask = (np.zeros(self.bank.spec.canvas, dtype=np.uint8) for _ in range(2))
        anatomy[extent], mask[extent] = self.anatomy[row], self.mask[row]
        return {"anatomy": anatomy, "mask": mask, "modality": np.array(self.modality[row]), **facts}


def map_rows(bank: FactorBank, name: str, folder: str | None = None) -> MapRows:
    """A bank's `anatomy` or `mask`, mapped read-only from the node's cache, which is filled first if it must be.

    Raises InputError if a shard is missing or damaged, or the cache has no room.
    """
    top, left, height, width = (bank.index[n].to_numpy().astype(np.int64) for n in EXTENT)
    ends = np.cumsum(height * width)
    places = np.stack([ends - height * width, height, width], axis=1)

    def fill(flat: npt.NDArray[np.uint8], shard: int) -> None:
        rows = MapRows(flat, places)
        for row, on_canvas in zip(bank.shard_rows(shard), bank.read_rows(name, shard), strict=True):
            rows[row][...] = on_canvas[_extent(top[row], left[row], height[row], width[row])]

    return MapRows(_mapped(bank, name, int(ends[-1]), folder, fill), places)


def map_modality(bank: FactorBank, folder: str | None = None) -> npt.NDArray[np.float32]:
    """A bank's `modality`, (N, modality_size), as `map_rows`."""

    def vectors(flat: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return flat.view(dtype("modality")).reshape(len(bank), bank.spec.modality_size)

    def fill(flat: npt.NDArray[np.uint8], shard: int) -> None:
        rows = bank.shard_rows(shard)
        vectors(flat)[rows.start : rows.stop] = bank.read_array("modality", shard)

    size = len(bank) * bank.spec.modality_size * dtype("modality").itemsize
    return vectors(_mapped(bank, "modality", size, folder, fill))


def _mapped(bank: FactorBank, name: str, size: int, folder: str | None, fill: Fill) -> npt.NDArray[np.uint8]:
    """The `size` bytes of a file in the node's cache, which `fill` makes if it is not there."""
    root, key = node_folder(folder), f"{bank.content_fingerprint}-v{VERSION}-{boot()}"
    path = root / key / f"{name}.bin"
    with locked(root / f"{key}.lock"):
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(exist_ok=True)
            for left in path.parent.glob(f"{name}.*.partial"):  # by a killed process: we hold the lock
                left.unlink()
            make_room(root, key, size)
            partial = path.with_name(f"{name}.{os.getpid()}.partial")
            try:
                _write(bank, partial, size, fill)
                os.replace(partial, path)
            except OSError as error:
                problem = f"cannot hold a bank's cache ({error.strerror or error})"
                raise InputError(root.name, problem, elsewhere()) from error
            finally:
                partial.unlink(missing_ok=True)
        os.utime(path.parent)  # opened last
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _write(bank: FactorBank, path: Path, size: int, fill: Fill) -> None:
    with path.open("xb+") as out:
        # Rows are put straight into the file's pages. They are reserved first: a full disk is to be an error, not a
        # signal.
        os.posix_fallocate(out.fileno(), 0, size)
        flat = np.asarray(np.memmap(out, dtype=np.uint8, mode="r+"))
    fs.map_concurrently(bank.uri, lambda shard: fill(flat, shard), range(bank.shards()))


def _extent(top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
    """An image's place on the canvas."""
    return slice(top, top + height), slice(left, left + width)
