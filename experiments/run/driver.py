"""The driver of a run: ingest → pretrain → extract → arms → report. Stages that are done already are reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from actors.evaluate_arm import scored_so_far
from actors.ray_start import require_places, start_ray
from actors.resources import Cluster, ResourcePlan, plan
from actors.waiting import Patience
from experiments import config
from experiments.config import Settings
from experiments.progress import Progress
from experiments.report.build import SHARED_BANK, ReportPaths, build_report
from experiments.run import jobs
from experiments.run.cost import slow_precision
from experiments.run.refusals import require_local_phantom
from experiments.tracking.run_log import TABLE as REPORT_TABLE
from experiments.tracking.run_log import RunLog
from experiments.tracking.store import require_answer
from experiments.version import provenance
from storage import fs
from storage.errors import InputError
from storage.lease import is_lost
from storage.lock import bank_lock
from storage.slices.store import TABLE, SliceStore

if TYPE_CHECKING:
    from actors.stages import ArmRun
    from actors.train_job import TrainJob
    from experiments.progress import ProgressBar

PHANTOM_FOLDER = "phantom"


class Ablation:
    """The stages of one run. `settings` decide what is done; `run` is the absolute path or URI of its folder.

    Use it as a context manager: at the end of the block, no run in MLflow is left open.
    """

    def __init__(self, run: str, settings: Settings, progress: Progress) -> None:
        self.run, self.settings, self.progress = run, settings, progress
        self.name = fs.base_name(run)
        self.log = RunLog(run, self.name, settings, progress.say)
        self._cluster: Cluster | None = None
        self._failed: dict[str, str] = {}
        self._warned: set[tuple[str, str]] = set()
        self._last_wait: dict[str, str | None] = {}

    def __enter__(self) -> Ablation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_lost(self.run):  # the run's new driver continues the runs in MLflow
            self.log.close(None)
        else:
            self.log.close("KILLED" if kind else "FAILED" if self._failed else "FINISHED")

    def budget(self, trainings: int = 1) -> ResourcePlan:
        """The plan for `trainings` trainings on this cluster. Starts Ray if it does not run yet."""
        if self._cluster is None:
            with self.progress.stage("start Ray"):
                self._cluster = start_ray()
        return plan(self.settings.resources, self._cluster, trainings)

    def ingest(self, strict: bool = False) -> None:
        """Read every subject into the slice store. If the preset `demo` has no data, the phantom is written first.

        With `strict`, raises InputError for a subject that cannot enter; without it, such a subject is skipped.
        """
        from actors.ingest import ingest
        from storage.layouts import detect

        require_places()  # before the phantom is drawn
        folders: Sequence[str] = self.settings.data
        if not folders:
            if self.settings.preset != "demo":
                raise InputError(self.name, "has no data", "name folders of studies")
            folders = [self.phantom()]
        if self.settings.layout == "auto":
            for folder in folders:  # reports a mistyped path before Ray takes seconds to start
                detect(folder)
        self.budget()
        with self.progress.stage("ingest") as step:
            report = ingest(
                folders,
                self.run,
                self.settings.layouts,
                self.settings.layout,
                progress=lambda _, done, total: step.update("", done, total),
                strict=strict,
                patience=self._patience(),
            )
        self.progress.ingested(report)

    def phantom(self) -> str:
        """Write the phantom into the run folder, unless it is there. Returns its folder."""
        from pipeline.phantom import is_written, write_phantom

        require_local_phantom(self.run, self.settings)
        folder = fs.local_path(fs.join(self.run, PHANTOM_FOLDER))
        if not is_written(folder, self.settings.phantom):
            with self.progress.stage("phantom") as step:
                write_phantom(folder, self.settings.phantom, lambda done, total: step.update("", done, total))
        return str(folder)

    def pretrain(self) -> None:
        """Train the SDNet that fills the bank, unless it is trained already, or an SDNet or a bank is given."""
        from actors import stages

        if self.settings.pretrained or self.settings.bank:
            return
        job = jobs.pretrain_job(self.run, self.settings)
        if not job.finished():
            jobs.require_pretraining_shared(job, self.settings, SliceStore.open(self.run))
            budget = self._ready_to_train("pretrain")
            self._say_what_is_replaced({"the pretrained SDNet": job})
            with self.progress.stage("pretrain") as step:
                stages.pretrain(job, budget, lambda _: self._follow("pretrain", 0, job, step))
        self.log.finish("pretrain", 0, job)

    def extract(self) -> None:
        """Fill the run's own factor bank with the frozen SDNet. Does nothing if the run only uses a bank that is given.

        Committed shards are kept. A bank of an earlier SDNet, preprocessing or data is removed and made anew.
        """
        from actors.extraction import ExtractionActors, extract
        from actors.extractor import ExtractionSpec

        if not jobs.makes_bank(self.run, self.settings):
            return
        bank = jobs.bank_uri(self.run, self.settings)
        jobs.check_pretrained(self.run, self.settings)
        if jobs.stale_bank(self.run, self.settings):
            self.progress.say("the bank is of an earlier SDNet, preprocessing or data: made anew")
            with bank_lock(bank, self.progress.say):
                fs.remove(bank)
        budget = self.budget()
        with self.progress.stage("extract") as step:
            spec = ExtractionSpec(
                self.run,
                jobs.sdnet_uri(self.run, self.settings),
                bank,
                self.settings.preprocess,
                precision=self.settings.bank_precision,
                shard_slices=self.settings.bank_shard,
            )
            actors = ExtractionActors(budget.extract_actors, budget.extract_cpus, budget.extract_gpus)
            extract(spec, actors, step.update, self._patience())

    def train(self) -> dict[str, str]:
        """Train and score all arms and seeds. Returns {label: reason} of those that failed."""
        from actors import stages

        jobs.require_trainable(self.run, self.settings)
        jobs.require_bank_without_other_masks(self.run, self.settings)
        runs = jobs.arm_runs(self.run, self.settings)
        todo = [r for r in runs if not r.evaluated()]
        if todo:
            budget = self._ready_to_train("train", len(todo))
            self.progress.say(budget.describe())
            self._say_what_is_replaced({run.label: run.job for run in todo})
            before: list[str] = []  # labels that ran at the last tick
            with self.progress.arms("arms", [r.label for r in todo], self.settings.train.epochs) as bars:

                def tick(running: list[str]) -> None:
                    for run in todo:
                        if run.label in running:
                            self._follow(run.arm, run.seed, run.job, bars.of(run.label))
                        elif run.label in before and run.evaluated():  # logged now: the last arm may end hours later
                            self.log.finish_arm(run, failed=False)
                    before[:] = running

                self._failed = stages.run_arms(todo, budget, tick)
        for run in runs:
            self.log.finish_arm(run, run.label in self._failed)
        return self._failed

    def evaluate(self) -> dict[str, int]:
        """Score every trained arm again. Returns {label: volumes scored}. Raises InputError if no arm is trained."""
        from actors import stages

        trained = [r for r in self._held_runs() if r.job.finished()]
        if not trained:
            raise InputError(
                self.name, "has no trained arm of this configuration", "run `cardiomix train ARM --run RUN`"
            )
        budget = self.budget(len(trained))
        with self.progress.arms("score", [run.label for run in trained]) as bars:

            def tick() -> None:
                for run in trained:
                    scored = scored_so_far(run.job.out)
                    if scored is not None:
                        bars.of(run.label).update("volumes", *scored)

            volumes = stages.evaluate(trained, budget, tick, self.progress.say)
        for run in trained:
            self.log.finish_arm(run, failed=False)
        return volumes

    def report(self) -> ReportPaths:
        """Write tables, figures and the page from what the run folder holds of this configuration."""
        runs = self._held_runs()
        problems: dict[str, str] = {}
        for run in runs:
            reason = run.failure()
            if reason is not None:
                problems[run.arm] = "; ".join(filter(None, [problems.get(run.arm), f"seed {run.seed}: {reason}"]))
        settings = self._as_split()
        with self.progress.stage("report"):
            config.save(config.shareable(settings), fs.join(self.run, "report"))  # the page shows this file
            paths = build_report(
                self.run,
                self.name,
                self._note(runs, settings),
                self._mosaic(),
                arms=tuple(dict.fromkeys((*self.settings.arms, *(run.arm for run in runs)))),
                runs=[(run.arm, run.seed) for run in runs if run.evaluated()],
                problems=problems,
            )
        _log_what_is_there(self.run, self.settings, runs, self.log)
        self.log.report()
        self._failed = self._failed or problems
        return paths

    def _patience(self) -> Patience:
        return Patience(self.settings.resources.wait_minutes, self.progress.say)

    def _ready_to_train(self, section: str, trainings: int = 1) -> ResourcePlan:
        """The budget. Raises InputError if MLflow does not answer: hours of training must not end without a log.

        Says so if what `section` sets (`pretrain` or `train`) is slow on this processor.
        """
        if self._cluster is None:  # before Ray takes seconds to start
            require_answer(self.run)
        self.log.start()
        budget = self.budget(trainings)
        self.log.require()
        slow = slow_precision(self.settings, budget, [section])
        if slow is not None:
            self.progress.say(slow)
        return budget

    def _say_what_is_replaced(self, trainings: Mapping[str, TrainJob]) -> None:
        """Name the trainings that will replace a result, before hours are spent on them."""
        replaced = [label for label, job in trainings.items() if job.replaces_a_result()]
        if replaced:
            self.progress.say(f"made anew, since the configuration, data or bank are others now: {', '.join(replaced)}")

    def _held_runs(self) -> list[ArmRun]:
        """The trainings of the settings' arms, and of other arms that the run holds finished."""
        held = jobs.with_finished(self.run, self.settings)
        return jobs.arm_runs(self.run, jobs.trainable_settings(self.run, held))

    def _mosaic(self) -> bytes | None:
        """The picture of FA; None if the run has no complete bank, or its bank has none of the run's subjects."""
        from experiments.run.preview import mosaic_png

        if not jobs.bank_is_complete(self.run, self.settings):
            return None
        try:
            return mosaic_png(self.run, self.settings)
        except InputError as error:  # a bank from elsewhere may hold none of this run's subjects
            self.progress.say(f"no picture of FA: {error}")
            return None

    def _follow(self, arm: str, seed: int, job: TrainJob, bar: ProgressBar) -> None:
        line = job.waiting()
        if line != self._last_wait.get(job.out):
            self._last_wait[job.out] = line  # None when the job is tried again, so that its next wait is printed too
            if line is not None:
                self.progress.say(f"{arm}/seed{seed}, {line}")
        records = self.log.follow(arm, seed, job)
        if records:
            self._warn(f"{arm}/seed{seed}", records[-1])
            note, epoch = f"Dice {records[-1]['val/dice']:.3f}", records[-1]["epoch"]
            scored = scored_so_far(job.out) if epoch == job.train.epochs else None
            if scored is not None:
                note += f", scored {scored[0]} of {scored[1]} volumes"
            bar.update(note, epoch, job.train.epochs)

    def _warn(self, label: str, record: dict[str, Any]) -> None:
        """Print warnings about an SDNet's factors, each once per arm, from epoch 2 on: those of epoch 1 may vanish."""
        for warning in record.get("warnings", []) if record["epoch"] > 1 else []:
            key = (label, warning.partition(":")[0].partition(" (")[0])
            if key not in self._warned:
                self._warned.add(key)
                self.progress.say(f"  {label}, epoch {record['epoch']}: {warning}")

    def _as_split(self) -> Settings:
        """The settings, with the layout options by which the run's slices were split: the scores belong to these."""
        return self.settings.model_copy(update={"layouts": jobs.split_options_of(self.run, self.settings)})

    def _note(self, runs: Sequence[ArmRun], settings: Settings) -> dict[str, Any]:
        note: dict[str, Any] = {
            **provenance(),
            "preset": settings.preset,
            "configuration": settings.config_hash,
            "seeds": settings.seeds,
        }
        if settings.layouts.protocol_label:
            note["protocol"] = settings.layouts.protocol_label
        for run in runs:
            note["data fingerprint"] = run.job.data_fingerprint
            if run.job.bank_fingerprint:
                note["bank fingerprint"] = run.job.bank_fingerprint
        if settings.seeds > 1 and (jobs.needs_bank(settings) or jobs.starts_from_sdnet(settings)):
            note[SHARED_BANK] = "yes"
        return note if settings.data else note | {"data": "phantom"}


def ablate(driver: Ablation, strict: bool = False) -> tuple[ReportPaths, dict[str, str]]:
    """Run all stages. Returns the paths of the report, and {label: reason} of the arms that failed."""
    began = time.perf_counter()
    driver.ingest(strict)
    jobs.require_trainable(driver.run, driver.settings)
    if jobs.needs_sdnet(driver.settings):
        driver.pretrain()
    if jobs.needs_bank(driver.settings):
        driver.extract()
    failed = driver.train()
    paths = driver.report()
    driver.progress.say(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    return paths, failed


def log_from_folder(run: str, say: Callable[[str], None], tracking_uri: str | None = None) -> None:
    """Log to MLflow what a run's folder holds, as `cardiomix report` does, without making a report.

    Does nothing if the folder has no scored arm. Raises InputError if another driver holds the run.
    """
    from experiments.tracking import own_database
    from storage.lock import run_lock

    if not fs.exists(fs.join(run, config.CONFIG_FILE)) or not fs.exists(fs.join(run, TABLE)):
        return
    settings = config.load(run)
    runs = jobs.arm_runs(run, jobs.trainable_settings(run, settings))
    if not any(each.evaluated() for each in runs):
        return
    with run_lock(run, say):
        own_database.let_go(run)  # a copy from before the lock may lack what its last holder logged
        say(f"MLflow does not know {fs.base_name(run)}: it is logged from its folder")
        log = RunLog(run, fs.base_name(run), settings, say, tracking_uri)
        _log_what_is_there(run, settings, runs, log)
        if fs.exists(fs.join(run, "report", REPORT_TABLE)):
            log.report()
        log.close("FINISHED")


def _log_what_is_there(run: str, settings: Settings, runs: Sequence[ArmRun], log: RunLog) -> None:
    """Log what the run folder holds, so that MLflow also has what an earlier command could not log."""
    if jobs.needs_sdnet(settings) and not (settings.pretrained or settings.bank):
        job = jobs.pretrain_job(run, settings)
        if job.finished():
            log.finish("pretrain", 0, job)
    for each in runs:
        if each.evaluated() or each.failure() is not None:
            log.finish_arm(each, failed=not each.evaluated())
        else:
            log.follow(each.arm, each.seed, each.job)


def require_data(run: str, settings: Settings | None = None) -> None:
    """Raises InputError if the run has no slices yet, or if they were split by other options than the settings'."""
    if not fs.exists(fs.join(run, TABLE)):
        raise InputError(fs.base_name(run), "has no slices", "run `cardiomix ingest DATA --run RUN` first")
    if settings is not None:
        jobs.require_split_by(run, settings)
