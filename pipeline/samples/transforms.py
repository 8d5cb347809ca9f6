"""FA and RA for those who train elsewhere: dictionary transforms for a torch `DataLoader` or MONAI's `Compose`.

    bank = "runs/first/bank.zarr"
    store, preprocess = SliceStore.open("runs/first"), bank_preprocess(bank)
    augment = Compose([FactorAugment(bank, seed=1), RandPixelArea(preprocess, seed=1)])
    samples = [augment({**slice_sample(store, i, preprocess), "index": i}) for i in range(8)]

A sample is a function of the seed and of its `index`, which the caller counts up: `epoch * len(slices) + i`. No Ray is
started and none is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.samples.drawing import Drawing
from pipeline.samples.plan import PlanConfig, Stream, StreamSpec, generator
from pipeline.samples.preprocess import CANVAS_MULTIPLE, PreprocessConfig, centre_crop, centre_on, working_slice
from pipeline.samples.regions import region_looks
from pipeline.samples.rescale import linear_scale, resample_crop
from storage.bank.anatomy_codec import pack
from storage.bank.bank import FactorBank
from storage.bank.index import Key, slice_keys
from storage.bank.node_cache import BankView
from storage.bank.styles import modality_donors
from storage.errors import InputError
from storage.slices.store import SliceStore

Factors = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]  # anatomy (h, w), modality (M,)

IMAGE, MASK, INDEX, AREA = "image", "mask", "index", "pixel_area_mm2"
RESIDUAL = PlanConfig(fa_render="residual", fa_step=(0.5, 2.0), fa_guard="none")


def bank_preprocess(bank: str | FactorBank) -> PreprocessConfig:
    """The normalisation and working grid that a bank's slices have. Raises InputError as `FactorBank.open` does."""
    return PreprocessConfig(**_opened(bank).spec.preprocess)


def slice_sample(store: SliceStore, i: int, preprocess: PreprocessConfig) -> dict[str, Any]:
    """Slice `i` of a run as the transforms take it: image (1, h, w) float32 in [-1, 1] and mask (1, h, w) uint8 on the
    working grid, pixel_area_mm2 of a pixel there, and subject, frame, slice and vendor. If some masks of the run lack a
    structure that nobody drew, also structures: those that are drawn in this mask, such as "LV MYO"."""
    working = working_slice(store, i, preprocess)
    names = ("subject", "frame", "slice", "vendor", *["structures"] * store.partly_labelled)
    named = {name: store.column(name)[i].item() for name in names}
    return {IMAGE: working.image[None], MASK: working.mask[None], AREA: working.area, **named}


class _OfBank:
    """What both transforms with a bank need: it, and the SDNet that filled it for slices which it lacks."""

    STATE: tuple[str, ...] = ("uri", "sdnet", "seed", "key")

    def __init__(self, bank: str | FactorBank, sdnet: str | None, seed: int, key: str) -> None:
        self.uri, self.sdnet, self.seed, self.key = _opened(bank).uri, sdnet, seed, key
        if sdnet is not None:
            self._require_fills_bank(sdnet)

    def _require_fills_bank(self, sdnet: str) -> None:
        from pipeline.networks.description import sdnet_fingerprint

        made_by = self._bank.spec.sdnet_fingerprint.partition("-")[0]
        if sdnet_fingerprint(sdnet) != made_by:
            problem = "is not the SDNet that filled the bank"
            raise InputError(sdnet, problem, f"give the one with fingerprint {made_by}")

    def __getstate__(self) -> dict[str, Any]:
        """Loaded arrays and networks stay behind: a worker process opens its own."""
        return {name: getattr(self, name) for name in self.STATE}

    def _factors(self, data: Mapping[str, Any], image: npt.NDArray[np.float32]) -> Factors:
        named = all(name in data for name in ("subject", "frame", "slice"))
        key = (str(data["subject"]), int(data["frame"]), int(data["slice"])) if named else None
        row = self._row_of.get(key) if key is not None else None
        if row is not None:
            anatomy = self._view.anatomy[row]
            if anatomy.shape != image.shape:
                theirs, ours = ("{} × {}".format(*array.shape) for array in (image, anatomy))
                remedy = "transform slices on the working grid, as `slice_sample` gives them, before cropping"
                raise InputError(f"image of {key}", f"is {theirs}, in the bank it is {ours}", remedy)
            return anatomy, self._view.modality[row]
        if self.sdnet is None:
            who = f"slice {key}" if key else "an image without subject, frame and slice"
            raise InputError(who, "is not in the bank", "pass sdnet=, the folder of the SDNet that filled the bank")
        return self._encoded(image)

    def _encoded(self, image: npt.NDArray[np.float32]) -> Factors:
        """By the SDNet, as an extraction sees a slice: anatomy of the whole field, modality of the central crop."""
        import torch

        size, fill = bank_preprocess(self._bank).size, float(image.min())
        canvas = tuple(-(-max(n, size) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for n in image.shape)
        whole, top, left = centre_on(image, (canvas[0], canvas[1]), fill)
        crop = centre_crop(image, size, fill)
        with torch.inference_mode():
            anatomy = self._model.encode_anatomy(torch.from_numpy(whole)[None, None])[0].bool().numpy()
            code: npt.NDArray[np.float32] = self._model.encode_modality(torch.from_numpy(crop)[None, None])[0].numpy()
        return pack(anatomy)[top : top + image.shape[0], left : left + image.shape[1]], code

    @cached_property
    def _bank(self) -> FactorBank:
        return FactorBank.open(self.uri)

    @cached_property
    def _view(self) -> BankView:
        return BankView(self._bank)

    @cached_property
    def _row_of(self) -> dict[Key, int]:
        return {key: row for row, key in enumerate(slice_keys(self._bank.index))}

    @cached_property
    def _model(self) -> Any:
        from pipeline.networks.files import load_sdnet

        assert self.sdnet is not None
        return load_sdnet(self.sdnet).eval()


class FactorAugment(_OfBank):
    """Draws a share of the images as another scanner would, by a bank's factors (FA); masks stay as they are.

    bank: a URI or a `FactorBank`. sdnet: folder of the SDNet that filled it, for slices that the bank lacks. plan: what
    is drawn with (`fa_share`, `fa_policy`, `fa_reach`, `fa_render`, `fa_step`, `pairs`, `fa_precision`); by default
    half of the images, residual, from half way to a donor's code to twice the way. Policies `own` and `styles`, pairs
    `cross_vendor`, region looks, turns, zooms, bends and a guard belong to a run's stream and are not taken here.

    Raises InputError, when made, for such a plan, a bank that cannot be opened or an SDNet that did not fill it; when
    called, for an image that is not on the bank's grid, or is in no bank and there is no SDNet.
    """

    STATE = (*_OfBank.STATE, "plan")

    def __init__(
        self,
        bank: str | FactorBank,
        sdnet: str | None = None,
        plan: PlanConfig = RESIDUAL,
        seed: int = 0,
        key: str = IMAGE,
    ) -> None:
        if plan.guard != "none":
            raise InputError(f"plan.fa_guard={plan.fa_guard}", "needs a run's stream", "set plan.fa_guard=none")
        refused = {
            "fa_policy": ("own", "styles"),
            "pairs": ("cross_vendor",),
            "fa_regions": ("anatomy", "labels", "grey"),
        }
        for name, values in refused.items():
            if getattr(plan, name) in values:
                raise InputError(f"plan.{name}={getattr(plan, name)}", "needs a run's stream", "choose another one")
        if plan.moves or plan.zoom != (1.0, 1.0):
            problem = "turn_degrees, zoom and elastic need a run's stream"
            raise InputError("plan", problem, "move image and mask by a transform of your own")
        super().__init__(bank, sdnet, seed, key)
        self.plan = plan

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The same dictionary with another image, (h, w) or (1, h, w), in [-1, 1]; a tensor stays a tensor."""
        index, out = _index(data), dict(data)
        # by chance: evenly spread over indices, the same slices would be drawn in every epoch
        if generator(self.seed, "drawn", index >> 32, index & 0xFFFFFFFF).random() >= self.plan.fa_share:
            return out
        sample = self._stream(index)
        image = np.asarray(data[self.key], dtype=np.float32)
        plane = _plane(image, self.key)
        anatomy, own = self._factors(data, plane)
        texture = self._drawing.texture(plane, anatomy, own) if self.plan.fa_render == "residual" else None
        out[self.key] = _like(data[self.key], self._drawing(sample, anatomy, own, texture).reshape(image.shape))
        return out

    @cached_property
    def _drawing(self) -> Drawing:
        import torch

        return Drawing(self._bank, modality_donors(self._bank), self.plan, torch.get_num_threads())

    @cached_property
    def _stream(self) -> Stream:
        donors = modality_donors(self._bank)
        spec = StreamSpec(
            self.seed,
            "transform",
            np.zeros(1, dtype=np.int64),
            fa_share=1.0,
            pairs=self.plan.pairs,
            donors=np.arange(len(donors)),
            donor_vendors=donors.vendor,
            policy=self.plan.fa_policy,
            steps=self.plan.fa_step,
        )
        return Stream(spec)


class RandRegionLooks(_OfBank):
    """Gives every anatomy channel's region of an image a gain and a shift of its own, as if each tissue were drawn anew
    (`regions.region_looks`); masks stay as they are. On scanners not seen, this use of the factors paid
    (docs/experiments.md).

    bank, sdnet, seed and key as in `FactorAugment`; share: of the images that get a look. Raises InputError as
    `FactorAugment` does.
    """

    STATE = (*_OfBank.STATE, "share")

    def __init__(
        self,
        bank: str | FactorBank,
        sdnet: str | None = None,
        share: float = 0.5,
        seed: int = 0,
        key: str = IMAGE,
    ) -> None:
        super().__init__(bank, sdnet, seed, key)
        self.share = share

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The same dictionary with another image, (h, w) or (1, h, w), in [-1, 1]; a tensor stays a tensor."""
        index, out = _index(data), dict(data)
        rng = generator(self.seed, "regions", index >> 32, index & 0xFFFFFFFF)
        if rng.random() < self.share:
            image = np.asarray(data[self.key], dtype=np.float32)
            plane = _plane(image, self.key)
            anatomy, _ = self._factors(data, plane)
            out[self.key] = _like(data[self.key], region_looks(plane, anatomy, rng).reshape(image.shape))
        return out


class RandPixelArea:
    """Rescales a slice to a pixel area drawn from a range, and crops or pads it to the input size (RA).

    preprocess: of the working grid, which shrinks the range with it; area_range_mm2: of native pixels (paper, section
    2.1); keys: of the image and, if there is one, the mask. Raises InputError, when called, for a sample without
    `pixel_area_mm2` or `index`.
    """

    def __init__(
        self,
        preprocess: PreprocessConfig,
        area_range_mm2: tuple[float, float] = PlanConfig().area_range_mm2,
        seed: int = 0,
        image_key: str = IMAGE,
        mask_key: str = MASK,
    ) -> None:
        self.preprocess, self.area_range_mm2, self.seed = preprocess, area_range_mm2, seed
        self.image_key, self.mask_key = image_key, mask_key

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The same dictionary; image and mask (size, size) or (1, size, size), pixel_area_mm2 as it is then."""
        index = _index(data)
        if AREA not in data:
            raise InputError("a sample", f"has no {AREA}", "give the area in mm² of a pixel of its image")
        image, labels = (np.asarray(data[k]) if k in data else None for k in (self.image_key, self.mask_key))
        assert image is not None
        plane = _plane(image.astype(np.float32), self.image_key)
        mask = np.zeros(plane.shape, np.uint8) if labels is None else _plane(labels.astype(np.uint8), self.mask_key)
        low, high = self.area_range_mm2
        place = generator(self.seed, "pixel area", index >> 32, index & 0xFFFFFFFF).random()
        scale = linear_scale(float(data[AREA]), (low + (high - low) * place) / self.preprocess.factor**2)
        made, made_mask = resample_crop(plane, mask, scale, self.preprocess.size, float(plane.min()))
        out = dict(data) | {AREA: float(data[AREA]) / scale**2}
        lead = image.shape[:-2]
        out[self.image_key] = _like(data[self.image_key], made.reshape(*lead, *made.shape))
        if labels is not None:
            out[self.mask_key] = _like(data[self.mask_key], made_mask.reshape(*lead, *made_mask.shape))
        return out


def _opened(bank: str | FactorBank) -> FactorBank:
    return FactorBank.open(bank) if isinstance(bank, str) else bank


def _index(data: Mapping[str, Any]) -> int:
    if INDEX not in data:
        raise InputError("a sample", f"has no {INDEX}", "number the samples: epoch * len(slices) + i")
    return int(data[INDEX])


def _plane(array: npt.NDArray[Any], key: str) -> Any:
    """(h, w) of an array (h, w) or (1, h, w), in C order."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] != 1):
        raise InputError(f"{key} of shape {array.shape}", "is no slice", "give (h, w) or (1, h, w)")
    return np.ascontiguousarray(array.reshape(array.shape[-2:]))


def _like(given: Any, made: npt.NDArray[Any]) -> Any:
    """A tensor where a tensor was given, else the array."""
    if isinstance(given, np.ndarray):
        return made
    import torch

    return torch.from_numpy(np.ascontiguousarray(made))
