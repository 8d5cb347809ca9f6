"""Peak memory of a node with twelve makers of samples on slices of 512², against what their caches may hold.

The slices are the phantom's, each pixel repeated to a side of 512. The makers draw slices at random, with RA, until
each of them has met more than its cache holds (`pipeline.samples.maker.CACHE_BYTES`, and a quarter of it for masks).
Counted as in `benchmarks.memory`: PSS of the driver and of every process below it, less what the idle cluster takes.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from actors.ingest import ingest
from actors.streaming import batches
from benchmarks import cluster, data
from benchmarks.memory import proportional_bytes
from pipeline.samples.maker import CACHE_BYTES
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.stream_config import StreamConfig
from storage.layouts import LayoutOptions

MAKERS, SIDE, SUBJECTS, FRAMES, STEPS, BATCH = 12, 512, 4, 25, 600, 8
SAMPLE_S = 1.0


def run() -> dict[str, Any]:
    """MB of the makers' node above the idle cluster, and of twelve full caches."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-makers-") as place, cluster.local(MAKERS):
        root = Path(place)
        data.phantom(root / "data", SUBJECTS, FRAMES)
        for path in (root / "data").rglob("*.nii.gz"):
            _enlarge(path)
        report = ingest([str(root / "data")], str(root / "run"), LayoutOptions(frames="all"))
        slices = sum(counts.slices for counts in report.by_vendor.values())
        stream = StreamConfig(
            run=str(root / "run"),
            bank=None,
            preprocess=PreprocessConfig(size=SIDE),
            plan=PlanConfig(),
            seed=0,
            semi_supervised=True,
            ra=True,
            fa=False,
            batch_size=BATCH,
        )
        idle = proportional_bytes(os.getpid(), {})
        peaks, over = [idle], threading.Event()
        watch = threading.Thread(target=_watch, args=(peaks, over))
        watch.start()
        began = time.perf_counter()
        made = sum(len(batch["image"]) for batch in batches(stream, range(STEPS), actors=MAKERS, cpus=1.0))
        seconds = time.perf_counter() - began
        over.set()
        watch.join()
    print(f"{made} samples of {slices} slices of {SIDE}² in {seconds:.0f} s, {MAKERS} makers; idle {idle / 1e6:.0f} MB")
    ours, budget = max(peaks) - idle, MAKERS * CACHE_BYTES * 1.25
    megabytes = {"ours": round(ours / 1e6), "reference": round(budget / 1e6)}
    return {"ratio": round(ours / budget, 2), **megabytes, "unit": "MB"}


def _enlarge(path: Path) -> None:
    image = nib.load(path)  # type: ignore[attr-defined]
    voxels = np.asarray(image.dataobj)
    times = [-(-SIDE // n) for n in voxels.shape[:2]]
    large = voxels.repeat(times[0], axis=0).repeat(times[1], axis=1)[:SIDE, :SIDE]
    affine = image.affine @ np.diag([1 / times[0], 1 / times[1], 1, 1])
    made = nib.Nifti1Image(large, affine)  # type: ignore[attr-defined]
    zooms = image.header.get_zooms()
    made.header.set_zooms((zooms[0] / times[0], zooms[1] / times[1], *zooms[2:]))
    nib.save(made, path)  # type: ignore[attr-defined]


def _watch(peaks: list[int], over: threading.Event) -> None:
    seen: dict[int, tuple[bytes, int]] = {}
    while not over.wait(SAMPLE_S):
        peaks.append(proportional_bytes(os.getpid(), seen))
