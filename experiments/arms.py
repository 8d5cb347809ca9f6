"""The arms of the ablation (paper section 3.3)."""

from __future__ import annotations

from pipeline.training import ArmConfig

ARMS: dict[str, ArmConfig] = {
    "unet_ra": ArmConfig(network="unet", ra=True),
    "fs_sdnet": ArmConfig(),
    "fs_sdnet_ra": ArmConfig(ra=True),
    "ss_sdnet_ra": ArmConfig(semi_supervised=True, ra=True),
    "ss_sdnet_ra_fa": ArmConfig(semi_supervised=True, ra=True, fa=True),
}

# On original images (paper section 2.1: "using the original (prior to augmentation) data").
PRETRAIN = ArmConfig(semi_supervised=True)
