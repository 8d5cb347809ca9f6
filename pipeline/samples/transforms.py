"""FA and RA for your own training loop: dictionary transforms for a torch `DataLoader` or MONAI's `Compose`.

    bank = "runs/first/bank.zarr"
    store, preprocess = SliceStore.open("runs/first"), bank_preprocess(bank)
    augment = Compose([FactorAugment(bank, seed=1), RandPixelArea(preprocess, seed=1)])
    samples = [augment({**slice_sample(store, i, preprocess), "index": i}) for i in range(8)]

A sample depends on the seed and its `index` alone. The caller counts the index up: `epoch * len(slices) + i`. Ray is
neither started nor imported.
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
AREA_TOLERANCE = 1e-3  # relative: of two roundings of one spacing
RESIDUAL = PlanConfig(fa_render="residual", fa_guard="none")


def bank_preprocess(bank: str | FactorBank) -> PreprocessConfig:
    """The preprocessing of a bank's slices. Raises InputError as `FactorBank.open` does."""
    return PreprocessConfig(**_opened(bank).spec.preprocess)


def slice_sample(store: SliceStore, i: int, preprocess: PreprocessConfig) -> dict[str, Any]:
    """Slice `i` of a run as the transforms expect it.

    The keys are image (1, h, w) float32 in [-1, 1] and mask (1, h, w) uint8 on the working grid, pixel_area_mm2 (mm²
    there), subject, frame, slice and vendor. If some masks of the run lack a structure that nobody drew, there is also
    structures: those drawn in this mask, such as "LV MYO".
    """
    working = working_slice(store, i, preprocess)
    names = ("subject", "frame", "slice", "vendor", *["structures"] * store.partly_labelled)
    named = {name: store.column(name)[i].item() for name in names}
    return {IMAGE: working.image[None], MASK: working.mask[None], AREA: working.area, **named}


class _OfBank:
    """The shared part of the transforms with a bank. Slices that the bank lacks are encoded by the bank's SDNet.

    The bank has a slice if it has one of the same subject, frame and slice, of the same size and, if the sample says
    its `pixel_area_mm2`, of the same pixels.
    """

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
        """Loaded arrays and networks are not pickled. Each worker process opens its own."""
        return {name: getattr(self, name) for name in self.STATE}

    def _factors(self, data: Mapping[str, Any], image: npt.NDArray[np.float32]) -> Factors:
        named = all(name in data for name in ("subject", "frame", "slice"))
        key = (str(data["subject"]), int(data["frame"]), int(data["slice"])) if named else None
        row = self._row_of.get(key) if key is not None else None
        if row is not None:
            anatomy = self._view.anatomy[row]
            other = self._difference(data, image, anatomy, row)
            if other is None:
                return anatomy, self._view.modality[row]
            if self.sdnet is None:
                remedy = "transform slices on the working grid, as `slice_sample` gives them, before cropping"
                raise InputError(f"image of {key}", other, f"{remedy}; if it is another patient's, pass sdnet=")
        if self.sdnet is None:
            who = f"slice {key}" if key else "an image without subject, frame and slice"
            raise InputError(who, "is not in the bank", "pass sdnet=, the folder of the SDNet that filled the bank")
        return self._encoded(image)

    def _difference(
        self, data: Mapping[str, Any], image: npt.NDArray[np.float32], anatomy: npt.NDArray[np.uint8], row: int
    ) -> str | None:
        """How an image differs from the slice of its name in the bank, whose grid its own must be; None if it does not.

        Hospitals number their patients alike, so the name alone says little.
        """
        if anatomy.shape != image.shape:
            theirs, ours = ("{} × {}".format(*array.shape) for array in (image, anatomy))
            return f"is {theirs}, in the bank it is {ours}"
        area = float(self._areas[row])
        if AREA in data and not np.isclose(float(data[AREA]), area, rtol=AREA_TOLERANCE):
            return f"has pixels of {float(data[AREA]):.4g} mm², in the bank they are of {area:.4g} mm²"
        return None

    def _encoded(self, image: npt.NDArray[np.float32]) -> Factors:
        """Encode an image as extraction does: anatomy of the whole field of view, modality of the centre crop."""
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
    def _areas(self) -> npt.NDArray[np.float64]:
        areas: npt.NDArray[np.float64] = self._bank.index[AREA].to_numpy()
        return areas

    @cached_property
    def _model(self) -> Any:
        from pipeline.networks.files import load_sdnet

        assert self.sdnet is not None
        return load_sdnet(self.sdnet).eval()


class FactorAugment(_OfBank):
    """Draws a share of the images as another scanner would, with a bank's factors (FA). Masks stay as they are.

    bank: a URI or a `FactorBank`. sdnet: folder of the SDNet that filled the bank, for slices that the bank lacks.
    key: of the image. plan: how images are drawn (`fa_share`, `fa_policy`, `fa_reach`, `fa_render`, `fa_step`, `pairs`,
    `fa_precision`). By default half of the images are drawn, residual, with a donor's code. These need a run's stream
    and are refused here: the policies `own` and `styles`, pairs `cross_vendor`, region looks, turns, zooms, bends, and
    a guard.

    The constructor raises InputError for such a plan, a bank that cannot be opened, or an SDNet that did not fill the
    bank. A call raises InputError for a sample without `index`, an image that is not on the bank's grid and, if there
    is no SDNet, a slice that the bank lacks.
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
        """A copy of the dictionary with the new image, (h, w) or (1, h, w), in [-1, 1]. A tensor stays a tensor."""
        index, out = _index(data), dict(data)
        # At random, since evenly spaced indices would draw the same slices in every epoch.
        if generator(self.seed, "drawn", index >> 32, index & 0xFFFFFFFF).random() >= self.plan.fa_share:
            return out
        sample = self._stream(index)
        image = np.asarray(_image(data, self.key), dtype=np.float32)
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
    """Gives every anatomy channel's region its own gain and shift (`regions.region_looks`). Masks stay as they are.

    On unseen scanners this use of the factors improved the Dice (docs/experiments.md). bank, sdnet, seed and key are as
    in `FactorAugment`; share (0 to 1) of the images are changed. Raises InputError as `FactorAugment` does.
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
        """A copy of the dictionary with the new image, (h, w) or (1, h, w), in [-1, 1]. A tensor stays a tensor."""
        index, out = _index(data), dict(data)
        rng = generator(self.seed, "regions", index >> 32, index & 0xFFFFFFFF)
        if rng.random() < self.share:
            image = np.asarray(_image(data, self.key), dtype=np.float32)
            plane = _plane(image, self.key)
            anatomy, _ = self._factors(data, plane)
            out[self.key] = _like(data[self.key], region_looks(plane, anatomy, rng).reshape(image.shape))
        return out


class RandPixelArea:
    """Rescales a slice to a pixel area drawn from a range, and crops or pads it to the network's input size (RA).

    preprocess: of the slice's working grid. area_range_mm2: of native pixels in mm² (paper section 2.1); it is
    converted to the working grid. image_key, mask_key: of the image and of the mask, which may be absent. A call raises
    InputError for a sample without `pixel_area_mm2` or `index`, or an array that is no slice.
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
        """A copy of the dictionary with image and mask (size, size) or (1, size, size), and the new pixel_area_mm2."""
        index = _index(data)
        if AREA not in data:
            raise InputError("a sample", f"has no {AREA}", "give the area in mm² of a pixel of its image")
        image = np.asarray(_image(data, self.image_key))
        labels = np.asarray(data[self.mask_key]) if self.mask_key in data else None
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


def _image(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise InputError("a sample", f"has no {key}", "give the slice's image under this key")
    return data[key]


def _plane(array: npt.NDArray[Any], key: str) -> Any:
    """An array (h, w) or (1, h, w) as (h, w) in C order. Raises InputError for other shapes."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] != 1):
        raise InputError(f"{key} of shape {array.shape}", "is no slice", "give (h, w) or (1, h, w)")
    return np.ascontiguousarray(array.reshape(array.shape[-2:]))


def _like(given: Any, made: npt.NDArray[Any]) -> Any:
    """`made` as an array if `given` is one, else as a tensor."""
    if isinstance(given, np.ndarray):
        return made
    import torch

    return torch.from_numpy(np.ascontiguousarray(made))
