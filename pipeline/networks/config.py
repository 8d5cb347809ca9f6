"""Widths and factor sizes of the networks. Imports no torch, so that commands start quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.identity import added

Precision = Literal["fp32", "bf16"]  # number format in which a network is run


class UNetConfig(BaseModel):
    """A U-Net of five levels. The first has `width` channels, the others 2, 4, 8 and 8 times as many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(64, ge=1)
    classes: int = Field(4, ge=2, description="background, LV, MYO, RV")
    deep: int = added(
        0,
        ge=0,
        le=3,
        description="coarser levels that are taught the mask as well, each with half the weight of the one above it "
        "(deep supervision, nnU-Net)",
    )


class SDNetConfig(BaseModel):
    """Widths and factor sizes of an SDNet. Encoders and segmentor have the authors' widths; the decoder's is ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anatomy_width: int = Field(64, ge=1, description="first level of the anatomy encoder's U-Net")
    anatomy_channels: int = Field(8, ge=1, le=8)
    modality_width: int = Field(64, ge=1, description="first convolution of the modality encoder; then 2 and 4 times")
    modality_size: int = Field(8, ge=1)
    anatomy_gain: float = Field(
        30.0, gt=0, description="multiplies the anatomy head's initial weights; at 1 no channel fires at first"
    )
    segmentor_width: int = Field(64, ge=1)
    decoder_width: int = Field(16, ge=1)
    modulation: Literal["adain", "adain_relu", "scalars", "none"] = Field(
        "adain",
        description="how the modality enters the decoder: AdaIN of every channel (paper); that after a ReLU, so that "
        "no scale is negative (DGNet); one scale and shift an image (GaNDLF); not at all (the authors' published code)",
    )
    style_width: int = Field(64, ge=1, description="hidden layer of the MLP from modality to AdaIN's scale and shift")
    classes: int = Field(4, ge=2)
