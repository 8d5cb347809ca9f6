"""Images drawn from factors: which code a sample is drawn with, how it is rendered, and whether it looks real."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.samples.factor_policies import Modalities
from pipeline.samples.plan import PlanConfig, Sample
from pipeline.samples.realism import Encode, Realism
from storage.bank.bank import FactorBank
from storage.bank.styles import Donors

Image = npt.NDArray[np.float32]
Code = npt.NDArray[np.float32]
Anatomy = npt.NDArray[np.uint8]


class Drawing:
    """Draws samples of a plan with a bank's decoder and the modality codes of `donors`.

    `rejected` counts the images that the guard turned down.
    """

    def __init__(self, bank: FactorBank, donors: Donors, plan: PlanConfig, threads: int = 1) -> None:
        import torch

        from pipeline.networks.files import load_decoder

        torch.set_num_threads(threads)
        weights, config = bank.decoder()
        self.plan, self.donors, self.rejected = plan, donors, 0
        self._decoder, self._channels = load_decoder(weights, config), int(config["anatomy_channels"])
        self._modalities = Modalities(donors.modality, donors.vendor, plan.fa_policy, plan.fa_reach)
        self._realism: Realism | None = None

    def judge_by(
        self,
        rows: npt.NDArray[np.integer],
        codes_NM: npt.NDArray[np.float32],
        image: Callable[[int, Code], Image],
        encode: Encode | None,
    ) -> None:
        """Turn down images that are unlike what `image` gives for these rows, of these codes (see `Realism`)."""
        self._realism = Realism(rows, codes_NM, image, encode)

    def decoded(self, anatomy_HW: Anatomy, code_M: Code) -> Image:
        """D(a, z): (H, W) in (-1, 1)."""
        from pipeline.samples.synthesis import synthesize

        batch = synthesize(self._decoder, self._channels, anatomy_HW[None], code_M[None], self.plan.fa_precision)
        drawn: Image = batch[0]
        return drawn

    def texture(self, image_HW: Image, anatomy_HW: Anatomy, own_M: Code) -> Image:
        """What an image's own factors do not give back of it: x - D(a, z)."""
        rest: Image = image_HW - self.decoded(anatomy_HW, own_M)
        return rest

    def __call__(self, sample: Sample, anatomy_HW: Anatomy, own_M: Code, texture_HW: Image | None = None) -> Image:
        """(H, W) in [-1, 1], as the scanner of the sample's modality would draw it; a pure function of what is given.

        `own_M` is the slice's own code. With `texture_HW` the image is residual: the drawn one with the texture of the
        real one. What the guard turns down is drawn with the donor's own code.
        """
        code = self._modalities(sample)
        if sample.step != 1.0:
            code = own_M + np.float32(sample.step) * (code - own_M)
        image = self._rendered(anatomy_HW, code, texture_HW)
        if self._realism is None or self._realism(image, code):
            return image
        self.rejected += 1
        return self._rendered(anatomy_HW, self.donors.modality[sample.donor_id], texture_HW)

    def _rendered(self, anatomy_HW: Anatomy, code_M: Code, texture_HW: Image | None) -> Image:
        drawn = self.decoded(anatomy_HW, code_M)
        return drawn if texture_HW is None else (drawn + texture_HW).clip(-1.0, 1.0)
