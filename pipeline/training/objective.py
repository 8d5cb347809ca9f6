"""The objective of a step: the weighted losses of a network on a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.networks.sdnet import SDNet, binarise
from pipeline.networks.unet import UNet
from pipeline.training.config import LossConfig
from pipeline.training.kernels import Compiled
from pipeline.training.losses import (
    VendorAlignment,
    channel_balance,
    code_kl,
    consistency_loss,
    contrast_loss,
    deep_supervision,
    latent_regression_loss,
    merged_with_background,
    ramp,
    reconstruction_loss,
    sample_latent,
    segmentation_losses,
    taught_loss,
)


class Objective(nn.Module):
    """Network and losses as one module, so that a wrapper for several workers sees a single forward pass."""

    def __init__(
        self,
        model: UNet | SDNet,
        config: LossConfig,
        latent: torch.Generator,
        alignment: VendorAlignment | None = None,
        teacher: UNet | SDNet | None = None,
    ) -> None:
        """`latent` draws the modality vectors. `teacher` is the model's running average; it segments the twins if
        `consistency_by` is `teacher`. Raises ValueError if it is None then.
        """
        super().__init__()
        self.model, self.config, self.latent, self.alignment = model, config, latent, alignment
        self.segmentation = segmentation_losses(config)
        self._teacher: tuple[UNet | SDNet, ...] = ()  # in a tuple, so that its weights are not registered for training
        if config.consistency_by == "teacher":
            if teacher is None:
                raise ValueError("consistency by a teacher needs a running average")
            self._teacher = (teacher.eval(),)
        self.run: Callable[..., dict[str, Tensor]] = self.terms

    def compile_terms(self, backend: str = "inductor") -> Compiled:
        """Compile every later call (see `Compiled`)."""
        compiled = Compiled(self, self.terms, backend)
        self.run = compiled
        return compiled

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        count: int,
        vendor: Tensor | None = None,
        twin: Tensor | None = None,
        step: int = 0,
        drawn: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted loss terms, scalars by name. Inputs are those of `step.Batch`; `step` is the training step.

        The first `count` samples are labelled. It is a number, since wrappers for several workers put every tensor on
        the GPU, and reading it back would wait. Without twins, only labelled samples reach the segmentor.
        """
        latent = share = None
        if isinstance(self.model, SDNet) and self.config.latent_source == "sampled":
            latent = sample_latent(len(image), self.model.config.modality_size, self.latent, image.device)
        if twin is not None and count < len(image):
            weight = self.config.consistency * ramp(step, self.config.consistency_ramp)
            share = torch.full((), weight, device=image.device)
        return self.run(image, mask, count, latent, vendor, twin, share, drawn)

    def terms(
        self,
        image: Tensor,
        mask: Tensor,
        count: int,
        latent: Tensor | None,
        vendor: Tensor | None,
        twin: Tensor | None,
        share: Tensor | None,
        drawn: Tensor | None,
    ) -> dict[str, Tensor]:
        """The weighted terms of a batch whose first `count` samples are labelled. Draws no random numbers.

        latent: (N, M) sampled modality vectors, or None. share: the weight of the consistency, a scalar, or None.
        """
        model = self.model
        terms: dict[str, Tensor] = {}
        coarser: list[Tensor] = []
        if isinstance(model, SDNet):
            shares = model.anatomy_encoder(image)  # before the softmax
            anatomy = binarise(shares.softmax(dim=1))
            codes = model.encode_modality(image)
            reconstruction = model.decode(anatomy, codes)
            terms["reconstruction"] = self.config.reconstruction * reconstruction_loss(reconstruction.float(), image)
            if self.config.contrast > 0:
                labelled_part = contrast_loss(reconstruction[:count].float(), image[:count], mask[:count])
                terms["contrast"] = self.config.contrast * labelled_part
            terms["latent"] = self.config.latent * self._latent(model, anatomy, codes, reconstruction, latent)
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
            logits = None
            if len(seen):
                logits, *coarser = model.logits_by_level(seen)
        if twin is not None and share is not None and logits is not None:
            terms["consistency"] = share * self._consistency(logits[count:].float(), twin[count:])
        if logits is not None and count:
            levels = [self._supervised(logits, mask, count, drawn)]
            levels += [self._supervised(level, mask, count, drawn) for level in coarser]
            terms |= levels[0] if not coarser else deep_supervision(levels)
        return terms

    def _consistency(self, logits: Tensor, twin: Tensor) -> Tensor:
        """The loss between the logits of unlabelled samples and the segmentation of their twins."""
        for teacher in self._teacher:
            with torch.no_grad():
                taught = teacher(twin).float()
            return taught_loss(logits, taught)
        return consistency_loss(logits, self.model(twin).float())

    def _supervised(self, logits: Tensor, mask: Tensor, count: int, drawn: Tensor | None) -> dict[str, Tensor]:
        """The segmentation losses of the labelled samples. For coarser logits, the mask is subsampled to their size."""
        step = mask.shape[-1] // logits.shape[-1]
        supervised = logits[:count].float()
        if drawn is not None:
            supervised = merged_with_background(supervised, drawn[:count])
        return self.segmentation(supervised, mask[:count, ::step, ::step])

    def _latent(
        self, model: SDNet, anatomy: Tensor, codes: Tensor, reconstruction: Tensor, sampled: Tensor | None
    ) -> Tensor:
        if sampled is None:
            return latent_regression_loss(model.encode_modality(reconstruction).float(), codes.float())
        sampled = sampled.to(codes.dtype)
        return latent_regression_loss(model.encode_modality(model.decode(anatomy, sampled)).float(), sampled.float())
