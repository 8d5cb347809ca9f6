"""Image and mask of slices at random from the slice store, against reading the same Zarr arrays with zarr itself.

Both keep their arrays open and decode on one thread; files are in the page cache. The slices are a phantom's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.extract import slice_store
from benchmarks.timing import rates, ratio
from pipeline.phantom import PhantomConfig, write_phantom
from storage import fs
from storage.slices.store import SliceStore
from storage.slices.writer import subject_folder

PHANTOM = PhantomConfig(labelled_a=6, labelled_b=6, unlabelled_c=6, testing=0, frames=2)
READ = 300


def run() -> dict[str, Any]:
    """Slices (image and mask) a second."""
    import zarr

    with tempfile.TemporaryDirectory(prefix="cardiomix-slices-") as place:
        write_phantom(Path(place) / "drawn", PHANTOM)
        store = SliceStore.open(slice_store(Path(place) / "drawn", Path(place) / "run"))
        wanted = np.random.default_rng(0).integers(0, len(store), READ).tolist()
        rows = store.column("row")
        arrays = {
            (subject, kind): zarr.open_array(
                fs.zarr_store(fs.join(subject_folder(store.run, subject), kind), read_only=True), mode="r"
            )
            for subject in np.unique(store.column("subject")).tolist()
            for kind in ("image", "mask")
        }

        def ours() -> int:
            for i in wanted:
                store.image(i), store.mask(i)
            return READ

        def plain() -> int:
            for i in wanted:
                subject = str(store.column("subject")[i])
                np.asarray(arrays[subject, "image"][int(rows[i])]).astype(np.float32)
                np.asarray(arrays[subject, "mask"][int(rows[i])])
            return READ

        return ratio(rates({"ours": ours, "reference": plain}), "slices/s")
