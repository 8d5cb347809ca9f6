"""Extraction: write the frozen SDNet's factors of every training slice to a factor bank, each shard exactly once.

Each actor of a pool reads, encodes and writes whole shards. The ledger says which shards count. If an actor, a node or
the driver is killed, the shards that it had not committed are made again. The bank's bytes depend neither on the number
of actors nor on what was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actors.crew import Crew, that_fit
from actors.extractor import IN_FLIGHT, ExtractionSpec, Extractor
from actors.pool import Pool
from actors.progress import Progress
from actors.waiting import PATIENCE, Patience
from pipeline.samples.preprocess import PreprocessConfig, canvas_size, working_shapes
from storage import fs
from storage.bank.anatomy_codec import check_channels
from storage.bank.bank import BANK_INDEX_SCHEMA, BankSpec, FactorBank
from storage.bank.index import validated_index
from storage.errors import InputError, StageError
from storage.identity import identity
from storage.lock import bank_lock
from storage.slices.store import SliceStore
from storage.subjects import STRUCTURES_FIELD

if TYPE_CHECKING:
    import pyarrow as pa


ENTERS = "train"  # the only split whose slices may enter a bank
ROUNDS = 3  # of filling shards that are missing


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction did.

    slices: of the whole bank. shards_done: shards made now. shards_reused: shards that were committed before. seconds:
    wall-clock time.
    """

    slices: int
    shards_done: int
    shards_reused: int
    seconds: float


@dataclass(frozen=True)
class ExtractionActors:
    """The most actors that extract, and what each of them books. With any share of a GPU, an actor encodes on it."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def extract(
    spec: ExtractionSpec,
    actors: ExtractionActors = ExtractionActors(),
    progress: Progress | None = None,
    patience: Patience = PATIENCE,
) -> ExtractionReport:
    """Fill the bank of `spec` from the training slices of its run. Ray must be initialised.

    Committed shards are kept. Slices that the run has gained are appended. `progress` is called with (note, slices
    done, slices in all).
    Raises InputError if the bank there has another SDNet, preprocessing, shard size or data, if somebody else is
    filling it, if there are no training slices, or if the cluster is too small; StageError if a shard cannot be made or
    disappears again, or if no node has room for an actor.
    """
    began = time.perf_counter()
    run, sdnet_dir, bank_uri = map(fs.absolute, (spec.run, spec.sdnet_dir, spec.bank))
    gpu = actors.gpus > 0
    helpers = max(1, int(actors.cpus)) if gpu else 1
    work = replace(spec, run=run, sdnet_dir=sdnet_dir, bank=bank_uri, gpu=gpu, helpers=helpers)
    with bank_lock(bank_uri, patience.say):
        bank = prepare_bank(work)
        bank.tidy()
        if bank.is_sealed():
            return ExtractionReport(len(bank), 0, bank.shards(), time.perf_counter() - began)
        bank.unseal()
        done = bank.committed()
        told = ExtractionProgress(progress, len(bank), sum(len(bank.shard_rows(k)) for k in done))
        # Look again after each round: an actor that outlived an earlier driver may have been rewriting a shard.
        rounds = 0
        while todo := sorted(set(range(bank.shards())) - bank.committed()):
            if rounds == ROUNDS:
                raise StageError(f"{fs.base_name(bank_uri)}: shards vanish from its ledger; somebody else writes to it")
            rounds += 1
            with extractors(work, bank, replace(actors, count=min(actors.count, len(todo))), patience=patience) as pool:
                fill(pool, bank, todo, told.since(len(bank) - sum(len(bank.shard_rows(k)) for k in todo)))
            bank.tidy()
        bank.seal()
    return ExtractionReport(len(bank), bank.shards() - len(done), len(done), time.perf_counter() - began)


def extractors(
    work: ExtractionSpec,
    bank: FactorBank,
    actors: ExtractionActors,
    make: type[Extractor] = Extractor,
    patience: Patience = PATIENCE,
    abreast: int = 1,
) -> Pool[int]:
    """A pool whose actors fill shards of `bank`, which `work` names.

    An actor is `make(work)` and needs `abreast` shards at the same time to be busy. Raises InputError if the cluster
    cannot hold one actor.
    """

    def named(shard: int) -> str:
        """The shard with its first and last slice, for messages."""
        rows = bank.shard_rows(shard)
        first, last = (
            "{subject} frame {frame} slice {slice}".format(**bank.index.slice(row, 1).to_pylist()[0])
            for row in (rows.start, rows.stop - 1)
        )
        return f"{fs.base_name(bank.uri)}, shard {shard} ({len(rows)} slices, {first} to {last})"

    what = "an extraction actor"
    crew = Crew[int](
        stage="extract",
        what=what,
        make=make,
        arguments=(work,),
        method="extract",
        size=that_fit(actors.count, actors.cpus, actors.gpus, what),
        cpus=actors.cpus,
        gpus=actors.gpus,
        at_once=abreast + IN_FLIGHT - 1,
        in_flight=abreast + IN_FLIGHT - 1,
        abreast=abreast,
        part="encoded",
        named=named,
        remedy="lower bank_shard or resources.extract_actors, or use a machine with more memory",
    )
    return Pool(crew, patience)


def fill(pool: Pool[int], bank: FactorBank, shards: Iterable[int], told: Callable[[int], None]) -> None:
    """Extract these shards. Now and then `told` is given the number of slices done. Raises as `Pool.run` does."""
    slices = 0

    def tell() -> None:
        told(slices + pool.under_way)

    for shard, _ in pool.run(shards, news=tell):
        slices += len(bank.shard_rows(shard))
        tell()


def prepare_bank(work: ExtractionSpec) -> FactorBank:
    """The bank of this run, network and preprocessing. If it exists, the slices that it lacks are appended to its
    index; if not, it is created without shards. Raises InputError as `extract` does."""
    from pipeline.factors.names import factors_name
    from pipeline.networks.description import sdnet_fingerprint
    from pipeline.networks.files import decoder_state, load_sdnet

    store = SliceStore.open(work.run)
    model = load_sdnet(work.sdnet_dir)
    check_channels(model.config.anatomy_channels)
    slice_ids = np.flatnonzero(store.column("split") == ENTERS)
    if not len(slice_ids):
        raise InputError(fs.base_name(work.run), "has no training slices", "ingest subjects whose split is train")
    canvas = canvas_size(store, slice_ids, work.preprocess)
    spec = BankSpec(
        channels=model.config.anatomy_channels,
        modality_size=model.config.modality_size,
        canvas=canvas,
        shard_slices=work.shard_slices,
        sdnet_fingerprint=factors_name(sdnet_fingerprint(work.sdnet_dir), work.precision),
        preprocess=identity(work.preprocess),
    )
    index = bank_index(store, slice_ids, canvas, work.preprocess)
    return FactorBank.create(work.bank, spec, index, *decoder_state(model))


def bank_index(
    store: SliceStore, slice_ids: npt.NDArray[np.int64], canvas: tuple[int, int], preprocess: PreprocessConfig
) -> pa.Table:
    """The index of a bank: one row for each of `slice_ids`, in that order, with the columns of `BANK_INDEX_SCHEMA`.

    If a structure was not drawn in some mask of the store, a column `structures` follows. `canvas` is (H, W) in working
    pixels.
    """
    import pyarrow as pa

    taken = store.table.take(pa.array(slice_ids))
    extents = working_shapes(store, slice_ids, preprocess)
    corners = (np.array(canvas) - extents) // 2  # (N, 2) top and left, where `centre_on` puts the images
    columns = {name: taken[name] for name in BANK_INDEX_SCHEMA.names if name in taken.column_names}
    columns |= {
        "row": np.arange(len(slice_ids)),
        "pixel_area_mm2": taken["pixel_area_mm2"].to_numpy() / preprocess.factor**2,
        "height": extents[:, 0],
        "width": extents[:, 1],
        "top": corners[:, 0],
        "left": corners[:, 1],
        "native_height": taken["height"],
        "native_width": taken["width"],
        "native_row_mm": taken["row_mm"],
        "native_col_mm": taken["col_mm"],
    }
    index = pa.table({name: columns[name] for name in BANK_INDEX_SCHEMA.names}).cast(BANK_INDEX_SCHEMA)
    if store.partly_labelled:
        index = index.append_column(STRUCTURES_FIELD, taken[STRUCTURES_FIELD.name].cast(STRUCTURES_FIELD.type))
    return validated_index(index)


class ExtractionProgress:
    """Reports how many slices are done, how many a second, and the time left. The number never goes back."""

    def __init__(self, progress: Progress | None, total: int, reused: int) -> None:
        self._progress, self._total, self._reused, self._most = progress, total, reused, -1
        self._began = time.perf_counter()
        self._tell(reused)

    def since(self, base: int) -> Callable[[int], None]:
        """A function to call with the number of slices that are done, besides `base` slices done before."""
        return lambda slices: self._tell(base + slices)

    def _tell(self, done: int) -> None:
        if done <= self._most:
            return
        if self._most == self._reused:  # the clock starts with the first slices; the time before is start-up
            self._first, self._from = time.perf_counter(), done
        self._most = done
        note = "slices"
        if done > self._reused and done > self._from:
            rate = (done - self._from) / (time.perf_counter() - self._first)
            note += f", {rate:.3g} a second, {_duration((self._total - done) / rate)} left"
        if self._progress is not None:
            self._progress(note, done, self._total)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
