"""Compute a slice's factors with a frozen SDNet, in the form in which a bank stores them.

On a CPU, the factors depend only on the slice, the network and its precision. Each slice is a batch of its own, on the
smallest canvas that holds it, and not on the bank's canvas, which depends on the largest slice. So existing rows keep
their bytes when subjects are added. On a GPU one slice would leave most of the card idle, so slices on canvases of
equal size share a batch. The size of that batch may change the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.networks.config import Precision
from pipeline.networks.folding import folded
from pipeline.networks.sdnet import SDNet
from pipeline.samples.preprocess import PreprocessConfig, canvas_size, centre_on, working_slice
from pipeline.samples.rescale import resample_crop
from storage.bank.bank import PackedBank
from storage.slices.store import SliceStore

GPU_BATCH = 32  # slices; enough to keep a GPU busy
Factors = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]  # packed anatomy, modality
BankRow = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]  # and the mask
_T = TypeVar("_T")


@dataclass(frozen=True)
class NetworkView:
    """What the network sees of a slice, and the slice's mask.

    canvas: (H, W) float32 in [-1, 1], the working image centred on the smallest canvas that holds it, the anatomy
    encoder's input. extent: the rows and columns of the image on the canvas. crop: (size, size) float32, the modality
    encoder's input. mask: (h, w) uint8, of the extent.
    """

    canvas: npt.NDArray[np.float32]
    extent: tuple[slice, slice]
    crop: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]


def view(store: SliceStore, slice_id: int, preprocess: PreprocessConfig) -> NetworkView:
    """One slice of a store as the network sees it.

    The anatomy covers the whole field of view, so its encoder sees the image on a canvas. The modality encoder averages
    over its input. On a canvas it would average padding too, whose share depends on the matrix size. So it sees the
    same centre crop as in training. Both inputs are padded with the slice's minimum.
    """
    working = working_slice(store, slice_id, preprocess)
    fill, (height, width) = float(working.image.min()), working.image.shape
    canvas, top, left = centre_on(working.image, canvas_size(store, [slice_id], preprocess), fill)
    crop, _ = resample_crop(working.image, working.mask, 1.0, preprocess.size, fill)
    return NetworkView(canvas, np.s_[top : top + height, left : left + width], crop, working.mask)


class FrozenSDNet:
    """An SDNet's two encoders for inference: batch-norm folded, channels_last, in one precision on one device.

    batch: the largest number of slices at once. None means 1 on a CPU and `GPU_BATCH` on a GPU.
    """

    def __init__(
        self,
        model: SDNet,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        batch: int | None = None,
    ) -> None:
        self.config = model.config
        self._device = torch.device(device)
        self.batch = batch or (1 if self._device.type == "cpu" else GPU_BATCH)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._anatomy, self._modality = map(self._prepared, (model.anatomy_encoder, model.modality_encoder))

    def factors(self, views: Sequence[NetworkView]) -> list[Factors]:
        """For each view, the packed anatomy (h, w) uint8 of its extent, and the modality (M,) float32."""
        by_canvas: dict[tuple[int, ...], list[int]] = {}
        for k, seen in enumerate(views):
            by_canvas.setdefault(seen.canvas.shape, []).append(k)
        anatomy: dict[int, npt.NDArray[np.uint8]] = {}
        modality: list[npt.NDArray[np.float32]] = []
        with torch.inference_mode():
            for members in by_canvas.values():
                for some in _parts(members, self.batch):
                    logits = self._anatomy(self._tensor([views[k].canvas for k in some])).float()
                    binary = logits.softmax(dim=1).round().bool()  # as SDNet.encode_anatomy
                    anatomy |= zip(some, _packed(binary).cpu().numpy(), strict=True)
            for few in _parts(views, self.batch):
                modality += [*self._modality(self._tensor([seen.crop for seen in few])).float().cpu().numpy()]
        return [(anatomy[k][seen.extent], modality[k]) for k, seen in enumerate(views)]

    def _prepared(self, network: nn.Module) -> nn.Module:
        return folded(network).to(self._device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def _tensor(self, images_HW: Sequence[npt.NDArray[np.float32]]) -> Tensor:
        batch = torch.from_numpy(np.stack(images_HW)[:, None])
        return batch.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)


def _parts(items: Sequence[_T], most: int) -> list[Sequence[_T]]:
    return [items[i : i + most] for i in range(0, len(items), most)]


def _packed(binary_NCHW: Tensor) -> Tensor:
    """`anatomy_codec.pack` on the device, (N, H, W) uint8, so that the host receives one byte for all channels."""
    shifts = torch.arange(binary_NCHW.shape[1], device=binary_NCHW.device, dtype=torch.uint8)[:, None, None]
    return (binary_NCHW.to(torch.uint8) << shifts).sum(dim=1, dtype=torch.uint8)


def bank_row(found: Factors, seen: NetworkView, canvas: tuple[int, int]) -> BankRow:
    """Place a view's packed anatomy and mask on a bank's canvas (H, W), with zeros around them, to make a bank row."""
    anatomy, _, _ = centre_on(found[0], canvas, 0)
    mask, _, _ = centre_on(seen.mask, canvas, 0)
    return anatomy, found[1], mask


def bank_rows(network: FrozenSDNet, views: Sequence[NetworkView], canvas: tuple[int, int]) -> PackedBank:
    """Encode views and return their bank rows on a canvas (H, W), one for each view."""
    rows = (bank_row(found, seen, canvas) for found, seen in zip(network.factors(views), views, strict=True))
    anatomy, modality, mask = zip(*rows, strict=True)
    return PackedBank(np.stack(anatomy), np.stack(mask), np.stack(modality))
