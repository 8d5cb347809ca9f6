"""What an arm trains on and how it is optimised."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.samples.appearance import Appearance
from pipeline.samples.plan import FaPolicy, FaRender, Guard, PlanConfig, Regions
from storage.identity import added


class ArmConfig(BaseModel):
    """What an arm of the ablation switches on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["unet", "sdnet"] = "sdnet"
    semi_supervised: bool = False
    ra: bool = False
    fa: bool = False
    policy: FaPolicy | None = Field(None, description="FA: in place of `plan.fa_policy`")
    appearance: Appearance = Field("none", description="augmentation of the images' looks, before RA")
    consistency: bool = Field(False, description="unlabelled samples and their twins must segment alike")
    render: FaRender | None = added(None, description="FA: in place of `plan.fa_render`")
    step: tuple[float, float] | None = added(None, description="FA: in place of `plan.fa_step`")
    guard: Guard | None = added(None, description="FA: in place of `plan.fa_guard`")
    regions: Regions | None = added(
        None, description="in place of `plan.fa_regions`, which an arm without FA otherwise leaves alone"
    )

    @property
    def uses_bank(self) -> bool:
        """Whether it needs a factor bank: for images to be drawn, or for the regions of anatomies."""
        return self.fa or self.regions == "anatomy"

    def augmentation(self, plan: PlanConfig) -> PlanConfig:
        """The run's plan with what this arm sets itself."""
        own: dict[str, object] = {
            "fa_policy": self.policy,
            "fa_render": self.render,
            "fa_step": self.step,
            "fa_guard": self.guard,
        }
        own["fa_regions"] = self.regions if self.fa or self.regions else "none"
        return plan.model_copy(update={name: value for name, value in own.items() if value is not None})


class TrainConfig(BaseModel):
    """Optimisation (paper section 3.2). An epoch is one pass over the labelled slices unless `steps_per_epoch` says
    otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(4, ge=1, description="labelled samples a step, over all workers")
    epochs: int = Field(50, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    plateau_patience: int = Field(
        1, ge=0, description="1: the second epoch in a row without improvement lowers the rate"
    )
    precision: Literal["fp32", "bf16"] = "bf16"
    update: Literal["joint", "separate"] = Field(
        "joint",
        description="one optimiser step for labelled and unlabelled samples together, so that batch norm sees both, or "
        "one for each in turn (authors' code)",
    )
    start: Literal["scratch", "pretrained"] = Field(
        "scratch", description="an arm's SDNet: untrained, or the weights of the one that fills the bank"
    )
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient; None: unclipped (paper)")
    watched_slices: int = Field(
        40, ge=0, description="training slices on which SDNet's factors are measured after each epoch; 0: none"
    )
    revive_every: int | None = Field(
        None,
        ge=1,
        description="steps between looks for a dead anatomy channel, which then takes over part of a live one's "
        "pixels; None: never (paper)",
    )
    standardise_codes: bool = Field(
        False,
        description="give the trained SDNet's modality codes mean 0 and standard deviation 1, by its linear layers: no "
        "image changes; False: as they come (paper)",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a running average of the weights, which is then validated and kept; None: off (paper)",
    )
