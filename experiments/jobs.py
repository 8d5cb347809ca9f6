"""From settings and a run folder to training jobs: what each arm is, and where it lies."""

from __future__ import annotations

import hashlib
import json

from actors.stages import ArmRun
from actors.streaming import StreamConfig
from actors.training import TrainJob
from experiments.arms import ARMS, PRETRAIN
from experiments.config import Settings
from pipeline.training import ArmConfig, TrainConfig
from storage import uri
from storage.factor_bank import FactorBank
from storage.slice_store import SliceStore

SDNET, BANK, ARMS_FOLDER = "sdnet", "bank.zarr", "arms"


def bank_uri(run: str, settings: Settings) -> str:
    """The run's own bank, or the one it reuses."""
    return settings.bank or uri.join(run, BANK)


def sdnet_uri(run: str, settings: Settings) -> str:
    """The pretrained network's folder."""
    return settings.pretrained or uri.join(run, SDNET)


def data_fingerprint(run: str) -> str:
    """Names the slices of a run: SHA-256 over the index, which holds every volume's statistics, splits and origin."""
    table = SliceStore.open(run).table
    text = json.dumps(table.to_pylist(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _job(
    run: str, settings: Settings, name: str, arm: ArmConfig, train: TrainConfig, seed: int, out: str, data: str
) -> TrainJob:
    bank = bank_uri(run, settings) if arm.fa else None
    return TrainJob(
        name=name,
        out=out,
        network=settings.unet if arm.network == "unet" else settings.sdnet,
        stream=StreamConfig(
            run=run,
            bank=bank,
            preprocess=settings.preprocess,
            plan=settings.plan,
            seed=seed,
            semi_supervised=arm.semi_supervised,
            ra=arm.ra,
            fa=arm.fa,
            batch_size=train.batch_size,
        ),
        loss=settings.loss,
        train=train,
        bank_fingerprint=FactorBank.open(bank).fingerprint if bank else None,
        data_fingerprint=data,
    )


def pretrain_job(run: str, settings: Settings) -> TrainJob:
    """The SDNet that fills the bank; fully supervised where the data has no unlabelled training slices."""
    store = SliceStore.open(run)
    unlabelled = bool(((store.column("split") == "train") & ~store.column("labelled").astype(bool)).any())
    arm = PRETRAIN.model_copy(update={"semi_supervised": unlabelled})
    out = uri.join(run, SDNET)
    return _job(run, settings, "pretrain", arm, settings.pretrain, settings.seed, out, data_fingerprint(run))


def arm_runs(run: str, settings: Settings) -> list[ArmRun]:
    """Every arm and replicate of the settings, in their order. The bank must exist if an arm needs it."""
    data = data_fingerprint(run)
    runs = []
    for arm in settings.arms:
        for k in range(settings.seeds):
            out = uri.join(run, ARMS_FOLDER, arm, f"seed{k}")
            job = _job(run, settings, arm, ARMS[arm], settings.train, settings.seed + k, out, data)
            runs.append(ArmRun(arm, k, job))
    return runs


def needs_bank(settings: Settings) -> bool:
    """Whether any arm trains on synthesized samples."""
    return any(ARMS[arm].fa for arm in settings.arms)
