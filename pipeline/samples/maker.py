"""Make planned samples: decode (FA), then rescale and crop (RA)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.samples.appearance import ALONE, NNUNET, WITH_ANOTHER
from pipeline.samples.drawing import Drawing
from pipeline.samples.geometry import moved
from pipeline.samples.plan import Sample, generator
from pipeline.samples.preprocess import WorkingSlice, centre_crop, working_mask, working_slice
from pipeline.samples.realism import Encode
from pipeline.samples.regions import grey_regions, label_regions, region_looks
from pipeline.samples.rescale import linear_scale, resample_crop
from pipeline.samples.sized_cache import SizedCache
from pipeline.samples.stream_config import StreamConfig, donor_bank, open_bank, step_plan
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.bank.node_cache import BankView
from storage.bank.styles import Donors, modality_donors
from storage.errors import InputError
from storage.slices.store import SliceStore

CACHE_BYTES = 512 * 2**20  # for a maker's real slices, and as much for textures (`plan.fa_render=residual`)
TWIN, MADE_S, MADE_AT, REJECTED = "twin", "made_s", "made_at", "rejected"
UPLOADED = ("image", "mask", TWIN)  # parts of a batch that go to the device; the host needs the others


class SampleMaker:
    """Makes the samples of whole steps. Holds the slice store and, if the arm needs them, the bank and its decoder.

    Images are drawn, and checked by the guard, on `device`. Raises InputError as `open_bank` and `step_plan` do,
    or if the guard needs an SDNet that is not given.
    """

    def __init__(
        self, config: StreamConfig, rank: int = 0, world: int = 1, threads: int = 1, device: str = "cpu"
    ) -> None:
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.store = SliceStore.open(config.run)
        self.bank = open_bank(config, self.store)
        self.plan = step_plan(config, self.store, self.bank)
        store, preprocess = self.store, config.preprocess
        self.working = SizedCache(lambda i: working_slice(store, i, preprocess), _bytes, CACHE_BYTES)
        self.masks = SizedCache(
            lambda i: working_mask(store, i, preprocess), lambda found: found[0].nbytes, CACHE_BYTES // 4
        )
        self.drawing: Drawing | None = None
        self._labelled = self.store.column("labelled").astype(bool)
        if self.bank is not None:
            self._load_factors(self.bank, threads)

    def _load_factors(self, bank: FactorBank, threads: int) -> None:
        self._anatomies = BankView(bank).anatomy  # memory-mapped: the node holds one copy
        self._row_of = rows_of(bank.index, self.store.table)  # bank row of each slice of the store
        if not self.config.fa:
            return
        plan, self._own_code = self.config.plan, BankView(bank).modality
        drawing = self.drawing = Drawing(bank, self._donors(bank), plan, threads, self.device)
        self._texture = SizedCache(self._texture_of, lambda texture: texture.nbytes, CACHE_BYTES)
        if plan.guard == "none":
            return
        encode = self._reader() if plan.guard == "reencoding" else None
        if plan.fa_render == "residual":  # compared with real images, which only the run's own slices have
            ids = np.flatnonzero(self.store.column("split") == "train")
            slice_of = np.empty(len(bank), dtype=np.int64)
            slice_of[self._row_of[ids]] = ids
            drawing.judge_by(
                np.sort(self._row_of[ids]),
                self._own_code,
                lambda row, _: self.working(int(slice_of[row])).image,
                encode,
            )
        else:
            looked_at = np.arange(len(bank))
            drawing.judge_by(
                looked_at, self._own_code, lambda row, code: drawing.decoded(self._anatomies[row], code), encode
            )

    def _donors(self, bank: FactorBank) -> Donors:
        lender = donor_bank(self.config, bank)
        return modality_donors(lender if lender is not None else bank)

    def _reader(self) -> Encode:
        """The modality encoder of the bank's SDNet, for whole drawn images. Raises InputError without that SDNet."""
        import torch

        from pipeline.networks.description import sdnet_fingerprint
        from pipeline.networks.files import load_sdnet
        from pipeline.samples.synthesis import encode_exactly

        assert self.bank is not None
        folder = self.config.sdnet
        if folder is None or sdnet_fingerprint(folder) != self.bank.spec.sdnet_fingerprint.partition("-")[0]:
            raise InputError(
                "plan.fa_guard",
                "reencoding needs the SDNet that made the bank",
                "pass its folder with --sdnet, or --set plan.fa_guard=intensities",
            )
        encoder, size = load_sdnet(folder).modality_encoder.eval().to(self.device), self.config.preprocess.size

        def encode(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            cropped = torch.from_numpy(centre_crop(image, size, float(image.min())))[None, None]
            with torch.inference_mode():
                code: npt.NDArray[np.float32] = encode_exactly(encoder, cropped.to(self.device))[0].cpu().numpy()
            return code

        return encode

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Make this worker's n samples of the steps in `block`, {"step": (k,) int64}.

        Returns image (n, 1, S, S) float32 in [-1, 1], mask (n, S, S) uint8 (0 if not labelled), labelled (n,) bool,
        slice_id (n,) int64 and, if the arm has twins, twin (n, 1, S, S) float32.

        For monitoring, three arrays (n,) float64 repeat one number: made_s, the mean seconds a sample took; made_at,
        when the block was ready, in seconds since 1970; rejected, the images that the guard rejected, over n.
        """
        began, rejected = time.perf_counter(), self.turned_down()
        planned = [s for step in block["step"] for s in self.plan.samples(int(step), self.rank, self.world)]
        size = self.config.preprocess.size
        image = np.empty((len(planned), 1, size, size), dtype=np.float32)
        mask = np.zeros((len(planned), size, size), dtype=np.uint8)
        for k, (sample, labelled) in enumerate(planned):
            image[k, 0], labels = self.make(sample)
            if labelled:
                mask[k] = labels
        twins = {TWIN: self._twins(planned, image)} if self.config.twins else {}
        facts = facts_of(planned, time.perf_counter() - began, self.turned_down() - rejected)
        return twins | {"image": image, "mask": mask} | facts

    def _twins(self, planned: list[tuple[Sample, bool]], image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The twins of the unlabelled samples. A labelled sample is its own twin."""
        twin = image.copy()
        for k, (sample, labelled) in enumerate(planned):
            if not labelled:
                twin[k, 0], _ = self.make(sample.twin())
        return twin

    def make(self, sample: Sample) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Make a planned sample: image (S, S) float32 in [-1, 1] and mask (S, S) uint8."""
        config = self.config.preprocess
        ra_first = self.config.plan.fa_order == "ra_first"
        if sample.donor_id is not None and not ra_first:  # a sample that is drawn whole needs no real image
            mask, area = self.masks(sample.slice_id)
            source = WorkingSlice(self._drawn(self.anatomy(sample.slice_id), sample), mask, area)
        else:
            source = self.working(sample.slice_id)
        source = self.augmented(source, sample)
        scale = self.scale(sample, source.area)
        fill = float(source.image.min())
        image, mask = resample_crop(source.image, source.mask, scale, config.size, fill, sample.flip)
        if sample.donor_id is not None and ra_first:
            bits = self.anatomy(sample.slice_id)
            labels = (bits, np.ones_like(bits))
            anatomy, inside = (resample_crop(source.image, v, scale, config.size, 0.0, sample.flip)[1] for v in labels)
            image = self._drawn(anatomy, sample, image)
            outside = fill if self.config.plan.fa_render == "residual" else image[inside > 0].min()
            image[inside == 0] = outside
        return image, mask

    def pixel_area(self, sample: Sample) -> float:
        """The area in mm² of a pixel of the sample that `make` returns."""
        _, area = self.masks(sample.slice_id)
        return area / self.scale(sample, area) ** 2

    def scale(self, sample: Sample, area: float) -> float:
        """The linear factor of RA and zoom on the working grid. Above 1 the image grows; without both it is 1.

        `area` is the area in mm² of a pixel of the slice on the working grid.
        """
        if sample.area is None:
            return sample.zoom
        plan, factor = self.config.plan, self.config.preprocess.factor
        return sample.zoom * linear_scale(area, sample.area / factor**2, plan.ra_measure)

    def anatomy(self, slice_id: int) -> npt.NDArray[np.uint8]:
        """The slice's packed anatomy (h, w) uint8, without padding, since AdaIN averages over its whole input."""
        return self._anatomies[self._row_of[slice_id]]

    def own_code(self, slice_id: int) -> npt.NDArray[np.float32]:
        """The slice's own modality (M,) float32."""
        code: npt.NDArray[np.float32] = self._own_code[self._row_of[slice_id]]
        return code

    def _drawn(
        self, anatomy: npt.NDArray[np.uint8], sample: Sample, image: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Draw a packed anatomy (h, w) in the style of the sample's modality: (h, w) in [-1, 1].

        `image` is the real image on the anatomy's grid. It is needed if the anatomy is not on the slice's own grid.
        """
        assert self.drawing is not None
        own, texture = self.own_code(sample.slice_id), None
        if self.config.plan.fa_render == "residual":
            texture = self._texture(sample.slice_id) if image is None else self.drawing.texture(image, anatomy, own)
        return self.drawing(sample, anatomy, own, texture)

    def _texture_of(self, slice_id: int) -> npt.NDArray[np.float32]:
        assert self.drawing is not None
        return self.drawing.texture(self.working(slice_id).image, self.anatomy(slice_id), self.own_code(slice_id))

    def turned_down(self) -> int:
        """The number of drawn images that the guard has rejected so far."""
        return self.drawing.rejected if self.drawing is not None else 0

    @property
    def augments(self) -> bool:
        """Whether images get a look besides FA, or are turned or bent."""
        return self.config.appearance != "none" or self.config.plan.fa_regions != "none" or self.config.plan.moves

    def augmented(self, source: WorkingSlice, sample: Sample) -> WorkingSlice:
        """Give a slice the looks and moves that the arm asks for. This comes after FA and before RA."""
        if self.config.appearance in NNUNET:
            from pipeline.samples.nnunet_transforms import nnunet

            source = nnunet(source, sample.seed, mirrors=self.config.appearance == "nnunet_mirrors")
        elif self.config.appearance != "none":
            source = replace(source, image=self._with_appearance(source.image, sample))
        if self.config.plan.fa_regions != "none":
            source = replace(source, image=self._with_region_looks(source, sample))
        return moved(source, sample, self.config.plan.elastic) if self.config.plan.moves else source

    def _with_region_looks(self, source: WorkingSlice, sample: Sample) -> npt.NDArray[np.float32]:
        """The image (h, w) in [-1, 1], with region looks for `fa_share` of the samples that have regions."""
        kind, i = self.config.plan.fa_regions, sample.slice_id
        rng = generator(sample.seed & 0xFFFFFFFF, "regions", sample.seed >> 32)
        if rng.random() >= self.config.plan.fa_share or (kind == "labels" and not self._labelled[i]):
            return source.image
        if kind == "anatomy":
            return region_looks(source.image, self.anatomy(i), rng)
        regions = label_regions(source.mask) if kind == "labels" else grey_regions(source.image)
        return region_looks(source.image, regions, rng)

    def _with_appearance(self, image: npt.NDArray[np.float32], sample: Sample) -> npt.NDArray[np.float32]:
        """The image (h, w) in [-1, 1] with the arm's appearance."""
        rng = np.random.Generator(np.random.Philox(sample.seed))
        if self.config.appearance in ALONE:
            return ALONE[self.config.appearance](image, rng)
        assert sample.style_id is not None
        return WITH_ANOTHER[self.config.appearance](image, self.working(sample.style_id).image, rng)


def facts_of(planned: Sequence[tuple[Sample, bool]], seconds: float, rejected: int) -> dict[str, npt.NDArray[Any]]:
    """The entries of a batch besides images and masks (see `SampleMaker.__call__`)."""
    count = len(planned)
    return {
        "labelled": np.array([labelled for _, labelled in planned]),
        "slice_id": np.array([s.slice_id for s, _ in planned]),
        MADE_S: np.full(count, seconds / count),
        REJECTED: np.full(count, rejected / count),
        MADE_AT: np.full(count, time.time()),
    }


def _bytes(working: WorkingSlice) -> int:
    return working.image.nbytes + working.mask.nbytes
