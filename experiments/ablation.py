"""The driver: ingest → pretrain → extract → arms → report. Stages already done are found and reused."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.resources import ResourcePlan, plan, start_ray
from experiments import config, jobs
from experiments.arms import ARMS
from experiments.config import Settings
from experiments.progress import Progress
from experiments.report import ReportPaths, build_report, read_history
from storage import uri
from storage.errors import InputError
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    from actors.stages import ArmRun
    from actors.training import TrainJob
    from experiments.tracking import ChildRun, Tracker

PHANTOM_FOLDER = "phantom"
_LIBRARIES = ("ray", "torch", "zarr", "monai", "mlflow", "numpy")


@dataclass
class Ablation:
    """One run being driven. `settings` decide what is done; `run` is where it lies."""

    run: str
    settings: Settings
    progress: Progress
    _tracker: Tracker | None = None
    _children: dict[str, ChildRun] = field(default_factory=dict)
    _logged: dict[str, int] = field(default_factory=dict)
    _resources: dict[str, float] | None = None

    def plan(self, trainings: int = 1) -> ResourcePlan:
        """The budget for so many trainings on this cluster; starts Ray."""
        if self._resources is None:
            with self.progress.stage("start Ray"):
                self._resources = start_ray()
        return plan(
            self.settings.resources, self._resources.get("CPU", 0.0), self._resources.get("GPU", 0.0), trainings
        )

    def ingest(self, strict: bool = False) -> None:
        """Phantom where no data was given, then every subject into the slice store."""
        from actors.ingest import ingest

        self.plan()
        folders: Sequence[str] = self.settings.data
        if not folders:
            folders = [self.phantom()]
        with self.progress.stage("ingest") as step:
            report = ingest(
                folders,
                self.run,
                self.settings.layouts,
                self.settings.layout,
                progress=lambda _, done, total: step.update("", done, total),
                strict=strict,
            )
        self.progress.ingested(report)

    def phantom(self) -> str:
        """Write the phantom into the run folder, once."""
        from pipeline.phantom import write_phantom

        folder = uri.local_path(uri.join(self.run, PHANTOM_FOLDER))
        marker = folder / ".complete"
        wanted = self.settings.phantom.model_dump_json()
        if not (marker.exists() and marker.read_text() == wanted):
            with self.progress.stage("phantom") as step:
                write_phantom(folder, self.settings.phantom, lambda done, total: step.update("", done, total))
            marker.write_text(wanted)
        return str(folder)

    def pretrain(self) -> None:
        """Train the SDNet that fills the bank, unless one is given or there already."""
        from actors import stages

        if self.settings.pretrained or self.settings.bank:
            return
        job = jobs.pretrain_job(self.run, self.settings)
        if not job.finished():
            with self.progress.stage("pretrain") as step:
                stages.pretrain(job, self.plan(), lambda _: self._follow("pretrain", "pretrain", 0, job, step))
        self._follow("pretrain", "pretrain", 0, job, None, finish=True)

    def extract(self) -> None:
        """Fill the factor bank with the frozen SDNet; committed shards stay."""
        from actors.extraction import extract

        if self.settings.bank:
            return
        budget = self.plan()
        with self.progress.stage("extract") as step:
            extract(
                self.run,
                jobs.sdnet_uri(self.run, self.settings),
                jobs.bank_uri(self.run, self.settings),
                self.settings.preprocess,
                actors=budget.extract_actors,
                num_cpus=budget.extract_cpus,
                num_gpus=budget.extract_gpus,
                threads=1,
                shard_slices=self.settings.bank_shard,
                progress=step.update,
            )

    def train(self) -> dict[str, str]:
        """All arms and seeds, trained and scored; returns label → reason for those that failed."""
        from actors import stages

        runs = jobs.arm_runs(self.run, self.settings)
        todo = [r for r in runs if not r.evaluated()]
        failed: dict[str, str] = {}
        if todo:
            budget = self.plan(len(todo))
            self.progress.say(budget.describe())
            with self.progress.arms([r.label for r in todo], self.settings.train.epochs) as bars:

                def tick(running: list[str]) -> None:
                    for arm in todo:
                        if arm.label in running or arm.evaluated():
                            self._follow(arm.label, arm.arm, arm.seed, arm.job, bars.of(arm.label), arm.evaluated())

                failed = stages.run_arms(todo, budget, tick)
        for arm in runs:
            if arm.label not in failed:
                self._follow(arm.label, arm.arm, arm.seed, arm.job, None)
        self._finish_children(runs, failed)
        return failed

    def report(self, failed: dict[str, str] | None = None) -> ReportPaths:
        """Tables, figures and the page, from what the run folder holds."""
        with self.progress.stage("report"):
            mosaic = None
            bank = jobs.bank_uri(self.run, self.settings)
            if uri.exists(bank):
                from experiments.preview import mosaic_png

                mosaic = mosaic_png(self.run, self.settings)
            paths = build_report(
                self.run, self.name, self._note(), mosaic, arms=self.settings.arms, problems=failed or {}
            )
            config.save_shareable(self.settings, uri.join(self.run, "report"))
            if uri.is_local(self.run):
                self.tracker.log_artifacts(uri.local_path(uri.join(self.run, "report")))
        self.tracker.finish("FAILED" if failed else "FINISHED")
        return paths

    def abandon(self) -> None:
        """Leave no run in MLflow that looks as if it went on."""
        if self._tracker is not None:
            for child in self._children.values():
                child.finish("KILLED")
            self._tracker.finish("KILLED")

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.run.rstrip("/").rsplit("/", 1)[-1]

    @property
    def tracker(self) -> Tracker:
        """MLflow, opened at first use: by then a network trains and the wait costs nothing."""
        if self._tracker is None:
            from experiments.tracking import Tracker

            tags = {
                "git_commit": git_commit(),
                "preset": self.settings.preset,
                "config_hash": self.settings.config_hash,
            }
            self._tracker = Tracker(self.run, self.name, tags=tags)
        return self._tracker

    def _child(self, label: str, arm: str, seed: int, job: TrainJob) -> ChildRun:
        if label not in self._children:
            tags = {"git_commit": git_commit(), "bank_fingerprint": job.bank_fingerprint or ""}
            params = job.model_dump(mode="json", exclude={"out": True, "stream": {"run", "bank"}})
            self._children[label] = self.tracker.child(arm, seed, job.config_hash, tags, params)
        return self._children[label]

    def _follow(self, label: str, arm: str, seed: int, job: TrainJob, bar: Any = None, finish: bool = False) -> None:
        """Bring the progress bar and MLflow up to what the job's history file says."""
        records = _history_of(job)
        if bar is not None and records:
            last = records[-1]
            bar.update(f"Dice {last['val/dice']:.3f}", last["epoch"], job.train.epochs)
        if len(records) > self._logged.get(label, -1):
            self._child(label, arm, seed, job).log_history(records)
            self._logged[label] = len(records)
        if finish and label == "pretrain":
            self._child(label, arm, seed, job).finish()

    def _finish_children(self, runs: list[ArmRun], failed: dict[str, str]) -> None:
        from actors.evaluation import CASES
        from pipeline.evaluation import read_cases, summarise

        for arm in runs:
            if arm.label in failed:
                self._child(arm.label, arm.arm, arm.seed, arm.job).finish("FAILED")
                continue
            child = self._child(arm.label, arm.arm, arm.seed, arm.job)
            child.log_scores(summarise(read_cases(uri.join(arm.job.out, CASES))))
            if uri.is_local(arm.job.out):
                for name in ("model.safetensors", "model.json", CASES):
                    child.log_artifact(uri.local_path(uri.join(arm.job.out, name)))
            child.finish()

    def _note(self) -> dict[str, Any]:
        from importlib.metadata import version

        note: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "preset": self.settings.preset,
            "configuration": self.settings.config_hash,
            "cardiomix": version("cardiomix"),
            "commit": git_commit()[:12],
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "seeds": self.settings.seeds,
            "libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
        }
        if not self.settings.data:
            note["data"] = "phantom"
        return note


def _history_of(job: TrainJob) -> list[dict[str, Any]]:
    from actors.training import HISTORY

    path = uri.join(job.out, HISTORY)
    return read_history(path) if uri.exists(path) else []


def git_commit() -> str:
    """The commit that this code was checked out at, or `unknown`."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def ablate(driver: Ablation, strict: bool = False) -> tuple[ReportPaths, dict[str, str]]:
    """All stages of a run; returns where the report is and which arms failed, with the reason."""
    began = time.perf_counter()
    config.save(driver.settings, driver.run)
    try:
        driver.ingest(strict)
        if jobs.needs_bank(driver.settings):
            driver.pretrain()
            driver.extract()
        failed = driver.train()
        paths = driver.report(failed)
    except BaseException:
        driver.abandon()
        raise
    driver.progress.say(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    return paths, failed


def status(run: str) -> list[tuple[str, str]]:
    """(stage or arm, state) of a run: done, missing, `epoch k of n`, or failed with its reason. Starts nothing."""
    from actors.training import FAILED
    from storage.factor_bank import FactorBank

    settings = config.load(run)
    if not uri.exists(uri.join(run, "slices.parquet")):
        return [("ingest", "missing")]
    lines = [("ingest", f"done: {len(SliceStore.open(run))} slices")]
    if jobs.needs_bank(settings):
        pre = jobs.pretrain_job(run, settings)
        elsewhere = settings.pretrained or settings.bank
        lines.append(("pretrain", f"reused from {elsewhere}" if elsewhere else _training_state(pre)))
        bank = jobs.bank_uri(run, settings)
        if not uri.exists(bank):
            lines.append(("extract", "missing"))
            settings = without_fa(settings)
        else:
            opened = FactorBank.open(bank, partial=True)
            done = f"{len(opened.committed())} of {opened.shards()} shards"
            lines.append(("extract", f"done: {done}" if opened.is_complete() else done))
            if not opened.is_complete():
                settings = without_fa(settings)
    for arm in jobs.arm_runs(run, settings):
        path = uri.join(arm.job.out, FAILED)
        if arm.evaluated():
            state = "done"
        elif uri.exists(path):
            state = f"failed: {json.loads(uri.read_text(path))['reason']}"
        else:
            state = _training_state(arm.job)
        lines.append((arm.label, state))
    lines.append(("report", "done" if uri.exists(uri.join(run, "report", "index.html")) else "missing"))
    return lines


def _training_state(job: TrainJob) -> str:
    if job.finished():
        return "trained"
    records = _history_of(job)
    return f"epoch {records[-1]['epoch']} of {job.train.epochs}" if records else "missing"


def without_fa(settings: Settings) -> Settings:
    """The same settings with the arms that need no bank."""
    return settings.model_copy(update={"arms": tuple(arm for arm in settings.arms if not ARMS[arm].fa)})


def require_data(run: str) -> None:
    """Raises InputError where a run has no slices yet."""
    if not uri.exists(uri.join(run, "slices.parquet")):
        raise InputError(run, "has no slices", "run `cardiomix ingest DATA --run RUN` first")
