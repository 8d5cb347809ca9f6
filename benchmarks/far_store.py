"""Samples a second of a maker whose slices lie in a store far away, with copies on the node against without.

Every request to the store takes 20 ms more than the local disk; the maker keeps no slice in memory, as where the data
are larger than its cache. Samples are RA's, fully supervised, of a phantom. Ours is the rate once every subject has
been read; above it stand the first pass over all slices, and the same maker with the slices on the local disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from benchmarks.extract import slice_store
from benchmarks.timing import rates, ratio
from experiments.config import cpu
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples import maker
from pipeline.samples.stream_config import StreamConfig
from storage.node_folder import FOLDER

LATENCY_S = 0.02
PHANTOM = PhantomConfig(labelled_a=8, labelled_b=8, unlabelled_c=0, testing=0, frames=2)
STEPS = 20


class Slow(LocalFileSystem):
    """The local disk as a store of which every request takes `LATENCY_S` longer."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("slow://")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        time.sleep(LATENCY_S)
        return bytes(super().cat_file(path, start, end, **options))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        time.sleep(LATENCY_S)
        return dict(super().info(path, **options))


def run() -> dict[str, Any]:
    """Samples/s of one maker of one thread."""
    fsspec.register_implementation("slow", Slow, clobber=True)
    maker.CACHE_BYTES = 1
    with tempfile.TemporaryDirectory(prefix="cardiomix-far-") as place:
        write_phantom(Path(place) / "drawn", PHANTOM)
        local = slice_store(Path(place) / "drawn", Path(place) / "run")
        (Path(place) / "no-folder").write_text("")

        def made_at(store: str, node: str) -> maker.SampleMaker:
            os.environ[FOLDER] = f"{place}/{node}"
            return maker.SampleMaker(config(store))

        sides = {
            "local": made_at(local, "node"),
            "reference": made_at(f"slow://{local}", "no-folder"),
            "ours": made_at(f"slow://{local}", "node"),
        }
        os.environ[FOLDER] = f"{place}/no-folder"
        sides["reference"](steps(1))  # finds that there is no room
        os.environ[FOLDER] = f"{place}/node"
        slices = len(sides["ours"].store)
        began = time.perf_counter()
        for i in range(slices):
            sides["ours"].working(i)
        first = slices / (time.perf_counter() - began)

        def samples(name: str) -> int:
            return len(sides[name](steps(STEPS))["image"])

        found = rates({name: lambda name=name: samples(name) for name in sides}, rounds=3)  # type: ignore[misc]
        print(
            f"{slices} slices of {len(set(sides['ours'].store.column('subject').tolist()))} subjects, 20 ms a request"
        )
        print(f"first pass {first:.0f} slices/s; then local {found['local']:.0f} samples/s, copied {found['ours']:.0f}")
        return ratio(found, "samples/s")


def config(store: str) -> StreamConfig:
    """A fully supervised arm with RA, of the `cpu` preset, on the slices of `store`."""
    settings = cpu()
    return StreamConfig(
        run=store,
        bank=None,
        preprocess=settings.preprocess,
        plan=settings.plan,
        seed=0,
        semi_supervised=False,
        ra=True,
        fa=False,
        batch_size=settings.train.batch_size,
    )


def steps(count: int) -> dict[str, Any]:
    """The first `count` steps, as a maker takes them."""
    return {"step": np.arange(count)}
