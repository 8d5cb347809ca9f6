"""Makes planned samples: decode (FA), then rescale and crop (RA)."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.stream_config import StreamConfig, bank_rows, keys_of, open_bank, step_plan
from pipeline.preprocess import WorkingSlice, working_slice
from pipeline.rescale import linear_scale, resample_crop
from pipeline.sample_plan import Sample
from storage.factor_bank import FactorBank
from storage.slice_store import SliceStore

CACHED_SLICES = 4096
MADE_S, MADE_AT = "made_s", "made_at"


class SampleMaker:
    """Makes the samples of whole steps. Holds the slice store and, for FA, the bank and its decoder."""

    def __init__(self, config: StreamConfig, rank: int = 0, world: int = 1, threads: int = 1) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.store = SliceStore.open(config.run)
        self.bank = open_bank(config, self.store)
        self.plan = step_plan(config, self.store, self.bank)
        self.working = lru_cache(maxsize=CACHED_SLICES)(lambda i: working_slice(self.store, i, config.preprocess))
        if self.bank is not None:
            self._load_factors(self.bank, threads)

    def _load_factors(self, bank: FactorBank, threads: int) -> None:
        import torch

        from pipeline.networks.files import load_decoder

        torch.set_num_threads(threads)
        weights, decoder_config = bank.decoder()
        self._decoder = load_decoder(weights, decoder_config)
        self._channels = int(decoder_config["anatomy_channels"])
        self._anatomies, self.donors = bank.view().anatomy, bank.donors()  # mapped: this node holds them once
        self._place = {name: bank.index[name].to_numpy() for name in ("top", "left", "height", "width")}
        rows, ids = bank_rows(bank), np.flatnonzero(self.store.column("split") == "train")
        self._row_of = {int(i): rows[key] for i, key in zip(ids, keys_of(self.store, ids), strict=True)}

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """{"step": (k,) int64} → image (n, 1, S, S) float32, mask (n, S, S) uint8, labelled (n,) bool, slice_id (n,).

        Beside them, for whoever watches: made_s (n,) float64, seconds that each took; made_at (n,) float64, when it was
        ready, in seconds since 1970.
        """
        began = time.perf_counter()
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
            MADE_S: np.full(len(planned), (time.perf_counter() - began) / len(planned)),
            MADE_AT: np.full(len(planned), time.time()),
        }

    def make(self, sample: Sample) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Image (S, S) float32 in [-1, 1] and mask (S, S) uint8 of a planned sample: FA, then RA and crop."""
        source = self.working(sample.slice_id)
        config = self.config.preprocess
        ra_first = self.config.plan.fa_order == "ra_first"
        if sample.donor_id is not None and not ra_first:
            source = WorkingSlice(self._drawn(self.anatomy(sample.slice_id), sample.donor_id), source.mask, source.area)
        scale = self.scale(sample, source)
        fill = float(source.image.min())
        image, mask = resample_crop(source.image, source.mask, scale, config.size, fill, sample.flip)
        if sample.donor_id is not None and ra_first:
            bits = self.anatomy(sample.slice_id)
            labels = (bits, np.ones_like(bits))
            anatomy, inside = (resample_crop(source.image, v, scale, config.size, 0.0, sample.flip)[1] for v in labels)
            image = self._drawn(anatomy, sample.donor_id)
            image[inside == 0] = image[inside > 0].min()
        return image, mask

    def pixel_area(self, sample: Sample) -> float:
        """mm² of a pixel of the sample that `make` makes."""
        source = self.working(sample.slice_id)
        return source.area / self.scale(sample, source) ** 2

    def scale(self, sample: Sample, source: WorkingSlice) -> float:
        """RA's linear factor on the working grid, above 1 where the image grows; 1 for a sample without RA."""
        if sample.area is None:
            return 1.0
        plan, factor = self.config.plan, self.config.preprocess.factor
        return linear_scale(source.area, sample.area / factor**2, plan.ra_measure)

    def anatomy(self, slice_id: int) -> npt.NDArray[np.uint8]:
        """The slice's packed anatomy (h, w), its true extent alone: AdaIN averages over what it is given, and padding
        is no part of the image."""
        row = self._row_of[slice_id]
        top, left, height, width = (int(self._place[name][row]) for name in ("top", "left", "height", "width"))
        return self._anatomies[row, top : top + height, left : left + width]

    def _drawn(self, anatomy: npt.NDArray[np.uint8], donor: int) -> npt.NDArray[np.float32]:
        """(h, w) → (h, w) in (-1, 1), as the donor's scanner would draw it."""
        from pipeline.synthesis import synthesize

        donor_1M, precision = self.donors.modality[donor : donor + 1], self.config.plan.fa_precision
        drawn_1HW = synthesize(self._decoder, self._channels, anatomy[None], donor_1M, precision)
        drawn: npt.NDArray[np.float32] = drawn_1HW[0]
        return drawn
