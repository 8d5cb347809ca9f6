"""Settings for the prediction of a study."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pipeline.networks.config import Precision
from storage.identity import added
from storage.nifti.header import Spacing
from storage.nifti.orientation import HEADER


class InferenceConfig(BaseModel):
    """How networks are applied to a volume. The defaults are those of `cardiomix predict`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixel_area: float | None = Field(
        None,
        ge=0.05,
        le=100,
        description="mm²: rescale each image so that the network sees native pixels of this area (RA's own measure, "
        "`plan.area_range_mm2`); None: the image's own",
    )
    flips: bool = Field(
        False,
        description="average over the image and its mirror images, of the kinds that the network was trained with: it "
        "knows no other mirrored heart",
    )
    keep_largest: bool = Field(True, description="of each structure only its largest connected part in 3D")
    recentre: bool = added(
        True, description="look again, centred on the heart, where it is found off-centre or cut off"
    )
    precision: Precision = "fp32"
    spacing: Spacing | None = added(
        None, description="slice, row and column distance in mm, in place of those of the images' headers"
    )
    orientation: str = added(
        HEADER, description="how images are turned before they are segmented, as `layouts.orientation` is for training"
    )
