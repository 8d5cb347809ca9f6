"""What a step minimises: the weighted losses of a network on a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.networks.sdnet import SDNet, binarise
from pipeline.networks.unet import UNet
from pipeline.training.config import LossConfig
from pipeline.training.losses import (
    VendorAlignment,
    channel_balance,
    code_kl,
    consistency_loss,
    contrast_loss,
    latent_regression_loss,
    merged_with_background,
    ramp,
    reconstruction_loss,
    sample_latent,
    segmentation_losses,
)


class Objective(nn.Module):
    """Network and losses as one module, so that a wrapper for several workers sees a single forward."""

    def __init__(
        self,
        model: UNet | SDNet,
        config: LossConfig,
        latent: torch.Generator,
        alignment: VendorAlignment | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.latent, self.alignment = model, config, latent, alignment
        self.segmentation = segmentation_losses(config)

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        labelled: Tensor,
        vendor: Tensor | None = None,
        twin: Tensor | None = None,
        step: int = 0,
        drawn: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms by name. Labelled samples come first in a batch; only they reach the segmentor, unless there
        are twins. `drawn` (N, 3) bool: which structures the masks hold; None where all of them do."""
        count = int(labelled.sum())  # on the CPU
        model = self.model
        terms: dict[str, Tensor] = {}
        if isinstance(model, SDNet):
            shares = model.anatomy_encoder(image)  # before the softmax
            anatomy = binarise(shares.softmax(dim=1))
            codes = model.encode_modality(image)
            reconstruction = model.decode(anatomy, codes)
            terms["reconstruction"] = self.config.reconstruction * reconstruction_loss(reconstruction.float(), image)
            if self.config.contrast > 0:
                labelled_part = contrast_loss(reconstruction[:count].float(), image[:count], mask[:count])
                terms["contrast"] = self.config.contrast * labelled_part
            terms["latent"] = self.config.latent * self._latent(model, anatomy, codes, reconstruction)
            if self.config.kl > 0:
                terms["kl"] = self.config.kl * code_kl(codes.float())
            if self.config.balance > 0:
                soft = (shares.float() / self.config.balance_temperature).softmax(dim=1)
                terms["balance"] = self.config.balance * channel_balance(soft)
            if self.alignment is not None and vendor is not None:
                terms["align"] = self.config.align * self.alignment(anatomy, vendor)
            seen = anatomy if twin is not None else anatomy[:count]
            logits = model.segment(seen) if len(seen) else None
        else:
            seen = image if twin is not None else image[:count]
            logits = model(seen) if len(seen) else None
        again = model(twin[count:]) if twin is not None and count < len(image) else None
        if logits is not None and again is not None:
            share = self.config.consistency * ramp(step, self.config.consistency_ramp)
            terms["consistency"] = share * consistency_loss(logits[count:].float(), again.float())
        if logits is not None and count:
            supervised = logits[:count].float()
            if drawn is not None:
                supervised = merged_with_background(supervised, drawn[:count])
            terms |= self.segmentation(supervised, mask[:count])
        return terms

    def _latent(self, model: SDNet, anatomy: Tensor, codes: Tensor, reconstruction: Tensor) -> Tensor:
        if self.config.latent_source == "reconstruction":
            return latent_regression_loss(model.encode_modality(reconstruction).float(), codes.float())
        sampled = sample_latent(codes, self.latent)
        return latent_regression_loss(model.encode_modality(model.decode(anatomy, sampled)).float(), sampled.float())
