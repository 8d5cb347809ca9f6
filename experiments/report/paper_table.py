"""Table 1 of the paper as data, the names of all arms, and which arms are compared.

Source: X. Liu et al., "Disentangled Representations for Domain-generalized Cardiac Segmentation", STACOM 2020, Table 1:
average Dice on the challenge's hidden set, 20 subjects per vendor. That set was never released, so the numbers are a
reference, not a target.
"""

from __future__ import annotations

ARM_LABELS: dict[str, str] = {
    "unet_ra": "U-Net+RA",
    "fs_sdnet": "FS SDNet",
    "fs_sdnet_ra": "FS SDNet+RA",
    "ss_sdnet_ra": "SS SDNet+RA",
    "ss_sdnet_ra_fa": "SS SDNet+RA+FA",
}

# `arm_label` puts "SS SDNet+" before each of these.
BEYOND_LABELS = {
    "ss_sdnet_ra_rec": "RA+reconstructions",
    "ss_sdnet_ra_fa_interpolate": "RA+FA between",
    "ss_sdnet_ra_fa_extrapolate": "RA+FA beyond",
    "ss_sdnet_ra_fa_gaussian": "RA+FA densities",
    "ss_sdnet_ra_fa_styles": "RA+FA styles",
    "ss_sdnet_ra_fa_consistency": "RA+FA+consistency",
    "ss_sdnet_ra_bigaug": "RA+BigAug-like",
    "ss_sdnet_ra_fa_bigaug": "RA+FA+BigAug-like",
    "ss_sdnet_ra_fourier": "RA+Fourier",
    "ss_sdnet_ra_fa_fourier": "RA+FA+Fourier",
}

_LOOKS = {
    "fa": "FA",
    "fa_step": "FA steps",
    "fa_residual": "residual FA",
    "fa_residual_step": "residual FA steps",
    "fa_residual_step_guarded": "guarded residual FA steps",
    "regions": "regions",
    "label_regions": "label regions",
    "grey_regions": "grey regions",
    "fa_residual_step_regions": "residual FA steps+regions",
}
_BASES = {name: ARM_LABELS[name] for name in ("unet_ra", "fs_sdnet_ra")}
# Arms that use factors to make data, for any network; and BigAug without factors.
FACTOR_LABELS = {
    f"{base}_{look}{suffix}": f"{label}+{words}{more}"
    for base, label in _BASES.items()
    for suffix, more in (("", ""), ("_bigaug", "+BigAug-like"))
    for look, words in _LOOKS.items()
}
FACTOR_LABELS |= {f"{base}_bigaug": f"{label}+BigAug-like" for base, label in _BASES.items()}
FACTOR_LABELS |= {
    "ss_sdnet_ra_fa_residual": "SS SDNet+RA+residual FA",
    "ss_sdnet_ra_fa_residual_consistency": "SS SDNet+RA+residual FA+consistency",
}
_MOVED = "turns and scales+BigAug-like"
# Augmentations by others, and moves; "U-Net+RA+" stands before each.
_FIELD = {
    "fourier": "Fourier",
    "histogram": "histograms",
    "mixstyle": "MixStyle-like",
    "gin": "GIN-IPA",
    "nnunet": "nnU-Net's",
    "nnunet_mirrors": "nnU-Net's with mirrors",
    "moved": "turns and scales",
    "elastic": "bends",
    "moved_bigaug": _MOVED,
    "elastic_bigaug": "bends+BigAug-like",
}
FIELD_LABELS = {f"unet_ra_{name}": f"{ARM_LABELS['unet_ra']}+{words}" for name, words in _FIELD.items()}

FIELD_LABELS |= {
    f"unet_ra_{look}_moved_bigaug": f"{ARM_LABELS['unet_ra']}+{_LOOKS[look]}+{_MOVED}"
    for look in ("regions", "fa_residual")
}
FIELD_LABELS |= {
    f"ss_unet_ra_{name}_consistency": f"SS {ARM_LABELS['unet_ra']}+{words}+consistency"
    for name, words in {
        "regions": _LOOKS["regions"],
        "fa_residual": _LOOKS["fa_residual"],
        "bigaug": "BigAug-like",
        "moved_bigaug": _MOVED,
        "regions_moved_bigaug": f"{_LOOKS['regions']}+{_MOVED}",
        "fa_residual_moved_bigaug": f"{_LOOKS['fa_residual']}+{_MOVED}",
    }.items()
}

REFERENCE_NOTE = (
    "The paper's numbers are its Table 1, measured on the challenge's hidden set of 80 subjects (20 a vendor), which "
    "was never released. They are a reference for orientation, not a target that can be hit exactly."
)
PHANTOM_NOTE = (
    "These results come from a synthetic phantom, not from patients: they show that the experiment runs, and say "
    "nothing about how well hearts are segmented."
)
BESIDE_NOTE = " The paper's numbers stand beside them for orientation only."

# {arm: {vendor: Dice of (LV, MYO, RV)}}
PAPER_DICE: dict[str, dict[str, tuple[float, float, float]]] = {
    "unet_ra": {
        "A": (0.900, 0.829, 0.811), "B": (0.937, 0.877, 0.907), "C": (0.856, 0.837, 0.852), "D": (0.762, 0.651, 0.503),
    },
    "fs_sdnet": {
        "A": (0.901, 0.837, 0.822), "B": (0.942, 0.877, 0.920), "C": (0.851, 0.826, 0.853), "D": (0.734, 0.618, 0.474),
    },
    "fs_sdnet_ra": {
        "A": (0.905, 0.846, 0.828), "B": (0.945, 0.886, 0.921), "C": (0.855, 0.843, 0.843), "D": (0.819, 0.749, 0.624),
    },
    "ss_sdnet_ra": {
        "A": (0.909, 0.854, 0.841), "B": (0.945, 0.887, 0.916), "C": (0.843, 0.837, 0.813), "D": (0.811, 0.752, 0.553),
    },
    "ss_sdnet_ra_fa": {
        "A": (0.909, 0.846, 0.778), "B": (0.939, 0.882, 0.909), "C": (0.863, 0.847, 0.843), "D": (0.812, 0.712, 0.498),
    },
}  # fmt: skip


# The steps of the paper: (name in a sentence, title, arm with the step, arm without it).
CONTRASTS = (
    ("RA", "RA: resolution augmentation", "fs_sdnet_ra", "fs_sdnet"),
    ("SDNet instead of U-Net", "SDNet instead of U-Net", "fs_sdnet_ra", "unet_ra"),
    ("Unlabelled data", "SS: unlabelled data as well", "ss_sdnet_ra", "fs_sdnet_ra"),
    ("FA", "FA: factor augmentation", "ss_sdnet_ra_fa", "ss_sdnet_ra"),
)
# The same for arms that the paper does not have. A report shows those whose arms were trained.
BEYOND_CONTRASTS = (
    ("Mixing instead of reconstructing", "FA against its control", "ss_sdnet_ra_fa", "ss_sdnet_ra_rec"),
    ("Interpolating", "FA between vendors", "ss_sdnet_ra_fa_interpolate", "ss_sdnet_ra_fa"),
    ("Extrapolating", "FA beyond vendors", "ss_sdnet_ra_fa_extrapolate", "ss_sdnet_ra_fa"),
    ("Drawing from densities", "FA from vendors' densities", "ss_sdnet_ra_fa_gaussian", "ss_sdnet_ra_fa"),
    ("Imported styles", "FA with imported styles", "ss_sdnet_ra_fa_styles", "ss_sdnet_ra_fa"),
    ("Consistency", "Consistency between twins", "ss_sdnet_ra_fa_consistency", "ss_sdnet_ra_fa"),
    ("BigAug-like augmentation", "BigAug-like looks", "ss_sdnet_ra_bigaug", "ss_sdnet_ra"),
    ("Fourier mixing", "Fourier mixing of looks", "ss_sdnet_ra_fourier", "ss_sdnet_ra"),
    ("FA on BigAug-like augmentation", "FA on top of BigAug-like looks", "ss_sdnet_ra_fa_bigaug", "ss_sdnet_ra_bigaug"),
    ("FA on Fourier mixing", "FA on top of Fourier mixing", "ss_sdnet_ra_fa_fourier", "ss_sdnet_ra_fourier"),
)
ALL_CONTRASTS = CONTRASTS + BEYOND_CONTRASTS


def phantom_note(beside: bool) -> str:
    """The warning in a report of the phantom. `beside`: the report also shows the paper's numbers."""
    return PHANTOM_NOTE + (BESIDE_NOTE if beside else "")


def arm_label(arm: str) -> str:
    """The paper's name of an arm, or our name in the same style. An unknown arm keeps its own name."""
    beyond = f"SS SDNet+{BEYOND_LABELS[arm]}" if arm in BEYOND_LABELS else arm
    return ARM_LABELS.get(arm) or FACTOR_LABELS.get(arm) or FIELD_LABELS.get(arm) or beyond


def arm_order(arm: str) -> tuple[int, str]:
    """A sort key: the paper's arms in the paper's order, then all others by name."""
    names = list(ARM_LABELS)
    return (names.index(arm), "") if arm in ARM_LABELS else (len(names), arm)


def paper_dice(arm: str, vendor: str, structure: str) -> float | None:
    """Dice in the paper's Table 1, 0 to 1; None if the paper has no such arm, vendor (A to D) or structure."""
    row = PAPER_DICE.get(arm, {}).get(vendor)
    return None if row is None or structure not in ("LV", "MYO", "RV") else row[("LV", "MYO", "RV").index(structure)]
