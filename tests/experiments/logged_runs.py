"""Run folders with real files for MLflow to repeat: slices, histories, networks, scores; and stores to look at."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from actors.evaluate_arm import CASES
from actors.stages import ArmRun
from actors.train_job import DONE, HISTORY, TrainJob
from experiments import config
from experiments.config import Settings
from experiments.run import jobs
from pipeline.networks.description import WEIGHTS
from pipeline.networks.files import build, save_model
from pipeline.scores.tables import CASE_FIELDS, write_cases
from storage.identity import identity
from tests.actors.tiny_runs import PREPROCESS, write_run

ARMS = ("unet_ra",)


def make_run(folder: Path, *assignments: str, seeds: int = 2) -> tuple[str, Settings, list[ArmRun]]:
    """A run that has slices, its settings and its arms; nothing is trained yet."""
    run = write_run(folder)
    sizes = (f"preprocess.size={PREPROCESS.size}", f"preprocess.field={PREPROCESS.field}", "unet.width=4")
    document = config.override(config.demo(), [*sizes, *assignments]).model_dump()
    settings = config.validated(document | {"arms": ARMS, "seeds": seeds}, "test")
    config.save(settings, run)
    return run, settings, jobs.arm_runs(run, settings)


def write_epochs(job: TrainJob, epochs: int) -> None:
    """`history.jsonl` as after so many epochs."""
    records = [
        {
            "epoch": k,
            "step": 10 * k,
            "loss/total": 1.0 / k,
            "val/dice": 0.1 * k,
            "train_seconds": 2.0,
            "validation_seconds": 0.5,
            "samples_per_s": 20.0 + k,
            "queue_depth": 1.5,
            "actor_utilisation": 0.5,
            "config_hash": job.config_hash,
        }
        for k in range(1, epochs + 1)
    ]
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HISTORY).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_result(run: ArmRun, dice: float) -> None:
    """A trained network and its scores: this Dice for every structure of two vendors."""
    out = run.job.out
    torch.manual_seed(0)
    network = build(run.job.network)
    fingerprint = save_model(out, network, run.job.network, identity(PREPROCESS), ["terms"])
    done = {"config_hash": run.job.config_hash, "fingerprint": fingerprint}
    done |= {"weights_bytes": (Path(out) / WEIGHTS).stat().st_size}
    (Path(out) / DONE).write_text(json.dumps(done))
    structures = ("LV", "MYO", "RV")
    rows = [
        case(run.arm, vendor, structure, dice) | {"seed": run.seed} for vendor in ("A", "D") for structure in structures
    ]
    write_cases(f"{out}/{CASES}", rows)


def case(arm: str, vendor: str, structure: str, dice: float, **other: Any) -> dict[str, Any]:
    """A row of `cases.csv`, of one subject a vendor."""
    row = dict.fromkeys(CASE_FIELDS, 1.0) | {"seed": 0, "centre": "X", "phase": "ED", "missed": False}
    whose = {"arm": arm, "subject": vendor, "vendor": vendor, "structure": structure, "dice": dice}
    return row | whose | other


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def contents(client: MlflowClient, experiment: str) -> dict[str, Any]:
    """All that a user sees of an experiment's runs, by name, but for the machine's use and what the clock says."""
    runs = runs_of(client, experiment)
    assert max(Counter(run.info.run_name for run in runs).values()) == 1, "a run is there twice"
    return {
        str(run.info.run_name): {
            "status": run.info.status,
            "params": run.data.params,
            "tags": {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")},
            "metrics": {key: points(client, run, key) for key in run.data.metrics if not key.startswith("system/")},
            "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            "artifacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
            "models": len(run.outputs.model_outputs) if run.outputs else 0,
        }
        for run in runs
    }


def points(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as logged, doubles included."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))
