"""The options for reading data sets, which a user may set."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from storage.errors import InputError
from storage.identity import added
from storage.layouts.structures import FORM, parsed_structures
from storage.nifti.orientation import HEADER, parsed_orientation

# Each list has both kinds of file (raw and rebuilt) and both diseases of the first thirty patients.
ACDC_TEST = tuple(f"patient{n:03d}" for n in (4, 5, 10, 15, 24, 25, 29, 30))
ACDC_VALIDATION = tuple(f"patient{n:03d}" for n in (3, 12, 23, 27))


class LayoutOptions(BaseModel):
    """How folders become subjects. These options are part of a run's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: Literal["ed_es", "all"] = Field("ed_es", description="frames of a cine to take; masks are at ED and ES")
    unlabelled_frames: int = Field(
        2, ge=1, description="evenly spaced frames of a cine that has neither ED and ES nor masks (frames=ed_es)"
    )
    check_masks: bool = Field(
        True,
        description="refuse masks that lie mirrored or beside their image, or whose LV is not inside the MYO; false "
        "leaves out both checks for every subject: better name subjects in trust_mask_place or trust_label_order",
    )
    trust_mask_place: tuple[str, ...] = added(
        (),
        description="subjects whose masks fit their images although the masks' headers say otherwise; names or "
        "patterns such as p0*",
    )
    trust_label_order: tuple[str, ...] = added(
        (),
        description="subjects whose labels are right although they do not lie as LV, MYO and RV usually do; names or "
        "patterns such as p0*",
    )
    orientation: str = added(
        HEADER,
        description="how arrays are turned: by their headers (header), not at all (stored), or all of them in one way, "
        "such as 'x -y z' where rows are stored from below",
    )
    structures: dict[str, str] = added(
        {},
        description="what is drawn in the masks of subjects, by name or pattern: {'SC-*': 'ED: LV MYO; ES: LV'}; what "
        "is not named is neither taught as background nor scored. It replaces a table's column of that name",
    )
    follow_links: bool = Field(False, description="follow symbolic links that lead out of the data folder")
    acdc_vendor: str = Field("Siemens", min_length=1, description="vendor of every ACDC subject")
    acdc_centre: str = Field("Dijon", description="centre of every ACDC subject")
    acdc_test: tuple[str, ...] = Field(ACDC_TEST, description="ACDC subjects that are only tested on")
    acdc_validation: tuple[str, ...] = Field(ACDC_VALIDATION, description="ACDC subjects that choose, never train")
    dicom_vendor: str | None = added(
        None, min_length=1, description="vendor of every DICOM study, in place of its scanner's Manufacturer"
    )
    dicom_centre: str = added("unknown", min_length=1, description="centre of every DICOM study")
    validation_fraction: float = Field(
        0.15, gt=0, lt=1, description="held out of a labelled vendor's training subjects where the data name none"
    )
    split_seed: int = Field(0, ge=0, description="which subjects are held out, put aside or keep their labels")
    protocol: Literal["paper", "leave_one_vendor_out", "source_only"] = Field(
        "paper", description="who trains and who is tested: as the data say, all vendors but one, one vendor alone"
    )
    protocol_vendor: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="the vendor that leave_one_vendor_out only tests on, or that source_only trains on; none for paper",
    )
    protocol_test_fraction: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="leave_one_vendor_out: tested share of another vendor that the data only train on or only test on",
    )
    label_fraction: float = Field(
        1.0, gt=0, le=1, description="share of each vendor's labelled training subjects that keep their masks"
    )
    labelled_subjects: int | None = added(
        None, ge=1, description="in place of label_fraction: how many of each vendor's subjects keep their masks"
    )
    adapt_fraction: float = added(
        0.0,
        ge=0,
        lt=1,
        description="source_only: share of each other vendor whose images train, without labels, and are never tested",
    )
    test_half: Literal["all", "choose", "confirm"] = added(
        "all", description="which half of each vendor's test subjects is scored: one to choose by, one to confirm on"
    )

    @field_validator("orientation")
    @classmethod
    def _usual_orientation(cls, orientation: str) -> str:
        try:
            return parsed_orientation(orientation, "layouts")
        except InputError as error:
            raise ValueError(f"{error.problem}; {error.remedy}") from error

    @field_validator("structures")
    @classmethod
    def _structures_legible(cls, told: dict[str, str]) -> dict[str, str]:
        for name, text in told.items():
            try:
                parsed_structures(text)
            except ValueError as error:
                raise ValueError(f"{name}: '{text}': {error}; {FORM}") from error
        return told

    @field_validator("protocol_vendor")
    @classmethod
    def _named_where_needed(cls, vendor: str | None, info: ValidationInfo) -> str | None:
        protocol = info.data.get("protocol", "paper")
        if protocol == "paper" and vendor is not None:
            raise ValueError("protocol=paper takes none; set protocol too, or protocol_vendor=null")
        if protocol != "paper" and vendor is None:
            raise ValueError(f"protocol={protocol} needs a vendor's name")
        return vendor

    @property
    def protocol_label(self) -> str:
        """How the protocol differs from the splits of the data set, in a few words; empty if it does not."""
        named = "" if self.protocol == "paper" else f"{self.protocol} {self.protocol_vendor}"
        labels = "" if self.label_fraction == 1 else f"labels of {100 * self.label_fraction:g} % of subjects"
        if self.labelled_subjects is not None:
            labels = f"labels of {self.labelled_subjects} subjects a vendor"
        adapted = f"{100 * self.adapt_fraction:g} % of other vendors unlabelled" if self.adapt_fraction else ""
        half = "" if self.test_half == "all" else f"half to {self.test_half}"
        return ", ".join(filter(None, (named, adapted, labels, half)))

    @field_validator("adapt_fraction")
    @classmethod
    def _adapts_from_one(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction and info.data.get("protocol") != "source_only":
            raise ValueError("it needs protocol=source_only: other protocols say themselves whose images train")
        return fraction
