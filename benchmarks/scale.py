"""How time and memory of what passes over every slice grow with the slices: 10⁴, 10⁵ and 10⁶ rows, without pixels.

A run as `ablate paper` leaves it, drawn up instead of made: 250 slices a subject (25 frames of 10), four fifths of the
subjects in training, two frames of each labelled, a bank of all training slices in shards of 64. Every stage has a
process of its own (`python -m benchmarks.scale STAGE RUN`), whose peak of resident memory is read at its end, libraries
included. What is in the node's cache is there beforehand, but for the stage `fill`.

Lay the run on a disk in memory (TMPDIR=/dev/shm) if the disk is slow: a million slices are 63,000 small files.
"""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from experiments.config import Settings
    from storage.bank.arrays import ShardFile
    from storage.bank.spec import BankSpec
    from storage.slices.store import SliceStore

SIZES = (10_000, 100_000, 1_000_000)
FRAMES, DEPTH, SIDE, CANVAS, SHARD = 25, 10, 8, (16, 16), 64
TERMS = "M&Ms (Campello et al. 2021): for research alone, cite the paper; nothing of it may be passed on to others. "


def run() -> dict[str, Any]:
    """Seconds in which a maker of samples starts; the JSON line compares 10⁶ rows with 10⁵, where 10 is linear."""
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    for rows in SIZES:
        with tempfile.TemporaryDirectory(prefix="cardiomix-scale-") as place:
            environment = os.environ | {"CARDIOMIX_CACHE": f"{place}/cache"}
            for name in ("draw_up", *STAGES):
                command = [sys.executable, "-m", "benchmarks.scale", name, f"{place}/run", str(rows)]
                said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                took, busy, peak = map(float, said.split()[-3:])
                if name in seconds:
                    seconds[name].append(took)
                    shown = f"{took:8.2f} s, {busy:.2f} s of a processor, {peak / 1e6:.0f} MB at its peak"
                    print(f"{rows:>9,} rows  {name:11} {shown}", flush=True)
    small, large = seconds["maker"][-2:]
    return {"ratio": round(large / small, 1), "ours": round(large, 2), "reference": round(small, 2), "unit": "s"}


def draw_up(run: str, rows: int) -> None:
    """A run of so many slices, without their pixels."""
    from experiments import config
    from pipeline.networks.description import sdnet_fingerprint
    from pipeline.networks.files import decoder_state, save_model
    from pipeline.networks.sdnet import SDNet
    from storage.identity import identity
    from storage.slices.store import SliceStore

    write_slices(run, -(-rows // (FRAMES * DEPTH)))
    settings, sdnet = make_settings(run), f"{run}/sdnet"
    model, preprocess = SDNet(settings.sdnet), identity(settings.preprocess)
    save_model(sdnet, model, settings.sdnet, preprocess, ["phantom"])
    config.save(settings, run)
    made_by = {"sdnet_fingerprint": sdnet_fingerprint(sdnet), "preprocess": preprocess}
    write_bank(f"{run}/bank.zarr", SliceStore.open(run), made_by, decoder_state(model))


def write_slices(run: str, subjects: int) -> None:
    """The index of a slice store, four fifths of it for training."""
    from storage.layouts import LayoutOptions
    from storage.slices.writer import StoredSubject, finalise
    from storage.subjects import Subject

    rng = np.random.default_rng(0)
    known, stored = [], {}
    for number in range(subjects):
        name, place = f"P{number:07d}", ("mnms", "ABCD"[number % 4], str(number % 7))
        split = {8: "validation", 9: "test"}.get(number % 10, "train")
        known.append(Subject(name, *place, (), split, "listed", labels=(), terms=TERMS))
        facts = [_facts(frame, rng.normal(300, 50)) for frame in range(FRAMES)]
        stored[name] = StoredSubject(tuple(facts), ())
    finalise(run, stored, [], known, LayoutOptions(frames="all"))


def _facts(frame: int, level: float) -> dict[str, Any]:
    phase = {0: "ED", 9: "ES"}.get(frame, "-")
    sizes = {"slices": DEPTH, "height": SIDE, "width": SIDE, "slice_mm": 10.0, "row_mm": 1.25, "col_mm": 1.25}
    values = {"mean": level, "std": level / 3, "min": 0.0, "max": level * 9, "p005": 1.0, "p995": level * 5}
    facts = {"phase": phase, "frame": frame, "pixel_area_mm2": 1.5625, "labelled": phase != "-"}
    return {
        **facts,
        **sizes,
        "scale": 1.0,
        "offset": 0.0,
        **{f"volume_{name}": value for name, value in values.items()},
    }


def write_bank(
    uri: str,
    store: SliceStore,
    made_by: dict[str, Any],
    decoder: tuple[bytes, dict[str, Any]],
    shard_slices: int = SHARD,
) -> None:
    """A complete bank of a store's training slices. Every shard has the same factors and so the same files."""
    from storage.bank import ledger
    from storage.bank.arrays import ARRAYS, shard_uri
    from storage.bank.bank import FactorBank
    from storage.bank.index import row_digests
    from storage.bank.spec import BankSpec, code_version, sha256

    spec = BankSpec(channels=8, modality_size=8, canvas=CANVAS, shard_slices=shard_slices, **made_by)
    bank = FactorBank.create(uri, spec, _bank_index(store), *decoder)
    files = {length: _shard(spec, length) for length in {len(bank.shard_rows(k)) for k in (0, bank.shards() - 1)}}
    digests = row_digests(bank.index, map(bank.shard_rows, range(bank.shards())))
    for shard in range(bank.shards()):
        rows = bank.shard_rows(shard)
        contents = {name: file.content() for name, file in files[len(rows)].items()}
        values = {name: file.values_sha256() for name, file in files[len(rows)].items()}
        checksums = {name: sha256(content) for name, content in contents.items()}
        for name in ARRAYS:
            _plain(shard_uri(uri, name, shard), contents[name])
        made = (digests[shard], spec.sdnet_fingerprint, code_version())
        entry = ledger.Entry(rows.start, rows.stop, values, checksums, *made)
        _plain(ledger.entry_uri(uri, shard), ledger.document(entry).encode())
    bank.seal()


def _bank_index(store: SliceStore) -> pa.Table:
    from storage.bank.index import BANK_INDEX_SCHEMA

    taken = store.table.take(pa.array(np.flatnonzero(store.column("split") == "train")))
    corner = pa.array(np.full(taken.num_rows, (CANVAS[0] - SIDE) // 2))
    own = {"row": pa.array(np.arange(taken.num_rows)), "top": corner, "left": corner}
    native = {f"native_{name}": taken[name] for name in ("height", "width", "row_mm", "col_mm")}
    columns = {**dict(zip(taken.column_names, taken.columns, strict=True)), **own, **native}
    return pa.table([columns[field.name].cast(field.type) for field in BANK_INDEX_SCHEMA], schema=BANK_INDEX_SCHEMA)


def _shard(spec: BankSpec, length: int) -> dict[str, ShardFile]:
    """The files of a shard of so many slices."""
    from storage.bank.arrays import ARRAYS, ShardFile

    rng, files = np.random.default_rng(length), {name: ShardFile(name, spec) for name in ARRAYS}
    for _ in range(length):
        anatomy = np.zeros(CANVAS, np.uint8)
        top, left = ((side - SIDE) // 2 for side in CANVAS)
        anatomy[top : top + SIDE, left : left + SIDE] = rng.integers(0, 256, (SIDE, SIDE))
        code = rng.standard_normal(spec.modality_size).astype(np.float32)
        for name, values in (("anatomy", anatomy), ("mask", np.zeros(CANVAS, np.uint8)), ("modality", code)):
            files[name].append(files[name].encoded(values))
    return files


def _plain(path: str, content: bytes) -> None:
    """Written without waiting for the disk."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(content)


def make_settings(run: str) -> Settings:
    """Of a small network, pretrained beside the run."""
    from experiments.config import demo, override

    widths = [f"sdnet.{part}_width=4" for part in ("anatomy", "modality", "segmentor", "decoder")]
    grid = ["preprocess.size=32", "preprocess.field=32", "layouts.frames=all"]
    return override(demo(), [*widths, *grid, f"pretrained={run}/sdnet"])


def open_both(run: str) -> None:
    """The slice store's index and the bank."""
    from storage.bank.bank import FactorBank
    from storage.slices.store import SliceStore

    assert len(SliceStore.open(run)) and len(FactorBank.open(f"{run}/bank.zarr"))


def fingerprint(run: str) -> None:
    """The names of the data and of the bank."""
    from storage.bank.bank import FactorBank
    from storage.slices.store import SliceStore

    _ = SliceStore.open(run).fingerprint
    _ = FactorBank.open(f"{run}/bank.zarr").fingerprint


def fill(run: str) -> None:
    """The node's cache, from the bank's shards."""
    from storage.bank.bank import FactorBank
    from storage.bank.node_cache import BankView

    view = BankView(FactorBank.open(f"{run}/bank.zarr"))
    _ = view.anatomy, view.modality


def maker(run: str) -> None:
    """What a data actor of the FA arm holds before its first sample."""
    from experiments.run.jobs import arm_stream
    from pipeline.samples.maker import SampleMaker

    SampleMaker(arm_stream(run, make_settings(run), "ss_sdnet_ra_fa"))


def plan(run: str) -> None:
    """What the driver does before and between stages: what is left to do, whether it can be done, every arm's job."""
    from experiments.run import jobs
    from experiments.run.workload import workload

    settings = make_settings(run)
    workload(run, settings)
    jobs.require_trainable(run, settings)
    assert len(jobs.arm_runs(run, settings)) == len(settings.arms)


STAGES: dict[str, Callable[[str], None]] = {
    "open": open_both,
    "fingerprint": fingerprint,
    "fill": fill,
    "maker": maker,
    "plan": plan,
}


def main(name: str, run: str, rows: str) -> None:
    """One stage; prints its seconds by the clock and of the processor, without imports, and the process's peak of
    resident memory in bytes."""
    for module in ("torch", "experiments.run.workload", "pipeline.samples.drawing", "pipeline.samples.maker"):
        importlib.import_module(module)
    began, idle = time.perf_counter(), time.process_time()
    if name == "draw_up":
        draw_up(run, int(rows))
    else:
        STAGES[name](run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.perf_counter() - began, time.process_time() - idle, peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
