"""Ingest against a straightforward loop of nibabel and numpy over the same files; then two workers against one.

The loop reads the same frames, makes the same checks and statistics in their plain form, and stores the same int16
images and uint8 masks. It is measured with two ways of storing: `numpy.savez`, which does not compress (the harder to
beat, and the JSON line's reference), and Zarr's own writer with the codec of ours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from benchmarks import cluster, data
from storage.slices.writer import IMAGE_LEVEL, MASK_LEVEL, write_subject
from storage.subjects import Subject

ROUNDS = 5
DRAWN, FRAMES = 6, 25  # a phantom's subjects, and as many frames as M&Ms' cines have
VARIANTS = 8  # of each subject drawn, for the workers

Array = npt.NDArray[Any]
Side = Callable[[str], int]  # stores all subjects in a new folder, and returns the number of slices
Save = Callable[[str, Array, Array, Array], None]


def run() -> dict[str, Any]:
    """Slices a second of one process and one thread; on the real sample if it is there, else on a phantom."""
    zarr.config.set({"threading.max_workers": 1})
    with tempfile.TemporaryDirectory(prefix="cardiomix-ingest-") as place:
        root = Path(place)
        drawn = data.phantom(root / "phantom", DRAWN, FRAMES)
        cines, real = str(root / "phantom"), data.real_folders()
        rates = _side_by_side(f"phantom, 4D files of {FRAMES} frames", [cines], root)
        if real:
            title, many = "real data, ACDC and Sunnybrook", real
            rates = _side_by_side(title, real, root)
        else:
            title, many = "phantom", [str(root / "many")]
            data.multiplied(root / "phantom", drawn, root / "many", VARIANTS)
        _workers(title, many, cines, root)
    return {
        "ratio": round(_paired(rates, "ours", "numpy.savez"), 2),
        "ours": round(median(rates["ours"]), 1),
        "reference": round(median(rates["numpy.savez"]), 1),
        "unit": "slices/s",
    }


def _side_by_side(title: str, folders: list[str], root: Path) -> dict[str, list[float]]:
    subjects = data.subjects_of(folders)
    sides: dict[str, Side] = {
        "ours": lambda run: sum(write_subject(run, subject).slices for subject in subjects),
        "numpy.savez": lambda run: straightforward(subjects, run, _savez),
        "zarr, our codec": lambda run: straightforward(subjects, run, _zarr),
    }
    rates, by_processor = _rates(sides, root)
    print(f"{title}, {len(subjects)} subjects: ours {median(rates['ours']):.0f} slices/s")
    for name in list(sides)[1:]:
        found = (_paired(seen, "ours", name) for seen in (rates, by_processor))
        shown = "{:.2f}, in processor time {:.2f}".format(*found)
        print(f"  against the loop with {name}: {median(rates[name]):.0f} slices/s, ratio {shown}", flush=True)
    return rates


def _workers(title: str, cines: list[str], warm: str, root: Path) -> None:
    """Two workers against one in the same cluster, in turns; both have done `warm` just before."""
    from actors.ingest import ingest

    def begin() -> None:
        cluster.start_workers(2)
        ingest([warm], tempfile.mkdtemp(dir=root), num_cpus=1)

    sides: dict[str, Side] = {
        "one": lambda run: ingest(cines, run, num_cpus=2).slices,  # a task books the whole cluster
        "two": lambda run: ingest(cines, run, num_cpus=1).slices,
    }
    with cluster.local(2):
        rates, _ = _rates(sides, root, begin)
    shown = ", ".join(f"{name} {median(seen):.0f} slices/s" for name, seen in rates.items())
    print(f"workers, {title}: {shown}, ratio {_paired(rates, 'two', 'one'):.2f}")


def _rates(
    sides: dict[str, Side], root: Path, begin: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Slices a second, and a second of this process's processor time, by side and round; sides take turns.

    One round before does not count. What was written stays until the end: after many files have been removed, ext4 was
    seen to make new ones ten times more slowly for minutes.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    by_processor: dict[str, list[float]] = {name: [] for name in sides}
    for counts in [False] + ROUNDS * [True]:
        for name, side in sides.items():
            begin()
            place = tempfile.mkdtemp(dir=root)
            began = time.perf_counter(), time.process_time()
            slices = side(place)
            wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
            if counts:
                rates[name].append(slices / wall)
                by_processor[name].append(slices / processor)
    return rates, by_processor


def _paired(rates: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over rounds of the ratio within a round: what else the machine does meets both sides."""
    return median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))


def straightforward(subjects: Sequence[Subject], folder: str, save: Save) -> int:
    """What ingest does, as one would write it down."""
    slices = 0
    for subject in subjects:
        files: dict[str, Any] = {p: nib.load(p) for f in subject.frames for p in (f.image, f.mask) if p}
        images, masks, facts = [], [], []
        for frame in subject.frames:
            image = _frame(files[frame.image], frame.image_index)
            if not np.isfinite(image).all() or image.min() == image.max():
                raise ValueError("not finite, or constant")
            facts.append([image.mean(), image.std(), image.min(), image.max(), *np.percentile(image, [0.5, 99.5])])
            images.append(image.astype(np.int16))
            masks.append(np.zeros(image.shape, np.uint8))
            if frame.mask is not None:
                masks[-1] = _recoded(_frame(files[frame.mask], frame.mask_index), dict(subject.labels))
                ours, theirs = files[frame.image].header, files[frame.mask].header
                if ours.get_data_shape()[:3] != theirs.get_data_shape()[:3]:
                    raise ValueError("not the image's shape")
                if not np.allclose(ours.get_zooms()[:3], theirs.get_zooms()[:3], rtol=0.01):
                    raise ValueError("not the image's voxel size")
        image, mask = np.concatenate(images), np.concatenate(masks)
        save(f"{folder}/{subject.subject}", image, mask, np.array(facts))
        slices += len(image)
    return slices


def _frame(file: Any, index: int | None) -> Array:
    found: Array = np.asanyarray(file.dataobj if index is None else file.dataobj[..., index])  # and reads no further
    return found.T


def _recoded(mask: Array, labels: dict[int, int]) -> npt.NDArray[np.uint8]:
    if not set(np.unique(mask)) <= {0, *labels}:
        raise ValueError("values outside the coding")
    table = np.zeros(256, np.uint8)
    table[list(labels)] = list(labels.values())
    recoded: npt.NDArray[np.uint8] = table[mask.astype(np.uint8)]
    return recoded


def _savez(path: str, image: Array, mask: Array, facts: Array) -> None:
    np.savez(path, image=image, mask=mask, facts=facts)


def _zarr(path: str, image: Array, mask: Array, facts: Array) -> None:
    for name, array, level in (("image", image, IMAGE_LEVEL), ("mask", mask, MASK_LEVEL)):
        codec = BloscCodec(cname="zstd", clevel=level, shuffle="bitshuffle")
        shape, chunk = array.shape, (1, *array.shape[1:])
        made = zarr.create_array(
            f"{path}/{name}",
            shape=shape,
            shards=shape,
            chunks=chunk,
            dtype=array.dtype,
            compressors=codec,
            fill_value=0,
        )
        made[:] = array
    np.save(f"{path}/facts.npy", facts)
