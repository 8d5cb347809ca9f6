"""Settings of a run and the presets. Every component's own configuration sits beside it; here they are only
composed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.resources import ResourceConfig
from experiments.arms import ARMS, PAPER
from pipeline.networks.config import Precision, SDNetConfig, UNetConfig
from pipeline.phantom import PhantomConfig
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.training.config import LossConfig, TrainConfig
from storage import fs
from storage.bank.spec import code_version
from storage.errors import InputError
from storage.identity import identity
from storage.layouts import LayoutOptions

CONFIG_FILE = "config.yaml"
MADE_BY = "# made by cardiomix "  # and the version: the first line of a configuration file
ROBUST = ("unet_ra", "unet_ra_moved_bigaug")


def _for_bank(config: TrainConfig) -> TrainConfig:
    """With what the paper does not do to an SDNet, and a bank gains from (docs/fidelity.md)."""
    return config.model_copy(update={"revive_every": 50, "standardise_codes": True})


def _brief(batch_size: int, epochs: int) -> TrainConfig:
    """Epochs of 60 steps, and a plateau rule that suits a short run."""
    return TrainConfig(batch_size=batch_size, epochs=epochs, steps_per_epoch=60, plateau_patience=2, plateau_factor=0.3)


def arms_fault(arms: Sequence[str]) -> str:
    """What is wrong with these names of arms; empty if nothing is."""
    unknown = ", ".join(arm for arm in arms if arm not in ARMS)
    return f"unknown arms: {unknown}" if unknown else "" if arms else "names no arm"


def named_arms(text: str) -> tuple[str, ...]:
    """The arms of `--arms a,b`. Raises InputError, by the flag, if one is unknown or none is named."""
    arms = tuple(name.strip() for name in text.split(",") if name.strip())
    fault = arms_fault(arms)
    if fault:
        raise InputError(f"--arms {text}", fault, f"choose from {', '.join(ARMS)}")
    return arms


class Settings(BaseModel):
    """Everything that determines a run, except the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    seed: int = Field(0, ge=0, description="replicate k of an arm uses seed + k")
    arms: tuple[str, ...] = tuple(PAPER)
    seeds: int = Field(1, ge=1, description="replicates of each arm")
    data: tuple[str, ...] = Field((), description="folders as given to ingest; empty: the phantom")
    layout: str = "auto"
    layouts: LayoutOptions = LayoutOptions()
    phantom: PhantomConfig = PhantomConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    unet: UNetConfig = UNetConfig()
    sdnet: SDNetConfig = SDNetConfig()
    loss: LossConfig = Field(LossConfig(), description="of the arms: the paper's eq. 1")
    pretrain_loss: LossConfig = Field(
        LossConfig(latent=0.5, balance=0.05, align=0.03),
        description="of the SDNet that fills the bank: what makes its factors worth banking (docs/fidelity.md)",
    )
    plan: PlanConfig = PlanConfig()
    train: TrainConfig = TrainConfig()
    pretrain: TrainConfig = _for_bank(TrainConfig())
    resources: ResourceConfig = ResourceConfig()
    bank_shard: int = Field(64, ge=1, description="slices in a shard of the factor bank")
    bank_precision: Precision = Field("fp32", description="of the encoders that fill the bank")
    bank: str | None = Field(
        None,
        description="a factor bank from elsewhere; nothing is pretrained then, and slices are extracted only if "
        "`pretrained` is given too",
    )
    pretrained: str | None = Field(None, description="folder of a trained SDNet from elsewhere")

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        fault = arms_fault(arms)
        if fault:
            raise ValueError(f"{fault}; choose from {', '.join(ARMS)}")
        return arms

    @model_validator(mode="after")
    def _something_to_start_from(self) -> Settings:
        if self.pretrain.start != "scratch":
            raise ValueError("pretrain.start must be scratch: it is what arms start from")
        if self.bank and self.train.start == "pretrained":
            raise ValueError("train.start=pretrained needs the whole SDNet; a bank has its decoder alone")
        return self

    @model_validator(mode="after")
    def _taught_by_an_average(self) -> Settings:
        if self.loss.consistency_by == "teacher" and self.train.ema is None:
            raise ValueError("loss.consistency_by=teacher needs a running average: set train.ema, such as .99")
        return self

    @property
    def config_hash(self) -> str:
        """First 12 hex digits of SHA-256 over the settings (see `storage.identity`)."""
        return hashlib.sha256(json.dumps(identity(self), sort_keys=True).encode()).hexdigest()[:12]


def demo() -> Settings:
    """The whole ablation on the phantom: 8 minutes on 2 cores (Zen 4), 2026-11-27.

    README has its Dice by vendor. So small an SDNet, trained so briefly, moves by .1 and more between runs.
    Pretrained by the paper's loss: 360 steps are few for further terms. After so few steps the decoder does not draw a
    heart from its factors alone (FA by `decode`: D .15 LV), so that FA adds to the real image what the code changes.
    """
    return Settings(
        preset="demo",
        preprocess=PreprocessConfig(size=96, field=224),
        unet=UNetConfig(width=8),
        sdnet=SDNetConfig(anatomy_width=8, modality_width=8, segmentor_width=16, decoder_width=8),
        pretrain_loss=LossConfig(),
        plan=PlanConfig(unlabelled_ratio=0.5, fa_render="residual"),
        train=_brief(batch_size=4, epochs=10),
        pretrain=_for_bank(_brief(batch_size=4, epochs=6)),
    )


def cpu() -> Settings:
    """Real data in about an hour on 2 cores, the paper's arms and that of `robust`: narrow networks, 128² for the
    paper's 224² field, and the schedule of `robust`: a plateau rule that suits a short run (patience 2, × 0.3) and a
    running average of the weights.

    29 ACDC and 4 unlabelled GE subjects, 2 cores (Zen 4), 2026-11-24: five arms in 47 minutes; mean volume Dice of 8
    test subjects LV .87 to .91, MYO .81 to .84, RV .75 to .81 (without the average; `pretrain_loss`: KL .05, balance
    .1, align .01).
    """
    return Settings(
        preset="cpu",
        arms=(*PAPER, *ROBUST[1:]),
        preprocess=PreprocessConfig(size=128, field=224, normalisation="foreground"),
        unet=UNetConfig(width=16),
        sdnet=SDNetConfig(anatomy_width=16, modality_width=16, segmentor_width=16, decoder_width=16),
        train=_brief(batch_size=8, epochs=15).model_copy(update={"ema": 0.99}),
        pretrain=_for_bank(_brief(batch_size=8, epochs=8)),
    )


def robust() -> Settings:
    """For one's own hospital: what did as well as any on scanners that it had not seen, at the paper's size. For a GPU.

    A U-Net of width 64 at 224², RA, random intensities (BigAug), turned and scaled images, a running average of the
    weights, and `unet_ra` beside it for comparison. FA is left out, since it added nothing to BigAug
    (docs/experiments.md). The recipe was chosen and confirmed at width 16 and 96², three seeds, mean Dice on the vendor
    not seen: .847 from Siemens to Philips, .771 from Philips to Siemens; without turns and scales .842 and .726, with
    RA alone .837 and .669. All of these by the z-score of the whole volume; by that of the foreground .789 from Philips
    to Siemens.
    Time at this size, an estimate from single steps: 3 hours an arm on 2 cores, 2 minutes on an H200.
    """
    train = TrainConfig(batch_size=8, epochs=10, steps_per_epoch=150, plateau_patience=2, plateau_factor=0.3, ema=0.99)
    return Settings(
        preset="robust",
        arms=ROBUST,
        preprocess=PreprocessConfig(normalisation="foreground"),
        train=train,
        pretrain=_for_bank(train.model_copy(update={"ema": None})),
    )


def paper() -> Settings:
    """The paper's own numbers (sections 2 and 3): 224², batch 4, 50 epochs, Adam 1e-3, every frame of every cine. For
    GPUs."""
    return Settings(
        preset="paper", layouts=LayoutOptions(frames="all"), pretrain_loss=LossConfig(), pretrain=TrainConfig()
    )


PRESETS = {"demo": demo, "cpu": cpu, "robust": robust, "paper": paper}


def preset(name: str) -> Settings:
    """The preset of this name. Raises InputError if there is none."""
    if name not in PRESETS:
        raise InputError(f"preset {name}", "there is no such preset", f"choose from {', '.join(PRESETS)}")
    return PRESETS[name]()


def override(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Apply `a.b=value` assignments (values as YAML). Raises InputError naming the assignment that is wrong."""
    document = settings.model_dump()
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}", "is not an assignment", "write it as --set train.epochs=10")
        node: Any = document
        *parents, leaf = path.strip().split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise InputError(
                f"--set {assignment}", f"there is no field {path}", "see config.yaml of any run for the fields"
            )
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment}", "the value is not YAML", "quote it for the shell") from error
    return validated(document, "--set " + " ".join(assignments))


def validated(document: Any, where: str) -> Settings:
    """Settings from a plain document. Raises InputError with the first field that is wrong."""
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "settings"
        unknown = first["type"] == "extra_forbidden"
        message = "there is no such field" if unknown else str(first["msg"]).removeprefix("Value error, ")
        several = isinstance(first["input"], dict)  # the fault lies between fields, which the message names
        remedy = "change it where it is set" if several else f"given: {str(first['input'])[:60]}"
        raise InputError(where, f"{field}: {message}", remedy) from None


def as_yaml(settings: Settings) -> str:
    """The text of `config.yaml`: a comment with our version, then the settings."""
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"{MADE_BY}{code_version()}\n{text}"


def save(settings: Settings, run: str) -> None:
    """Write `config.yaml`: complete, so that giving it back reproduces the run."""
    fs.write_text(fs.join(run, CONFIG_FILE), as_yaml(settings))


def shareable(settings: Settings) -> Settings:
    """The same without the places of data, bank and network, for those who read the report."""
    return settings.model_copy(update={"data": (), "bank": None, "pretrained": None})


def load(run: str) -> Settings:
    """Settings of an existing run folder, or of a YAML file. Raises InputError if absent or wrong; if another version
    of cardiomix made the file, the error says so."""
    path = run if run.endswith((".yaml", ".yml")) else fs.join(run, CONFIG_FILE)
    if not fs.exists(path):
        raise InputError(path, "no such run configuration", "start with `cardiomix ingest` or `cardiomix ablate`")
    try:
        text = fs.read_text(path)
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, "is not YAML", "restore it, or start a new run") from error
    try:
        return validated(document, path)
    except InputError as error:
        first, ours = text.partition("\n")[0].strip(), code_version()
        maker = first.removeprefix(MADE_BY)
        if maker in (first, ours):
            raise
        problem = f"made by cardiomix {maker}, this is {ours}: {error.problem}"
        raise InputError(path, problem, f"use cardiomix {maker}, or start a new run") from None
