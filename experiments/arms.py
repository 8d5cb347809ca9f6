"""All arms, by name: those of the paper's ablation (section 3.3) and those that we add to it."""

from __future__ import annotations

from typing import Any

from pipeline.samples.appearance import Appearance
from pipeline.training.config import ArmConfig

# The arms that the paper compares. `ablate` trains these by default.
PAPER: dict[str, ArmConfig] = {
    "unet_ra": ArmConfig(network="unet", ra=True),
    "fs_sdnet": ArmConfig(),
    "fs_sdnet_ra": ArmConfig(ra=True),
    "ss_sdnet_ra": ArmConfig(semi_supervised=True, ra=True),
    "ss_sdnet_ra_fa": ArmConfig(semi_supervised=True, ra=True, fa=True),
}

_FA = PAPER["ss_sdnet_ra_fa"]


def _with(arm: ArmConfig, **changes: Any) -> ArmConfig:
    return ArmConfig.model_validate({**arm.model_dump(), **changes})


# What the paper left open: a control that draws with each slice's own modality, modalities outside those seen, the
# consistency that FA makes possible, and augmentations published later, each with RA alone and with FA on top.
BEYOND: dict[str, ArmConfig] = {
    "ss_sdnet_ra_rec": _with(_FA, policy="own"),
    "ss_sdnet_ra_fa_interpolate": _with(_FA, policy="interpolate"),
    "ss_sdnet_ra_fa_extrapolate": _with(_FA, policy="extrapolate"),
    "ss_sdnet_ra_fa_gaussian": _with(_FA, policy="gaussian"),
    "ss_sdnet_ra_fa_styles": _with(_FA, policy="styles"),
    "ss_sdnet_ra_fa_consistency": _with(_FA, consistency=True),
    "ss_sdnet_ra_fa_residual": _with(_FA, render="residual"),
    "ss_sdnet_ra_fa_residual_consistency": _with(_FA, render="residual", consistency=True),
    "ss_sdnet_ra_bigaug": _with(_FA, fa=False, appearance="bigaug"),
    "ss_sdnet_ra_fa_bigaug": _with(_FA, appearance="bigaug"),
    "ss_sdnet_ra_fourier": _with(_FA, fa=False, appearance="fourier"),
    "ss_sdnet_ra_fa_fourier": _with(_FA, appearance="fourier"),
}

# What the factors are worth to any network. FA makes data, not a loss, so a U-Net can use it too. Each way to use the
# factors stands alone and on top of random intensities (BigAug). The controls are whole images drawn with the same
# codes, and label or grey regions, which need no factors.
_STEP = (0.5, 2.0)
_LOOKS: dict[str, dict[str, Any]] = {
    "fa": {"fa": True},
    "fa_step": {"fa": True, "step": _STEP, "guard": "none"},
    "fa_residual": {"fa": True, "render": "residual"},
    "fa_residual_step": {"fa": True, "render": "residual", "step": _STEP, "guard": "none"},
    "fa_residual_step_guarded": {"fa": True, "render": "residual", "step": _STEP, "guard": "intensities"},
    "regions": {"regions": "anatomy"},
    "label_regions": {"regions": "labels"},
    "grey_regions": {"regions": "grey"},
    "fa_residual_step_regions": {
        "fa": True,
        "render": "residual",
        "step": _STEP,
        "guard": "none",
        "regions": "anatomy",
    },
}
_BASES = {"unet_ra": PAPER["unet_ra"], "fs_sdnet_ra": PAPER["fs_sdnet_ra"]}

FACTORS: dict[str, ArmConfig] = {
    f"{base}_{name}{suffix}": _with(arm, appearance=appearance, **look)
    for base, arm in _BASES.items()
    for suffix, appearance in (("", "none"), ("_bigaug", "bigaug"))
    for name, look in _LOOKS.items()
} | {f"{base}_bigaug": _with(arm, appearance="bigaug") for base, arm in _BASES.items()}

# Augmentations by others, each in place of BigAug; and moves (turn and scale, or bends), alone and on top of BigAug.
_MOVES: dict[str, dict[str, Any]] = {
    "moved": {"turn_degrees": 34.0, "zoom": (0.85, 1.18)},
    "elastic": {"elastic": 0.3},
}
_FIELD: tuple[Appearance, ...] = ("fourier", "histogram", "mixstyle", "gin", "nnunet", "nnunet_mirrors")

FIELD: dict[str, ArmConfig] = {f"unet_ra_{look}": _with(PAPER["unet_ra"], appearance=look) for look in _FIELD} | {
    f"unet_ra_{name}{suffix}": _with(PAPER["unet_ra"], appearance=appearance, **move)
    for suffix, appearance in (("", "none"), ("_bigaug", "bigaug"))
    for name, move in _MOVES.items()
}

# Unlabelled data for any network: two looks of an unlabelled slice must be segmented alike. The looks are made by
# regions of the anatomy, by residual FA, or by random intensities (BigAug), which need no factors.
_UNLABELLED = _with(PAPER["unet_ra"], semi_supervised=True, consistency=True)
_MOVED_BIGAUG = {"appearance": "bigaug", **_MOVES["moved"]}

AGREEING: dict[str, ArmConfig] = {
    f"ss_unet_ra_{name}_consistency": _with(_UNLABELLED, **look)
    for name, look in {
        "regions": _LOOKS["regions"],
        "fa_residual": _LOOKS["fa_residual"],
        "bigaug": {"appearance": "bigaug"},
        "moved_bigaug": _MOVED_BIGAUG,
        "regions_moved_bigaug": _LOOKS["regions"] | _MOVED_BIGAUG,
        "fa_residual_moved_bigaug": _LOOKS["fa_residual"] | _MOVED_BIGAUG,
    }.items()
}

# The recipe of the preset `robust`, with factors on top.
RECIPE: dict[str, ArmConfig] = {
    f"unet_ra_{name}_moved_bigaug": _with(PAPER["unet_ra"], **_LOOKS[name], **_MOVED_BIGAUG)
    for name in ("regions", "fa_residual")
}

ARMS = PAPER | BEYOND | FACTORS | FIELD | AGREEING | RECIPE

# Pretraining sees original images (paper section 2.1: "using the original (prior to augmentation) data").
PRETRAIN = ArmConfig(semi_supervised=True, turn_degrees=0.0, zoom=(1.0, 1.0), elastic=0.0)
