"""The objective of the paper (eq. 1): reconstruction, latent regression, Dice and focal, the last two as MONAI's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.training.config import LossConfig

EPSILON = 1e-6
NEVER = -1e4  # a logit of probability 0; -inf times a target of 0 would be no number
SMOOTH = 1e-5  # MONAI's, in numerator and denominator of Dice
MEMORY = 80  # slices of a vendor after which a running mean has forgotten about two thirds


def segmentation_losses(config: LossConfig) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function (logits (N, C, H, W), labels (N, H, W) int64) → {"dice", "focal"}, weighted scalars."""
    from monai.losses import FocalLoss
    from monai.networks import one_hot

    focal = FocalLoss(use_softmax=True, gamma=config.focal_gamma)

    def losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        target = one_hot(labels[:, None], logits.shape[1])
        # MONAI's focal loss averages over classes too; the sum over classes is the cross-entropy at gamma 0
        return {
            "dice": config.dice * dice_loss(logits, target, config.dice_form),
            "focal": config.focal * logits.shape[1] * focal(logits, target),
        }

    return losses


def deep_supervision(levels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One term of each name from the levels', the finest first: weights 1, ½, ¼ …, which add up to 1 (Isensee et al.
    2021)."""
    total = 2.0 - 0.5 ** (len(levels) - 1)
    return {
        name: torch.stack([0.5**k / total * level[name] for k, level in enumerate(levels)]).sum() for name in levels[0]
    }


def merged_with_background(logits_NCHW: Tensor, drawn_N3: Tensor) -> Tensor:
    """Logits whose softmax gives background the probability of what nobody drew in an image, and the latter none.

    drawn (N, 3) bool: whether LV, MYO and RV are drawn in each image. There a pixel of 0 is background or any structure
    that is not drawn, so that the loss of the merged class is the loss of what the mask says (Fang and Yan, IEEE TMI
    2020, target adaptive loss; Shi et al., Medical Image Analysis 2021, marginal loss). An image in which all are drawn
    keeps its logits.
    """
    never = torch.full_like(logits_NCHW[:, 1:], NEVER)
    hidden = ~drawn_N3[:, :, None, None]
    background = torch.cat([logits_NCHW[:, :1], logits_NCHW[:, 1:].where(hidden, never)], dim=1).logsumexp(1, True)
    return torch.cat([background, never.where(hidden, logits_NCHW[:, 1:])], dim=1)


def dice_loss(logits_NCHW: Tensor, target_NCHW: Tensor, form: Literal["generalised", "soft"]) -> Tensor:
    """MONAI's DiceLoss or GeneralizedDiceLoss of the whole batch; target is one-hot, float32. Theirs asks the CPU for
    numbers, which ends a compiled graph.

    Over the batch: many slices lack a structure, and by image an absent class outweighs all others.
    """
    shares, axes = logits_NCHW.softmax(dim=1), (0, 2, 3)
    overlap, wanted = (shares * target_NCHW).sum(axes), target_NCHW.sum(axes)  # (C,)
    both = 2.0 * (overlap + 0.5 * (shares.sum(axes) - overlap) + 0.5 * (wanted - overlap))
    if form == "soft":
        return (1.0 - (2.0 * overlap + SMOOTH) / (both + SMOOTH)).mean()
    weight = (wanted * wanted).reciprocal()
    absent = weight.isinf()  # weighs as much as the smallest structure that is there
    weight = weight.masked_fill(absent, 0.0)
    weight = weight + absent * weight.max()
    return 1.0 - (2.0 * (overlap * weight).sum() + SMOOTH) / ((both * weight).sum() + SMOOTH)


def reconstruction_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """L1 distance, mean over pixels."""
    return F.l1_loss(reconstruction, image)


def contrast_loss(reconstruction_N1HW: Tensor, image_N1HW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Distance of a structure's mean grey in the reconstruction from that in the image: mean over the images' LV, MYO
    and RV that are there; 0 where none is."""
    structures = F.one_hot(labels_NHW, 4)[..., 1:].movedim(-1, 1).float()  # (N, 3, H, W)
    pixels = structures.sum(dim=(2, 3))
    apart = ((reconstruction_N1HW - image_N1HW) * structures).sum(dim=(2, 3)) / pixels.clamp_min(1.0)
    return apart.abs().sum() / (pixels > 0).sum().clamp_min(1)


def latent_regression_loss(encoded: Tensor, sampled: Tensor) -> Tensor:
    """L1 distance between a sampled modality vector and what the encoder reads from the image drawn with it."""
    return F.l1_loss(encoded, sampled)


def consistency_loss(logits_NCHW: Tensor, twin_NCHW: Tensor) -> Tensor:
    """Squared difference of the two segmentations' class shares, mean over pixels and classes."""
    return F.mse_loss(logits_NCHW.softmax(dim=1), twin_NCHW.softmax(dim=1))


def taught_loss(logits_NCHW: Tensor, taught_NCHW: Tensor) -> Tensor:
    """1 less the soft Dice of the two segmentations' class shares, sums over the batch, mean over the structures.

    A cross-entropy would let the background win, which nearly all pixels are (a mean teacher, Tarvainen and Valpola
    2017, with the Dice of V-Net, Milletari et al. 2016).
    """
    ours, theirs = (logits.softmax(dim=1)[:, 1:] for logits in (logits_NCHW, taught_NCHW))
    both = (ours * theirs).sum(dim=(0, 2, 3))
    each = ours.square().sum(dim=(0, 2, 3)) + theirs.square().sum(dim=(0, 2, 3))
    return 1.0 - ((2.0 * both + EPSILON) / (each + EPSILON)).mean()


def ramp(step: int, length: int) -> float:
    """exp(-5 (1 - t)²) with t = step / length up to 1 (Laine and Aila 2017)."""
    return math.exp(-5.0 * (1.0 - min(1.0, step / length)) ** 2)


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


class VendorAlignment(nn.Module):
    """How far the vendors' mean channel shares lie apart, in units of the spread within vendors; 0 where they agree.

    A batch has too few slices for means of its own, so running ones are kept; the gradient moves each slice's shares
    against its vendor's deviation. It is what a linear adversary that is always at its optimum (a linear discriminant
    with diagonal covariance) would send back, without a second network to train (after Ganin and Lempitsky 2015).
    """

    def __init__(self, vendors: int, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.full((vendors, channels), 1.0 / channels))
        self.register_buffer("variance", torch.full((channels,), 0.01))
        self.register_buffer("seen", torch.zeros(vendors))

    def forward(self, anatomy_NCHW: Tensor, vendor_N: Tensor) -> Tensor:
        """anatomy of 0 and 1 with its straight-through gradient; vendor (N,) int64 numbers. A scalar ≥ 0."""
        share = anatomy_NCHW.float().mean(dim=(2, 3))
        if self.training:
            self._remember(share.detach(), vendor_N)
        deviation = self.mean - self.mean.mean(dim=0)
        scale = self.variance + 1e-4
        slope = 2.0 * (deviation / scale)[vendor_N]
        moved = (slope * (share - share.detach())).sum(dim=1).mean()  # 0, with the gradient wanted
        value: Tensor = (deviation.square() / scale).sum(dim=1)[vendor_N].mean() + moved
        return value

    @torch.no_grad()
    def _remember(self, share_NC: Tensor, vendor_N: Tensor) -> None:
        own = F.one_hot(vendor_N, len(self.seen)).to(share_NC.dtype)  # (N, V)
        count = own.sum(dim=0)
        self.seen += count
        rate = torch.maximum(count / self.seen.clamp_min(1.0), 1.0 - (1.0 - 1.0 / MEMORY) ** count)
        means = own.T @ share_NC / count.clamp_min(1.0)[:, None]
        self.mean += (rate * (count > 0))[:, None] * (means - self.mean)
        within = (share_NC - self.mean[vendor_N]).square().mean(dim=0)
        self.variance += 4.0 / MEMORY * (within - self.variance)


def sample_latent(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """z ~ N(0, I), (count, size) float32, from a generator on the CPU, so that all devices draw the same."""
    drawn = torch.randn((count, size), generator=generator)
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
