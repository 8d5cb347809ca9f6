"""Extraction: the frozen SDNet's factors of every training slice, into a factor bank.

A pool of actors, each of which reads, encodes and writes one whole shard a call. The ledger says which shards count, so
that a killed actor's call, or a killed driver's run, is simply made again; the bank's bytes are the same however many
actors there are and whatever was killed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.preprocess import PreprocessConfig, canvas_size, centre_on, working_shape, working_slice
from pipeline.rescale import resample_crop
from storage import uri
from storage.anatomy_codec import check_channels, pack
from storage.errors import InputError
from storage.factor_bank import BANK_INDEX_SCHEMA, BankSpec, FactorBank
from storage.run_lock import lock
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.networks.sdnet import SDNet

Progress = Callable[[str, int, int], None]

# A network's bits depend a little on its batch size, so it is a constant; the last batch of a shard is filled up.
BATCH = 4
QUEUED = 2  # shards in flight an actor: the next is there when one is done
START_TIMEOUT_S = 300.0
ENTERS = "train"  # the one split that may enter a bank


@dataclass(frozen=True)
class ExtractionReport:
    """What a bank holds and what was done for it now; `slices` are the bank's, `seconds` wall-clock."""

    slices: int
    shards_done: int
    shards_reused: int
    seconds: float


def extract(
    run: str,
    sdnet_dir: str,
    bank_uri: str,
    preprocess: PreprocessConfig,
    *,
    actors: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    threads: int = 1,
    shard_slices: int = 64,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Fill the bank at `bank_uri` from the run's training slices; committed shards stay. Ray must be initialised.

    Args: sdnet_dir, the frozen network's folder; actors, at most, each booking `num_cpus` and `num_gpus` and using
    `threads` torch threads (which the bits may depend on); progress, called with (note, slices done, slices).
    Raises InputError if the bank there is of another SDNet, preprocessing or data, if somebody else is filling it, if
    there are no training slices, or if the cluster is too small.
    """
    began = time.perf_counter()
    run, sdnet_dir, bank_uri = (_absolute(place) for place in (run, sdnet_dir, bank_uri))
    with lock(f"{bank_uri.rstrip('/')}.lock", uri.base_name(bank_uri)):
        bank = prepare_bank(run, sdnet_dir, bank_uri, preprocess, shard_slices)
        bank.tidy()
        done = bank.committed()
        told = _Told(progress, len(bank), sum(len(bank.shard_rows(k)) for k in done))
        # Once more than needed: an actor that outlived an earlier driver may have been rewriting a shard meanwhile.
        while todo := sorted(set(range(bank.shards())) - bank.committed()):
            pool = _Pool(_actors_that_fit(min(actors, len(todo)), num_cpus, num_gpus), num_cpus, num_gpus)
            pool.run((run, sdnet_dir, bank_uri, preprocess, threads), todo, lambda k: told.add(len(bank.shard_rows(k))))
            bank.tidy()
    return ExtractionReport(len(bank), bank.shards() - len(done), len(done), time.perf_counter() - began)


def prepare_bank(
    run: str, sdnet_dir: str, bank_uri: str, preprocess: PreprocessConfig, shard_slices: int
) -> FactorBank:
    """The bank that this run, network and preprocessing make, created or found; see `extract` for what is refused."""
    from pipeline.networks.files import decoder_state, load_sdnet, sdnet_fingerprint

    store = SliceStore.open(run)
    model = load_sdnet(sdnet_dir)
    check_channels(model.config.anatomy_channels)
    slice_ids = np.flatnonzero(store.column("split") == ENTERS)
    if not len(slice_ids):
        raise InputError(uri.base_name(run), "has no training slices", "ingest subjects whose split is train")
    canvas = canvas_size(store, slice_ids.tolist(), preprocess)
    index = bank_index(store, slice_ids, canvas, preprocess)
    spec = BankSpec(
        channels=model.config.anatomy_channels,
        modality_size=model.config.modality_size,
        canvas=canvas,
        shard_slices=shard_slices,
        sdnet_fingerprint=sdnet_fingerprint(sdnet_dir),
        preprocess=preprocess.model_dump(mode="json"),
        terms=tuple(sorted(set(index["terms"].to_pylist()))),
    )
    return FactorBank.create(bank_uri, spec, index, *decoder_state(model))


def bank_index(
    store: SliceStore, slice_ids: npt.NDArray[np.int64], canvas: tuple[int, int], preprocess: PreprocessConfig
) -> pa.Table:
    """One row for each given slice, in that order, with the columns of `BANK_INDEX_SCHEMA`."""
    import pyarrow as pa

    taken = store.table.take(pa.array(slice_ids))
    grids = zip(*(taken[n].to_pylist() for n in ("height", "width", "row_mm", "col_mm")), strict=True)
    extents = np.array([working_shape(h, w, row, col, preprocess) for h, w, row, col in grids])  # (N, 2)
    corners = (np.array(canvas) - extents) // 2  # where `centre_on` puts them
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
    return pa.table({name: columns[name] for name in BANK_INDEX_SCHEMA.names}).cast(BANK_INDEX_SCHEMA)


class Extractor:
    """One actor: the frozen SDNet, the slice store and the bank, opened once."""

    def __init__(self, run: str, sdnet_dir: str, bank_uri: str, preprocess: PreprocessConfig, threads: int) -> None:
        self._sources = (run, sdnet_dir, bank_uri)
        self._preprocess = preprocess
        self._threads = threads

    def start(self) -> InputError | None:
        """Open everything. Bad input is an answer, not a crash, so that it reaches the driver as it is."""
        import torch

        from pipeline.networks.files import default_device, load_sdnet, sdnet_fingerprint

        run, sdnet_dir, bank_uri = self._sources
        torch.set_num_threads(self._threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
        torch.backends.cudnn.benchmark = False  # which picks algorithms by their speed that day
        torch.backends.cudnn.deterministic = True
        try:
            self._store = SliceStore.open(run)
            self._bank = FactorBank.open(bank_uri, partial=True)
            found, wanted = sdnet_fingerprint(sdnet_dir), self._bank.spec.sdnet_fingerprint
            if found != wanted:
                return InputError(uri.base_name(sdnet_dir), f"is now {found}, not {wanted}", "extract to a new bank")
            model = load_sdnet(sdnet_dir)
        except InputError as error:
            return error
        model.requires_grad_(False)
        self._model = model.to(default_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        return None

    def extract(self, shard: int) -> InputError | None:
        """Read, encode and write one shard, unless it is committed: after an actor's death Ray makes the call again."""
        if not hasattr(self, "_model"):  # restarted since `start`
            problem = self.start()
            if problem is not None:
                return problem
        try:
            if shard not in self._bank.committed():
                self._bank.write_shard(shard, *self._factors(shard))
        except InputError as error:
            return error
        return None

    def _factors(self, shard: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """anatomy (n, H, W) packed, modality (n, M) and mask (n, H, W) of a shard's rows."""
        rows = self._bank.shard_rows(shard)
        slice_ids = self._bank.index["slice_id"].to_numpy()[rows.start : rows.stop]
        canvas, crop, mask = views(self._store, slice_ids, self._bank.spec.canvas, self._preprocess)
        anatomy, modality = encode(self._model, canvas, crop)
        if not np.isfinite(modality).all():
            raise InputError(
                uri.base_name(self._sources[1]),
                "its modality is not finite",
                "pretrain again with a lower learning rate",
            )
        return anatomy, modality, mask


def views(
    store: SliceStore, slice_ids: npt.NDArray[np.int64], canvas: tuple[int, int], preprocess: PreprocessConfig
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """What the network sees of each slice, and its mask: canvas (n, H, W), crop (n, size, size), mask (n, H, W).

    Anatomy is wanted of the whole field of view, so it is taken from the image on the canvas. The modality encoder
    averages over all it sees: over a canvas it would also average padding, whose share depends on the matrix size and
    on the largest slice of the bank. It gets the very crop that training made, half-pixel shifts of odd sizes included.
    Both are filled with the slice's minimum.
    """
    images = np.empty((len(slice_ids), *canvas), dtype=np.float32)
    crops = np.empty((len(slice_ids), preprocess.size, preprocess.size), dtype=np.float32)
    masks = np.empty((len(slice_ids), *canvas), dtype=np.uint8)
    for k, slice_id in enumerate(slice_ids):
        working = working_slice(store, int(slice_id), preprocess)
        fill = float(working.image.min())
        images[k], _, _ = centre_on(working.image, canvas, fill)
        crops[k], _ = resample_crop(working.image, working.mask, 1.0, preprocess.size, fill)
        masks[k], _, _ = centre_on(working.mask, canvas, 0)
    return images, crops, masks


def encode(
    model: SDNet, canvas_NHW: npt.NDArray[np.float32], crop_NSS: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Packed anatomy (N, H, W) uint8 of the canvases and modality (N, M) float32 of the crops, `BATCH` at a time."""
    import torch

    device = next(model.parameters()).device
    anatomy = np.empty(canvas_NHW.shape, dtype=np.uint8)
    modality = np.empty((len(canvas_NHW), model.config.modality_size), dtype=np.float32)

    def batch(images: npt.NDArray[np.float32]) -> torch.Tensor:
        filled = np.zeros((BATCH, 1, *images.shape[1:]), dtype=np.float32)  # one shape for all batches
        filled[: len(images), 0] = images
        return torch.from_numpy(filled).to(device, memory_format=torch.channels_last)

    with torch.inference_mode():
        for i in range(0, len(canvas_NHW), BATCH):
            n = min(BATCH, len(canvas_NHW) - i)
            binary = model.encode_anatomy(batch(canvas_NHW[i : i + n]))[:n]
            anatomy[i : i + n] = pack(binary.bool().cpu().numpy())
            modality[i : i + n] = model.encode_modality(batch(crop_NSS[i : i + n]))[:n].float().cpu().numpy()
    return anatomy, modality


class _Pool:
    """Extractors, and who has how many shards in flight."""

    def __init__(self, size: int, num_cpus: float, num_gpus: float) -> None:
        self.size, self.num_cpus, self.num_gpus = size, num_cpus, num_gpus

    def run(self, arguments: tuple[Any, ...], todo: list[int], done: Callable[[int], None]) -> None:
        """Extract every shard of `todo`; `done` hears of each. Shards go only to actors that have started."""
        import ray

        remote: Any = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_restarts=-1, max_task_retries=-1)(
            Extractor
        )
        pool = [remote.remote(*arguments) for _ in range(self.size)]
        try:
            self._drive(pool, deque(todo), done)
        finally:
            for actor in pool:
                ray.kill(actor)

    def _drive(self, pool: list[Any], waiting: deque[int], done: Callable[[int], None]) -> None:
        import ray

        starting = {actor.start.remote(): actor for actor in pool}
        working: dict[Any, tuple[Any, int]] = {}
        load = dict.fromkeys(pool, 0)
        left = len(waiting)
        while left:
            timeout = None if working else START_TIMEOUT_S
            ready, _ = ray.wait([*working, *starting], num_returns=1, timeout=timeout)
            if not ready:
                problem = f"no extraction actor has started in {START_TIMEOUT_S:.0f} s, each needs {self._needs()}"
                raise InputError("resources", problem, "end what else uses the cluster, or add nodes")
            (reference,) = ready
            problem_found = ray.get(reference)
            if problem_found is not None:
                raise problem_found
            if reference in starting:
                actor = starting.pop(reference)
            else:
                actor, shard = working.pop(reference)
                load[actor] -= 1
                left -= 1
                done(shard)
            # Towards the end nobody hoards: a second shard goes out only while there is one for each of the others.
            while waiting and load[actor] < (QUEUED if len(waiting) >= len(pool) else 1):
                shard = waiting.popleft()
                working[actor.extract.remote(shard)] = (actor, shard)
                load[actor] += 1
            if not load[actor]:
                ray.kill(actor)  # its share of the machine may be what a restarting one waits for

    def _needs(self) -> str:
        return f"{self.num_cpus:g} CPUs" + (f" and {self.num_gpus:g} GPUs" if self.num_gpus else "")


def _actors_that_fit(wanted: int, num_cpus: float, num_gpus: float) -> int:
    """How many of the wanted actors the whole cluster can hold. Raises InputError if it is none."""
    import ray

    resources = ray.cluster_resources()
    fit = wanted
    for name, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        there = float(resources.get(name, 0.0))
        if there < need:
            raise InputError(
                "resources", f"extraction needs {need:g} {name}s an actor, the cluster has {there:g}", "add nodes"
            )
        if need:
            fit = min(fit, int(there / need + 1e-6))
    return max(1, fit)


def _absolute(place: str) -> str:
    """Actors may run in another working folder than the driver."""
    return str(uri.local_path(place).absolute()) if uri.is_local(place) else place


class _Told:
    """Tells how far it is, and how fast."""

    def __init__(self, progress: Progress | None, total: int, reused: int) -> None:
        self._progress, self._total, self._reused, self._done = progress, total, reused, reused
        self._began = time.perf_counter()
        self.add(0)

    def add(self, slices: int) -> None:
        """More slices are committed."""
        self._done += slices
        seconds = time.perf_counter() - self._began
        note = (
            f"slices, {(self._done - self._reused) / seconds:.1f} a second" if self._done > self._reused else "slices"
        )
        if self._progress is not None:
            self._progress(note, self._done, self._total)
