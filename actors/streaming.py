"""The sample stream: warm Ray Data actors turn one long plan into batches, in order (FA, then RA)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipeline.preprocess import PreprocessConfig, WorkingSlice, working_slice
from pipeline.rescale import linear_scale, resample_crop
from pipeline.sample_plan import PlanConfig, Sample, StepPlan, Stream
from storage.bank_index import Key, slice_keys
from storage.errors import InputError
from storage.factor_bank import FactorBank
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    import torch

STEPS_PER_BLOCK = 8  # small blocks start a stream sooner, large ones cost less each; 8 steps of 8 rows measured well
CACHED_SLICES = 4096


class StreamConfig(BaseModel):
    """All that defines an arm's stream: data, augmentation and seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    bank: str | None
    preprocess: PreprocessConfig
    plan: PlanConfig
    seed: int
    semi_supervised: bool
    ra: bool
    fa: bool
    batch_size: int


def step_plan(config: StreamConfig, store: SliceStore, bank: FactorBank | None = None) -> StepPlan:
    """The plan over the store's training slices; modality donors are the rows of the bank and its imported styles.

    Raises InputError if a pool that the arm needs is empty.
    """
    train = store.column("split") == "train"
    labelled_mask = store.column("labelled").astype(bool)
    vendors = store.column("vendor")
    labelled, unlabelled = np.flatnonzero(train & labelled_mask), np.flatnonzero(train & ~labelled_mask)
    if not len(labelled):
        raise InputError(config.run, "no labelled training slices", "ingest labelled subjects whose split is train")
    per_step = round(config.batch_size * config.plan.unlabelled_ratio) if config.semi_supervised else 0
    if per_step and not len(unlabelled):
        raise InputError(
            config.run,
            "a semi-supervised arm needs unlabelled training slices",
            "add unlabelled subjects or leave it out",
        )
    donor_vendors = bank.donors().vendor if bank is not None else None

    def stream(name: str, pool: npt.NDArray[np.int64], fa: bool = True, ra: bool = True) -> Stream:
        return Stream(
            config.seed,
            name,
            pool,
            fa_share=config.plan.fa_share if bank is not None and fa else 0.0,
            ra_range=config.plan.area_range_mm2 if config.ra and ra else None,
            pairs=config.plan.pairs,
            donors=np.arange(len(donor_vendors)) if donor_vendors is not None else None,
            donor_vendors=donor_vendors,
            pool_vendors=vendors[pool],
            flips=config.plan.flips,
        )

    return StepPlan(
        stream("labelled", labelled),
        stream("unlabelled", unlabelled, config.plan.fa_anatomy == "any", config.plan.ra_unlabelled)
        if per_step
        else None,
        config.batch_size,
        per_step,
    )


def open_bank(config: StreamConfig, store: SliceStore) -> FactorBank | None:
    """The bank of an arm with FA, checked against the run.

    Raises InputError if there is none, it was made on another working grid, it lacks one of the run's training slices,
    or it holds a subject that this run validates or tests on.
    """
    if not config.fa:
        return None
    if config.bank is None:
        raise InputError(config.run, "an arm with FA needs a factor bank", "run `cardiomix extract`, or pass --bank")
    bank = FactorBank.open(config.bank)
    if bank.spec.preprocess != config.preprocess.model_dump(mode="json"):
        raise InputError(
            config.bank,
            "was made with another preprocessing",
            f"use --set preprocess… as in the bank: {bank.spec.preprocess}",
        )
    held_out = set(store.column("subject")[np.isin(store.column("split"), ("validation", "test"))].tolist())
    leaked = sorted(held_out & set(bank.donors().subject.tolist()))
    if leaked:
        raise InputError(
            config.bank,
            f"holds {leaked[0]}, which this run validates or tests on",
            "use a bank made without these subjects",
        )
    missing = len(set(_keys_of_training(store)) - set(_bank_rows(bank)))
    if missing:
        raise InputError(
            config.bank, f"lacks {missing} of the run's training slices", "run `cardiomix extract` on this run's slices"
        )
    return bank


def _keys(store: SliceStore, ids: npt.NDArray[np.int64]) -> list[Key]:
    """(subject, frame, slice): names a slice in a store and in a bank, wherever each was made."""
    return slice_keys(store.table.take(ids))


def _keys_of_training(store: SliceStore) -> list[Key]:
    return _keys(store, np.flatnonzero(store.column("split") == "train"))


def _bank_rows(bank: FactorBank) -> dict[Key, int]:
    return {key: row for row, key in enumerate(slice_keys(bank.index))}


class SampleMaker:
    """Makes the samples of whole steps. Holds the slice store and, for FA, the bank and its decoder."""

    def __init__(self, config: StreamConfig, rank: int = 0, world: int = 1, threads: int = 1) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.store = SliceStore.open(config.run)
        bank = open_bank(config, self.store)
        self.plan = step_plan(config, self.store, bank)
        self._working = lru_cache(maxsize=CACHED_SLICES)(lambda i: working_slice(self.store, i, config.preprocess))
        if bank is not None:
            self._load_factors(bank, threads)

    def _load_factors(self, bank: FactorBank, threads: int) -> None:
        import torch

        from pipeline.networks.files import load_decoder

        torch.set_num_threads(threads)
        weights, decoder_config = bank.decoder()
        self._decoder = load_decoder(weights, decoder_config)
        self._channels = int(decoder_config["anatomy_channels"])
        self._anatomies, self.donors = bank.view().anatomy, bank.donors()  # mapped: this node holds them once
        self._place = {name: bank.index[name].to_numpy() for name in ("top", "left", "height", "width")}
        rows, ids = _bank_rows(bank), np.flatnonzero(self.store.column("split") == "train")
        self._row_of = {int(i): rows[key] for i, key in zip(ids, _keys(self.store, ids), strict=True)}

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """{"step": (k,) int64} → image (n, 1, S, S) float32, mask (n, S, S) uint8, labelled (n,) bool, slice_id
        (n,)."""
        planned = [s for step in block["step"] for s in self.plan.samples(int(step), self.rank, self.world)]
        size = self.config.preprocess.size
        image = np.empty((len(planned), 1, size, size), dtype=np.float32)
        mask = np.zeros((len(planned), size, size), dtype=np.uint8)
        for k, (sample, labelled) in enumerate(planned):
            image[k, 0], labels = self.make(sample)
            if labelled:
                mask[k] = labels
        return {
            "image": image,
            "mask": mask,
            "labelled": np.array([labelled for _, labelled in planned]),
            "slice_id": np.array([s.slice_id for s, _ in planned]),
        }

    def make(self, sample: Sample) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Image (S, S) float32 in [-1, 1] and mask (S, S) uint8 of a planned sample: FA, then RA and crop."""
        source = self._working(sample.slice_id)
        config = self.config.preprocess
        ra_first = self.config.plan.fa_order == "ra_first"
        if sample.donor_id is not None and not ra_first:
            source = WorkingSlice(
                self._drawn(self._anatomy(sample.slice_id), sample.donor_id), source.mask, source.area
            )
        scale = self._scale(sample, source)
        fill = float(source.image.min())
        image, mask = resample_crop(source.image, source.mask, scale, config.size, fill, sample.flip)
        if sample.donor_id is not None and ra_first:
            bits = self._anatomy(sample.slice_id)
            labels = (bits, np.ones_like(bits))
            anatomy, inside = (resample_crop(source.image, v, scale, config.size, 0.0, sample.flip)[1] for v in labels)
            image = self._drawn(anatomy, sample.donor_id)
            image[inside == 0] = image[inside > 0].min()
        return image, mask

    def pixel_area(self, sample: Sample) -> float:
        """mm² of a pixel of the sample that `make` makes."""
        source = self._working(sample.slice_id)
        return source.area / self._scale(sample, source) ** 2

    def _scale(self, sample: Sample, source: WorkingSlice) -> float:
        if sample.area is None:
            return 1.0
        plan, factor = self.config.plan, self.config.preprocess.factor
        return linear_scale(source.area, sample.area / factor**2, plan.ra_measure)

    def _anatomy(self, slice_id: int) -> npt.NDArray[np.uint8]:
        """The slice's packed anatomy (h, w), its true extent alone: AdaIN averages over what it is given, and padding
        is no part of the image."""
        row = self._row_of[slice_id]
        top, left, height, width = (int(self._place[name][row]) for name in ("top", "left", "height", "width"))
        return self._anatomies[row, top : top + height, left : left + width]

    def _drawn(self, anatomy: npt.NDArray[np.uint8], donor: int) -> npt.NDArray[np.float32]:
        """(h, w) → (h, w) in (-1, 1), as the donor's scanner would draw it."""
        from pipeline.synthesis import synthesize

        donor_1M = self.donors.modality[donor : donor + 1]
        drawn: npt.NDArray[np.float32] = synthesize(self._decoder, self._channels, anatomy[None], donor_1M)[0]
        return drawn


def batches(
    config: StreamConfig,
    steps: range,
    *,
    rank: int = 0,
    world: int = 1,
    actors: int = 1,
    cpus: float = 0.25,
    device: str = "cpu",
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `steps` for one train worker, in order: one Ray Data execution over the whole range.

    The same bytes for any number of actors; a lost actor's block is made again.
    """
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    store = SliceStore.open(config.run)
    rows = step_plan(config, store, open_bank(config, store)).rows(rank, world)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    numbers = np.arange(steps.start, steps.stop, dtype=np.int64)
    blocks = [pa.table({"step": numbers[i : i + STEPS_PER_BLOCK]}) for i in range(0, len(numbers), STEPS_PER_BLOCK)]
    made = ray.data.from_arrow(blocks).map_batches(
        SampleMaker,
        fn_constructor_kwargs={"config": config, "rank": rank, "world": world},
        batch_size=None,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=cpus,
    )
    yield from made.iter_torch_batches(batch_size=rows, prefetch_batches=2, device=device)
