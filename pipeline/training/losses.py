"""Loss terms: those of the paper (eq. 1; Dice and focal as in MONAI), and further ones that arms may add."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.training.config import LossConfig

EPSILON = 1e-6
NEVER = -1e4  # a logit of probability 0; -inf times a target of 0 would be NaN
SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI
MEMORY = 80  # slices of a vendor: after so many, a running mean has lost about two thirds of what it held


def segmentation_losses(config: LossConfig) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function of logits (N, C, H, W) and labels (N, H, W) int64 that returns the weighted `dice` and `focal`."""
    from monai.losses import FocalLoss
    from monai.networks import one_hot

    focal = FocalLoss(use_softmax=True, gamma=config.focal_gamma)

    def losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        target = one_hot(labels[:, None], logits.shape[1])
        # MONAI's focal loss averages over classes. Here classes are summed: at gamma 0 this is the cross-entropy.
        return {
            "dice": config.dice * dice_loss(logits, target, config.dice_form),
            "focal": config.focal * logits.shape[1] * focal(logits, target),
        }

    return losses


def deep_supervision(levels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the terms of several levels, the finest first, by name (Isensee et al. 2021).

    The weights are proportional to 1, ½, ¼ … and add up to 1.
    """
    total = 2.0 - 0.5 ** (len(levels) - 1)
    return {
        name: torch.stack([0.5**k / total * level[name] for k, level in enumerate(levels)]).sum() for name in levels[0]
    }


def merged_with_background(logits_NCHW: Tensor, drawn_N3: Tensor) -> Tensor:
    """Merge structures that nobody drew into the background, image by image. Returns logits (N, C, H, W).

    drawn: (N, 3) bool, whether LV, MYO and RV are drawn in each mask. If one is not, a label of 0 means background or
    that structure. So the background gets the summed probability of both, and the structure gets 0 (Fang and Yan, IEEE
    TMI 2020, target adaptive loss; Shi et al., Medical Image Analysis 2021, marginal loss). If all are drawn, the
    logits stay the same.
    """
    never = torch.full_like(logits_NCHW[:, 1:], NEVER)
    hidden = ~drawn_N3[:, :, None, None]
    background = torch.cat([logits_NCHW[:, :1], logits_NCHW[:, 1:].where(hidden, never)], dim=1).logsumexp(1, True)
    return torch.cat([background, never.where(hidden, logits_NCHW[:, 1:])], dim=1)


def dice_loss(logits_NCHW: Tensor, target_NCHW: Tensor, form: Literal["generalised", "soft"]) -> Tensor:
    """MONAI's DiceLoss or GeneralizedDiceLoss over the whole batch, a scalar. target: one-hot float32.

    MONAI's own code reads values on the CPU, which would end a compiled graph. The sums run over the batch, because
    many slices lack a structure, and in a single image an absent class would outweigh all others.
    """
    shares, axes = logits_NCHW.softmax(dim=1), (0, 2, 3)
    overlap, wanted = (shares * target_NCHW).sum(axes), target_NCHW.sum(axes)  # (C,)
    both = 2.0 * (overlap + 0.5 * (shares.sum(axes) - overlap) + 0.5 * (wanted - overlap))
    if form == "soft":
        return (1.0 - (2.0 * overlap + SMOOTH) / (both + SMOOTH)).mean()
    weight = (wanted * wanted).reciprocal()
    absent = weight.isinf()  # an absent class weighs as much as the smallest class present
    weight = weight.masked_fill(absent, 0.0)
    weight = weight + absent * weight.max()
    return 1.0 - (2.0 * (overlap * weight).sum() + SMOOTH) / ((both * weight).sum() + SMOOTH)


def reconstruction_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean L1 distance over pixels."""
    return F.l1_loss(reconstruction, image)


def contrast_loss(reconstruction_N1HW: Tensor, image_N1HW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Absolute difference of a structure's mean grey between reconstruction and image.

    Mean over LV, MYO and RV of all images, as far as an image has them; 0 if no image has any. Images are float32.
    """
    structures = F.one_hot(labels_NHW, 4)[..., 1:].movedim(-1, 1).float()  # (N, 3, H, W)
    pixels = structures.sum(dim=(2, 3))
    apart = ((reconstruction_N1HW - image_N1HW) * structures).sum(dim=(2, 3)) / pixels.clamp_min(1.0)
    return apart.abs().sum() / (pixels > 0).sum().clamp_min(1)


def latent_regression_loss(encoded: Tensor, sampled: Tensor) -> Tensor:
    """L1 distance between the modality that an image was drawn with and the modality encoded from the image."""
    return F.l1_loss(encoded, sampled)


def consistency_loss(logits_NCHW: Tensor, twin_NCHW: Tensor) -> Tensor:
    """Mean squared difference between the class shares of two segmentations, over pixels and classes."""
    return F.mse_loss(logits_NCHW.softmax(dim=1), twin_NCHW.softmax(dim=1))


def taught_loss(logits_NCHW: Tensor, taught_NCHW: Tensor) -> Tensor:
    """1 minus the soft Dice between the class shares of two segmentations, summed over the batch; mean over structures.

    This is a mean teacher (Tarvainen and Valpola 2017) with the Dice of V-Net (Milletari et al. 2016). A cross-entropy
    would be dominated by the background, which nearly all pixels are.
    """
    ours, theirs = (logits.softmax(dim=1)[:, 1:] for logits in (logits_NCHW, taught_NCHW))
    both = (ours * theirs).sum(dim=(0, 2, 3))
    each = ours.square().sum(dim=(0, 2, 3)) + theirs.square().sum(dim=(0, 2, 3))
    return 1.0 - ((2.0 * both + EPSILON) / (each + EPSILON)).mean()


def ramp(step: int, length: int) -> float:
    """exp(-5 (1 - t)²) with t = min(1, step / length): rises from 0.007 to 1 (Laine and Aila 2017)."""
    return math.exp(-5.0 * (1.0 - min(1.0, step / length)) ** 2)


def code_kl(codes_NM: Tensor) -> Tensor:
    """KL(N(mean, var) ‖ N(0, 1)) of the batch's codes, mean over dimensions. Meaningful for two or more samples."""
    mean, var = codes_NM.mean(0), codes_NM.var(0, unbiased=False).clamp_min(1e-6)
    return 0.5 * (mean.square() + var - var.log() - 1.0).mean()


def channel_balance(soft_NCHW: Tensor) -> Tensor:
    """Mean entropy of the pixels' channel shares, minus the entropy of the mean share, plus log C. In [0, log C].

    It is 0 if every pixel belongs to one channel and all C channels are used equally. Up to a constant it is the
    negative mutual information of pixel and channel (Krause et al. 2010, regularised information maximisation).
    """
    share = soft_NCHW.mean(dim=(0, 2, 3))
    by_pixel = -(soft_NCHW * (soft_NCHW + EPSILON).log()).sum(dim=1).mean()
    overall = -(share * (share + EPSILON).log()).sum()
    return by_pixel - overall + math.log(soft_NCHW.shape[1])


class VendorAlignment(nn.Module):
    """Loss for differences of the mean channel shares between vendors, in units of the spread within vendors.

    A batch has too few slices to estimate means, so running means are kept. The gradient moves each slice's shares
    against the deviation of its vendor. An adversary that is always at its optimum, a linear discriminant with diagonal
    covariance, would send back this gradient (after Ganin and Lempitsky 2015), but no second network has to be trained.
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
        """A scalar ≥ 0, 0 if all vendors agree. Updates the running means in train mode.

        anatomy: (N, C, H, W) of 0 and 1 with the straight-through gradient. vendor: (N,) int64 numbers from 0.
        """
        share = anatomy_NCHW.float().mean(dim=(2, 3))
        if self.training:
            self._remember(share.detach(), vendor_N)
        deviation = self.mean - self.mean.mean(dim=0)
        scale = self.variance + 1e-4
        slope = 2.0 * (deviation / scale)[vendor_N]
        moved = (slope * (share - share.detach())).sum(dim=1).mean()  # the value is 0, but it carries the gradient
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
    """Draw z ~ N(0, I), (count, size) float32. The generator is on the CPU, so all devices get the same numbers."""
    drawn = torch.randn((count, size), generator=generator)
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
