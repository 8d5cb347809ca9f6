"""The size of a factor bank made from the real sample with a trained SDNet, everything in it counted.

At native resolution, the loss with KL and balance, so that all channels live. Reference of the JSON line: raw float32
factors of the images' true extents (padding is not counted as raw), their masks a byte a pixel. Printed above it: the
same as float32 Zarr with default compression, zstd-22 of the same bytes, and JPEG-XL, lossless, where `imagecodecs` is
installed. CARDIOMIX_BENCH_RUN names a run to keep, so that a second call does not train again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import data
from experiments.cli.bank import uri_size
from storage.bank.anatomy_codec import unpack
from storage.bank.arrays import ARRAYS
from storage.bank.bank import FactorBank, PackedBank

# 360 steps of batch 4: 8 minutes on 2 cores.
TRAINING = ("preprocess.size=224", "pretrain.batch_size=4", "train.batch_size=4", "pretrain.epochs=6")
FIRES = 1e-3  # share of pixels below which a channel counts as dead


def run() -> dict[str, Any]:
    """Bytes; raw float32 factors against the whole bank."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-size-") as place:
        bank = made(os.environ.get("CARDIOMIX_BENCH_RUN") or f"{place}/run", Path(place))
        found, index, spec = bank.load(), bank.index, bank.spec
        inside = [_extent(index, row) for row in range(len(bank))]
        pixels = sum(found.mask[row][part].size for row, part in enumerate(inside))
        raw = pixels * (4 * spec.channels + 1) + found.modality.nbytes
        size = uri_size(bank.uri)
        usage = [np.mean([(found.anatomy[r][p] >> c & 1).mean() for r, p in enumerate(inside)]) for c in range(8)]
        print(f"{len(bank)} slices, {spec.canvas[0]} × {spec.canvas[1]}, {size / len(bank):,.0f} bytes a slice")
        print(f"channels alive: {sum(u > FIRES for u in usage)} of {spec.channels}, {np.round(usage, 3).tolist()}")
        held = {name: uri_size(f"{bank.uri}/{name}") for name in ARRAYS}
        bits = 8 * held["anatomy"] / pixels
        print("  ".join(f"{name} {value:,} B" for name, value in held.items()), f" anatomy {bits:.2f} bits a pixel")
        floats = float32_zarr(found, spec.channels, f"{place}/float32.zarr")
        print(f"float32 Zarr, default compression: {floats:,} B, ratio {floats / size:.2f} (at least 2.5 is asked)")
        for title, each in (("a slice at a time", 1), ("a shard at a time", spec.shard_slices)):
            best = sum(zstd_22(getattr(found, name), each) for name in ARRAYS)
            print(f"zstd-22 of the same bytes, {title}: {best:,} B; the bank's {sum(held.values()) / best:.3f} of it")
        print(jpeg_xl(found.anatomy, held["anatomy"]))
    return {"ratio": round(raw / size, 1), "ours": size, "reference": raw, "unit": "bytes"}


def made(run: str, place: Path) -> FactorBank:
    """The bank of a run, which is ingested, trained and extracted as far as it is not."""
    bank = f"{run}/bank.zarr"
    if not Path(bank).exists():
        from experiments import config
        from experiments.progress import Progress
        from experiments.run.driver import Ablation

        folders = data.real_folders()  # where there are none, the run draws a phantom
        print("real sample" if folders else "phantom: there is no real sample beside the project")
        document = config.override(config.cpu(), list(TRAINING)).model_dump() | {"data": tuple(folders)}
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
        settings = config.validated(document, "bank-size")
        with Ablation(run, settings, Progress()) as driver:
            config.save(settings, run)
            driver.ingest()
            driver.pretrain()
            driver.extract()
    return FactorBank.open(bank)


def float32_zarr(found: PackedBank, channels: int, path: str) -> int:
    """Bytes of the factors as float32 in Zarr with the compression that it takes by itself, a slice a chunk."""
    import zarr

    count, height, width = found.anatomy.shape
    group = zarr.create_group(path, zarr_format=3)
    shape, chunk = (count, channels, height, width), (1, channels, height, width)
    anatomy = group.create_array("anatomy", shape=shape, chunks=chunk, dtype="float32")
    for row, packed in enumerate(found.anatomy):
        anatomy[row] = unpack(packed, channels).astype(np.float32)
    for name in ("mask", "modality"):
        values = getattr(found, name)
        group.create_array(name, shape=values.shape, chunks=(1, *values.shape[1:]), dtype=values.dtype)[:] = values
    return uri_size(path)


def zstd_22(values: npt.NDArray[Any], each: int) -> int:
    """Bytes of zstd's highest level, `each` rows at a time."""
    from numcodecs.zstd import Zstd

    codec = Zstd(level=22)
    return sum(len(codec.encode(values[row : row + each])) for row in range(0, len(values), each))


def jpeg_xl(anatomy: npt.NDArray[np.uint8], ours: int) -> str:
    """What lossless JPEG-XL makes of the byte maps, as a line."""
    try:
        import imagecodecs
    except ImportError:
        return "JPEG-XL: imagecodecs is not installed"
    size = sum(len(imagecodecs.jpegxl_encode(image, lossless=True, effort=9)) for image in anatomy)
    return f"JPEG-XL, lossless, effort 9: {size:,} B; the bank's anatomy {ours / size:.3f} of it"


def _extent(index: Any, row: int) -> tuple[slice, slice]:
    top, left, height, width = (index[name][row].as_py() for name in ("top", "left", "height", "width"))
    return slice(top, top + height), slice(left, left + width)
