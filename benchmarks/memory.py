"""Peak memory of a stage's processes for ten times the subjects, against that for once as many.

PSS (shared pages divided among those that map them) of the driver and of every process below it, Ray's own and its
workers, less what the idle cluster takes. Pages of files, which are libraries, are left out: they are the same for any
number of subjects, so that they would flatter the ratio, and they change when another program on the machine that has
them too begins or ends. Each measurement has a process tree of its own, which this module's `main` begins:
`python -m benchmarks.memory STAGE DATA RUN`.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks import cluster, data
from pipeline.samples.preprocess import PreprocessConfig

DRAWN, FRAMES = 4, 25  # as many frames as M&Ms' cines have
VARIANTS = {"small": 3, "large": 30}  # of each subject drawn
SAMPLE_S, SETTLE_S, IDLE_S = 0.02, 3.0, 2.0
TINY, SHARD = PreprocessConfig(size=64), 16  # so that the smaller data set has more shards than actors take at a time
PSS = re.compile(rb"^Pss_(?:Anon|Shmem): +(\d+) kB", re.MULTILINE)
IDLE, WARMING, WORKING, DONE = "idle", "warming", "working", "done"  # what a measured process says, in this order


def ingest(folder: str, run: str) -> None:
    """Every frame of every cine into a slice store."""
    from actors.ingest import ingest as stage
    from storage.layouts import LayoutOptions

    stage([folder], run, LayoutOptions(frames="all"))


def extract(folder: str, run: str) -> None:
    """ED and ES of the slice store beside the folder into a bank, by two actors with a tiny network."""
    from actors.extraction import ExtractionActors
    from actors.extraction import extract as stage
    from actors.extractor import ExtractionSpec

    sdnet = str(Path(folder).with_name("sdnet"))
    spec = ExtractionSpec(f"{folder}.run", sdnet, f"{run}/bank.zarr", TINY, shard_slices=SHARD)
    stage(spec, ExtractionActors(2))


def prepare_extract(root: Path) -> None:
    """Slice stores and an SDNet for it. Extraction is to be measured, not what comes before."""
    from benchmarks.extract import slice_store
    from pipeline.networks.config import SDNetConfig
    from pipeline.networks.files import save_model
    from pipeline.networks.sdnet import SDNet

    for name in ("drawn", *VARIANTS):
        slice_store(root / name, root / f"{name}.run")
    config = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
    save_model(str(root / "sdnet"), SDNet(config), config, TINY.model_dump(), ["phantom"])


STAGES: dict[str, Callable[[str, str], None]] = {"ingest": ingest, "extract": extract}


def run() -> dict[str, Any]:
    """MB above the idle cluster, of the stage whose peak grows most."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-memory-") as place:
        root = Path(place)
        drawn = data.phantom(root / "drawn", DRAWN, FRAMES)
        read = {}
        for name, variants in VARIANTS.items():
            read[name] = data.multiplied(root / "drawn", drawn, root / name, variants)
            packed = sum(path.stat().st_size for path in (root / name).rglob("*.gz"))
            print(f"{name}: {variants * DRAWN} subjects, {read[name] / 1e6:.0f} MB, gzipped {packed / 1e6:.0f} MB")
        prepare_extract(root)
        peaks = {stage: [above_idle(stage, root, name) for name in VARIANTS] for stage in STAGES}
    for stage, (_, large) in peaks.items():
        print(f"{stage}: the larger data set is {read['large'] / large:.1f} times the peak")
    small, large = max(peaks.values(), key=lambda found: found[1] / found[0])
    megabytes = {"ours": round(large / 1e6, 1), "reference": round(small / 1e6, 1)}
    return {"ratio": round(large / small, 3), **megabytes, "unit": "MB"}


def above_idle(stage: str, root: Path, name: str) -> float:
    """Bytes by which a stage's peak on the data set `root/name` exceeds its idle cluster."""
    command = [sys.executable, "-m", "benchmarks.memory", stage, str(root), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as driver:
        assert driver.stdout is not None
        _sampled(driver.pid, driver.stdout, IDLE)
        idle = median(_sampled(driver.pid, driver.stdout, WARMING))
        _sampled(driver.pid, driver.stdout, WORKING)
        began = time.perf_counter()
        working = _sampled(driver.pid, driver.stdout, DONE)
        seconds = time.perf_counter() - began
    above = max(working) - idle
    print(
        f"{stage} of {name}: peak {above / 1e6:.0f} MB above {idle / 1e6:.0f} MB, "
        f"in {seconds:.1f} s, {len(working)} samples",
        flush=True,
    )
    return above


def _sampled(pid: int, said: IO[bytes], word: str) -> list[int]:
    """PSS in bytes of a process and all below it, about every `SAMPLE_S`, until it says `word`."""
    seen: dict[int, tuple[bytes, int]] = {}
    samples = [proportional_bytes(pid, seen)]
    while not select.select([said], [], [], SAMPLE_S)[0]:
        samples.append(proportional_bytes(pid, seen))
    if (line := said.readline().decode().strip()) != word:
        raise RuntimeError(f"the measured process said '{line}' instead of '{word}'; its error stands above")
    return samples


def proportional_bytes(root: int, seen: dict[int, tuple[bytes, int]]) -> int:
    """PSS in bytes of a process and all below it, pages of files left out.

    `seen` keeps each process's resident pages and PSS: asking for the latter takes 2 ms, so it is asked of those
    alone whose pages have changed."""
    family = [root]
    total = 0
    for pid in family:  # grows as it is walked
        with suppress(OSError):  # ended meanwhile
            for thread in os.listdir(f"/proc/{pid}/task"):
                family += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
            pages = _read(f"/proc/{pid}/statm").split()[1]
            if seen.get(pid, (b"", 0))[0] != pages:
                seen[pid] = pages, 1024 * sum(map(int, PSS.findall(_read(f"/proc/{pid}/smaps_rollup"))))
            total += seen[pid][1]
    return total


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def main(stage: str, root: str, name: str) -> None:
    """Run one stage on a cluster of two CPUs, and say when it is idle, warming up, working and done."""
    with cluster.local(2):
        cluster.start_workers(2)
        time.sleep(SETTLE_S)
        print(IDLE, flush=True)
        time.sleep(IDLE_S)
        print(WARMING, flush=True)  # so that libraries are there from the first: they are no matter of size
        STAGES[stage](f"{root}/drawn", tempfile.mkdtemp(dir=root))
        print(WORKING, flush=True)
        STAGES[stage](f"{root}/{name}", tempfile.mkdtemp(dir=root))
        print(DONE, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
