"""Draw images from factors: choose the code of a sample, render it, and check whether the image looks real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.samples.factor_policies import Modalities
from pipeline.samples.plan import PlanConfig, Sample
from pipeline.samples.realism import Encode, Realism
from storage.bank.bank import FactorBank
from storage.bank.styles import Donors

if TYPE_CHECKING:
    from torch import Tensor

Image = npt.NDArray[np.float32]
Code = npt.NDArray[np.float32]
Anatomy = npt.NDArray[np.uint8]


class Drawing:
    """Draws planned samples on a device, with a bank's decoder and the modality codes of `donors`.

    `rejected` counts the images that the guard has rejected. Sets torch's number of threads.
    """

    def __init__(
        self, bank: FactorBank, donors: Donors, plan: PlanConfig, threads: int = 1, device: str = "cpu"
    ) -> None:
        import torch

        from pipeline.networks.files import load_decoder

        torch.set_num_threads(threads)
        weights, config = bank.decoder()
        self.plan, self.donors, self.rejected = plan, donors, 0
        self._decoder, self._channels = load_decoder(weights, config).to(device), int(config["anatomy_channels"])
        self._modalities = Modalities(donors.modality, donors.vendor, plan.fa_policy, plan.fa_reach)
        self._realism: Realism | None = None

    def judge_by(
        self,
        rows: npt.NDArray[np.integer],
        codes_NM: npt.NDArray[np.float32],
        image: Callable[[int, Code], Image],
        encode: Encode | None,
    ) -> None:
        """Switch on the guard. It compares images with `image(row, code)` of these rows and codes (see `Realism`)."""
        self._realism = Realism(rows, codes_NM, image, encode)

    def decoded(self, anatomy_HW: Anatomy, code_M: Code) -> Image:
        """The decoded image D(a, z): (H, W) float32 in (-1, 1). The anatomy is packed, channel c in bit c."""
        from pipeline.samples.synthesis import synthesize

        batch = synthesize(self._decoder, self._channels, anatomy_HW[None], code_M[None], self.plan.fa_precision)
        drawn: Image = batch[0]
        return drawn

    def texture(self, image_HW: Image, anatomy_HW: Anatomy, own_M: Code) -> Image:
        """The part of an image that its own factors do not reproduce: x - D(a, z)."""
        rest: Image = image_HW - self.decoded(anatomy_HW, own_M)
        return rest

    def __call__(self, sample: Sample, anatomy_HW: Anatomy, own_M: Code, texture_HW: Image | None = None) -> Image:
        """Draw a sample in the style of its modality: (H, W) float32 in [-1, 1]. Depends on the arguments alone.

        `own_M` is the slice's own code. If `texture_HW` is given, it is added, and the image is residual. If the guard
        rejects the image, it is drawn with the donor's own code instead.
        """
        code = self._code(sample, own_M)
        image = self._rendered(anatomy_HW, code, texture_HW)
        if self._accepts(image, code):
            return image
        return self._rendered(anatomy_HW, self.donors.modality[sample.donor_id], texture_HW)

    def together(
        self,
        samples: Sequence[Sample],
        anatomy_NHW: Tensor,
        own_NM: Code,
        shapes: Sequence[tuple[int, int]],
        real_NHW: Tensor | None = None,
    ) -> Tensor:
        """Draw several samples in one or two passes of the decoder: (N, H, W) float32 in [-1, 1].

        Each image is what a call of this object draws for the sample. Anatomies (packed uint8) and real images are on
        the decoder's device, in the top left corners of their canvases with sizes `shapes`. Pixels outside are
        meaningless. If real images are given, the drawn ones are residual.
        """
        import torch

        from pipeline.samples import canvas

        size, device = (anatomy_NHW.shape[1], anatomy_NHW.shape[2]), anatomy_NHW.device
        inside = canvas.inside(shapes, size, device)
        codes = np.stack([self._code(sample, own) for sample, own in zip(samples, own_NM, strict=True)])
        if real_NHW is None:
            texture, drawn = None, self._decoded_together(anatomy_NHW, codes, inside)
        else:
            twice = None if inside is None else torch.cat([inside, inside])
            both = self._decoded_together(torch.cat([anatomy_NHW] * 2), np.concatenate([own_NM, codes]), twice)
            texture = real_NHW - both[: len(samples)]
            drawn = (both[len(samples) :] + texture).clip_(-1.0, 1.0)
        if self._realism is None:
            return drawn
        seen = (np.ascontiguousarray(x[:h, :w]) for x, (h, w) in zip(drawn.cpu().numpy(), shapes, strict=True))
        judged = [self._accepts(image, code) for image, code in zip(seen, codes, strict=True)]
        if not all(judged):
            again = torch.from_numpy(np.flatnonzero(~np.array(judged))).to(device)
            rows = np.array([sample.donor_id for sample in samples])[~np.array(judged)]
            donors = self.donors.modality[rows]
            still = self._decoded_together(anatomy_NHW[again], donors, None if inside is None else inside[again])
            drawn[again] = still if texture is None else (still + texture[again]).clip_(-1.0, 1.0)
        return drawn

    def _code(self, sample: Sample, own_M: Code) -> Code:
        """The code of a sample, unless the guard rejects its image: (M,) float32."""
        code: Code = self._modalities(sample)
        if sample.step != 1.0:
            code = own_M + np.float32(sample.step) * (code - own_M)
        return code

    def _accepts(self, image_HW: Image, code_M: Code) -> bool:
        """Whether the guard accepts an image drawn with this code. Counts rejections."""
        accepted = self._realism is None or self._realism(image_HW, code_M)
        self.rejected += not accepted
        return accepted

    def _decoded_together(self, anatomy_NHW: Tensor, code_NM: Code, inside_NHW: Tensor | None) -> Tensor:
        from pipeline.samples.canvas import upload
        from pipeline.samples.synthesis import synthesize_together

        codes, precision = upload(np.array(code_NM), anatomy_NHW.device), self.plan.fa_precision
        return synthesize_together(self._decoder, self._channels, anatomy_NHW, codes, inside_NHW, precision)

    def _rendered(self, anatomy_HW: Anatomy, code_M: Code, texture_HW: Image | None) -> Image:
        drawn = self.decoded(anatomy_HW, code_M)
        return drawn if texture_HW is None else (drawn + texture_HW).clip(-1.0, 1.0)
