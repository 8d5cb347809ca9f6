"""The objective of the paper (eq. 1): reconstruction, latent regression, Dice and focal, the last two MONAI's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


class LossConfig(BaseModel):
    """Weights and forms of the terms. All four weights of the paper are 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reconstruction: float = Field(1.0, ge=0)
    latent: float = Field(1.0, ge=0, description="latent regression")
    dice: float = Field(1.0, ge=0)
    focal: float = Field(1.0, ge=0)
    kl: float = Field(0.0, ge=0, description="KL of the modality codes' batch statistics from N(0, 1); not in eq. 1")
    balance: float = Field(
        0.0,
        ge=0,
        description="anatomy: channels used alike, each pixel by one, so that none dies; not in eq. 1",
    )
    dice_form: Literal["generalised", "soft"] = Field("soft", description="sums over the batch, background included")
    focal_gamma: float = Field(2.0, ge=0)
    latent_source: Literal["sampled", "reconstruction"] = Field(
        "sampled",
        description="regress a sampled vector (paper), or the image's own from its reconstruction (authors' code)",
    )


def segmentation_losses(config: LossConfig) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function (logits (N, C, H, W), labels (N, H, W) int64) → {"dice", "focal"}, weighted scalars."""
    from monai.losses import DiceLoss, FocalLoss, GeneralizedDiceLoss

    form = GeneralizedDiceLoss if config.dice_form == "generalised" else DiceLoss
    # Over the batch: many slices lack a structure, and by image an absent class outweighs all others.
    dice = form(softmax=True, to_onehot_y=True, batch=True)
    focal = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=config.focal_gamma)

    def losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        target = labels[:, None]
        # MONAI's focal loss averages over classes too; the sum over classes is the cross-entropy at gamma 0
        return {
            "dice": config.dice * dice(logits, target),
            "focal": config.focal * logits.shape[1] * focal(logits, target),
        }

    return losses


def reconstruction_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """L1 distance, mean over pixels."""
    return F.l1_loss(reconstruction, image)


def latent_regression_loss(encoded: Tensor, sampled: Tensor) -> Tensor:
    """L1 distance between a sampled modality vector and what the encoder reads from the image drawn with it."""
    return F.l1_loss(encoded, sampled)


def code_kl(codes_NM: Tensor) -> Tensor:
    """KL(N(mean, var) ‖ N(0, 1)) of the batch's codes, mean over dimensions; needs a batch of two or more."""
    mean, var = codes_NM.mean(0), codes_NM.var(0, unbiased=False).clamp_min(1e-6)
    return 0.5 * (mean.square() + var - var.log() - 1.0).mean()


def channel_balance(soft_NCHW: Tensor) -> Tensor:
    """Mean entropy of the pixels' channel shares, less the entropy of the mean share, plus log C; 0 to log C.

    Least, 0, where every pixel is certain and all C channels are used alike: the negative mutual information of pixel
    and channel (Krause et al. 2010, regularised information maximisation).
    """
    share = soft_NCHW.mean(dim=(0, 2, 3))
    by_pixel = -(soft_NCHW * (soft_NCHW + EPSILON).log()).sum(dim=1).mean()
    overall = -(share * (share + EPSILON).log()).sum()
    return by_pixel - overall + math.log(soft_NCHW.shape[1])


def sample_latent(like: Tensor, generator: torch.Generator) -> Tensor:
    """z ~ N(0, I) of the codes' shape, from a generator on the CPU, so that all devices draw the same."""
    return torch.randn(like.shape, generator=generator).to(like)
