"""One uncompressed copy of a bank on each node: raw bytes in files that every process maps into its memory.

    <cache>/<fingerprint>-v2-<boot>/anatomy.bin, mask.bin    row after row, each of the (height, width) of its image
    <cache>/<fingerprint>-v2-<boot>/modality.bin             (N, modality_size) float32, little endian
    <cache>/<fingerprint>-v2-<boot>.lock                     held by the process that fills or opens the copy

The page cache holds these files once for all processes. The canvas around an image is zeros and is not kept: with it,
one large image would make every row as large. The extents in the bank's index say where a row begins.

The first process makes a file from the compressed bank and verifies the checksums; the others wait. The file appears by
a rename, so that the unfinished file of a killed process is never taken for it. Files are not synced to disk. After a
power cut they may be full of zeros, so their folder's name has the boot's id in it and is not used after the next
start. docs/decisions/0007-a-packed-cache-a-node.md says why the copy is not compressed.

`<cache>` is this node's folder, see `storage.node_folder`. If a bank is removed from it, a process that has mapped the
bank's files keeps them.
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

VERSION = 2  # of the layout of these files; it is in the folder's name
EXTENT = ("top", "left", "height", "width")
Fill = Callable[[npt.NDArray[np.uint8], int], None]  # writes a shard's rows into a file's bytes


@dataclass(frozen=True, eq=False)
class MapRows:
    """A bank's anatomies or masks without the canvas: `rows[r]` is a view, (h, w) uint8, of the image's extent alone.

    `flat` holds the bytes of all rows. `places`, (N, 3) int64, says where each row begins, and its height and width.
    """

    flat: npt.NDArray[np.uint8]
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """The image's extent of a row, (h, w) uint8. Raises IndexError."""
        start, height, width = self.places[row].tolist()
        return self.flat[start : start + height * width].reshape(height, width)


class BankView:
    """A map-style view of a bank's rows: `len(view)`, `view[i]`. torch's DataLoader takes it as it is.

    `rows` selects rows of the bank; None selects all. `anatomy`, `mask` and `modality` are of the whole bank and must
    not be written to. Each is filled into the node's cache when it is first used. This raises InputError if the bank is
    not complete, or if the cache has no room. Raises IndexError for a row that the bank does not have.
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
        return BankView, (self.bank, self.rows, self.cache)  # another process maps the files itself

    @cached_property
    def anatomy(self) -> MapRows:
        """N rows of (h, w) uint8, channel c in bit c."""
        return map_rows(self.bank, "anatomy", self.cache)

    @cached_property
    def mask(self) -> MapRows:
        """N rows of (h, w) uint8: LV 1, MYO 2, RV 3; all zeros if not labelled."""
        return map_rows(self.bank, "mask", self.cache)

    @cached_property
    def modality(self) -> npt.NDArray[np.float32]:
        """(N, modality_size) float32."""
        return map_modality(self.bank, self.cache)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The slice in the view's row `i`, with every column of the index. Raises IndexError.

        `anatomy` and `mask` are (H, W) uint8 on the bank's canvas, so that a batch can be stacked. `modality` is
        (modality_size,) float32.
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
    """Map a bank's `anatomy` or `mask` read-only from the node's cache, which is filled first if necessary.

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
    """Map a bank's `modality`, (N, modality_size) float32, as `map_rows` does."""

    def vectors(flat: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return flat.view(dtype("modality")).reshape(len(bank), bank.spec.modality_size)

    def fill(flat: npt.NDArray[np.uint8], shard: int) -> None:
        rows = bank.shard_rows(shard)
        vectors(flat)[rows.start : rows.stop] = bank.read_array("modality", shard)

    size = len(bank) * bank.spec.modality_size * dtype("modality").itemsize
    return vectors(_mapped(bank, "modality", size, folder, fill))


def _mapped(bank: FactorBank, name: str, size: int, folder: str | None, fill: Fill) -> npt.NDArray[np.uint8]:
    """Map the `size` bytes of a file in the node's cache. If the file is not there, `fill` writes its content."""
    root, key = node_folder(folder), f"{bank.content_fingerprint}-v{VERSION}-{boot()}"
    path = root / key / f"{name}.bin"
    with locked(root / f"{key}.lock"):
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(exist_ok=True)
            for left in path.parent.glob(f"{name}.*.partial"):  # a killed process left it, since we hold the lock
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
        os.utime(path.parent)  # records when the bank was last opened
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _write(bank: FactorBank, path: Path, size: int, fill: Fill) -> None:
    with path.open("xb+") as out:
        # Rows are written straight into the file's mapped pages. The pages are reserved first: on a full disk, the
        # process would otherwise get a signal instead of an error.
        os.posix_fallocate(out.fileno(), 0, size)
        flat = np.asarray(np.memmap(out, dtype=np.uint8, mode="r+"))
    fs.map_concurrently(bank.uri, lambda shard: fill(flat, shard), range(bank.shards()))


def _extent(top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
    """An image's place on the canvas."""
    return slice(top, top + height), slice(left, left + width)
