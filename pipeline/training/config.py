"""An arm's switches, its loss and its optimisation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.networks.config import Precision
from pipeline.samples.appearance import NNUNET, Appearance
from pipeline.samples.plan import FaPolicy, FaRender, Guard, PlanConfig, Regions
from storage.identity import added

Schedule = Literal["plateau", "cosine", "polynomial"]


class LossConfig(BaseModel):
    """Weights and forms of the loss terms. In the paper (eq. 1) all four weights are 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reconstruction: float = Field(1.0, ge=0)
    latent: float = Field(1.0, ge=0, description="latent regression")
    dice: float = Field(1.0, ge=0)
    focal: float = Field(1.0, ge=0)
    kl: float = Field(0.0, ge=0, description="KL of the modality codes' batch statistics from N(0, 1); not in eq. 1")
    balance: float = Field(
        0.0,
        ge=0,
        description="anatomy: channels used alike, each pixel by one; not in eq. 1",
    )
    balance_temperature: float = Field(
        4.0, gt=0, description="of the shares that are balanced: a channel near 0 gets some gradient"
    )
    align: float = Field(
        0.0,
        ge=0,
        description="anatomy: channels cover like shares of the images of every vendor, so that the anatomy does not "
        "tell who made the image; not in eq. 1",
    )
    consistency: float = Field(
        1.0, ge=0, description="of arms with twins: two modalities of one anatomy segment alike; not in eq. 1"
    )
    consistency_ramp: int = Field(
        300, ge=1, description="steps over which that weight rises, as exp(-5 (1 - t)²) (Laine and Aila 2017)"
    )
    consistency_by: Literal["twin", "teacher"] = added(
        "twin",
        description="who segments the twin: the network itself, both ways alike by their squared difference, or "
        "(teacher) the running average of its weights, which is then followed by soft Dice; needs train.ema",
    )
    contrast: float = added(
        0.0,
        ge=0,
        description="labelled samples: a reconstruction has the mean grey of every structure that the image has, so "
        "that the thin myocardium is worth as much as the cavities; not in eq. 1",
    )
    dice_form: Literal["generalised", "soft"] = Field("soft", description="sums over the batch, background included")
    focal_gamma: float = Field(2.0, ge=0)
    latent_source: Literal["sampled", "reconstruction"] = Field(
        "sampled",
        description="regress a sampled vector (paper), or the image's own from its reconstruction (authors' code)",
    )


class ArmConfig(BaseModel):
    """One arm of the ablation: its network, its data and its augmentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["unet", "sdnet"] = "sdnet"
    semi_supervised: bool = False
    ra: bool = False
    fa: bool = False
    policy: FaPolicy | None = Field(None, description="FA: in place of `plan.fa_policy`")
    appearance: Appearance = Field("none", description="augmentation of the images' looks, before RA")
    consistency: bool = Field(
        False, description="unlabelled samples and their twins (of another modality or look) must segment alike"
    )
    render: FaRender | None = added(None, description="FA: in place of `plan.fa_render`")
    step: tuple[float, float] | None = added(None, description="FA: in place of `plan.fa_step`")
    guard: Guard | None = added(None, description="FA: in place of `plan.fa_guard`")
    regions: Regions | None = added(
        None, description="in place of `plan.fa_regions`, which an arm without FA otherwise leaves alone"
    )
    turn_degrees: float | None = added(None, description="in place of `plan.turn_degrees`")
    zoom: tuple[float, float] | None = added(None, description="in place of `plan.zoom`")
    elastic: float | None = added(None, description="in place of `plan.elastic`")

    @model_validator(mode="after")
    def _moves_what_it_can(self) -> ArmConfig:
        if self.appearance in NNUNET and (self.uses_bank or self.consistency):
            raise ValueError("nnU-Net's transforms move an image by themselves: not with factors, nor with twins")
        return self

    @property
    def uses_bank(self) -> bool:
        """Whether the arm needs a factor bank, to draw images or to take regions from anatomies."""
        return self.fa or self.regions == "anatomy"

    def augmentation(self, plan: PlanConfig) -> PlanConfig:
        """The run's plan with the fields that this arm sets. An arm without FA has no regions, unless it sets them."""
        own: dict[str, object] = {
            "fa_policy": self.policy,
            "fa_render": self.render,
            "fa_step": self.step,
            "fa_guard": self.guard,
            "turn_degrees": self.turn_degrees,
            "zoom": self.zoom,
            "elastic": self.elastic,
        }
        own["fa_regions"] = self.regions if self.fa or self.regions else "none"
        return plan.model_copy(update={name: value for name, value in own.items() if value is not None})

    def conflict(self, plan: PlanConfig) -> str:
        """Why this arm cannot be trained with the run's plan, in words that follow its name. Empty if it can."""
        seen = self.augmentation(plan)
        if self.fa and seen.fa_order == "ra_first":
            if seen.moves:
                return "moves its samples before RA, so plan.fa_order must be fa_first"
            if seen.fa_render == "decode" and (self.appearance != "none" or seen.fa_regions != "none"):
                return "has looks, which images decoded after RA would cover, so plan.fa_order must be fa_first"
        if self.consistency and seen.fa_anatomy != "any":
            return "compares unlabelled samples with their twins, so plan.fa_anatomy must be any"
        return ""


class TrainConfig(BaseModel):
    """Optimisation (paper section 3.2). An epoch is `steps_per_epoch` steps, or one pass over the labelled slices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(4, ge=1, description="labelled samples a step, over all workers")
    epochs: int = Field(50, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    plateau_patience: int = Field(
        1, ge=0, description="1: the second epoch in a row without improvement lowers the rate"
    )
    schedule: Schedule = added(
        "plateau",
        description="of the learning rate: lowered when validation no longer improves (paper), or down to nearly 0 "
        "over all epochs, epoch by epoch, as a cosine or as (1 - epoch / epochs) to the .9 (nnU-Net)",
    )
    precision: Precision = "bf16"
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
