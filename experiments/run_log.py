"""MLflow kept up to date with what the run folder says: the driver is its one writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.config import Settings
from experiments.version import git_commit
from storage import uri

if TYPE_CHECKING:
    from actors.stages import ArmRun
    from actors.training import TrainJob
    from experiments.tracking import ChildRun, Tracker


class RunLog:
    """Parent and child runs of one run folder. MLflow is opened at first use: by then a network trains and nobody
    waits."""

    def __init__(self, run: str, name: str, settings: Settings) -> None:
        self.run, self.name, self.settings = run, name, settings
        self._tracker: Tracker | None = None
        self._open: dict[str, ChildRun] = {}
        self._logged: dict[str, int] = {}

    @property
    def tracker(self) -> Tracker:
        """The parent run."""
        if self._tracker is None:
            from experiments.tracking import Tracker

            settings = self.settings
            tags = {"git_commit": git_commit(), "preset": settings.preset, "config_hash": settings.config_hash}
            self._tracker = Tracker(self.run, self.name, tags=tags)
        return self._tracker

    def follow(self, arm: str, seed: int, job: TrainJob) -> list[dict[str, Any]]:
        """Log the epochs that are new; returns all of them."""
        from actors.training import read_history

        records, label = read_history(job), f"{arm}/seed{seed}"
        if len(records) > self._logged.get(label, 0):
            self._child(arm, seed, job).log_history(records)
            self._logged[label] = len(records)
        return records

    def finish(self, arm: str, seed: int, job: TrainJob, status: str = "FINISHED") -> None:
        """End a child run."""
        self._child(arm, seed, job).finish(status)
        self._open.pop(f"{arm}/seed{seed}")

    def finish_arm(self, run: ArmRun, failed: bool) -> None:
        """Log an arm's epochs, scores and weights, and end its run."""
        from actors.evaluation import CASES
        from pipeline.evaluation import read_cases, summarise

        job = run.job
        self.follow(run.arm, run.seed, job)
        if failed:
            self.finish(run.arm, run.seed, job, "FAILED")
            return
        child = self._child(run.arm, run.seed, job)
        child.log_scores(summarise(read_cases(uri.join(job.out, CASES))))
        if uri.is_local(job.out):
            for name in ("model.safetensors", "model.json", CASES):
                child.log_artifact(uri.local_path(uri.join(job.out, name)))
        self.finish(run.arm, run.seed, job)

    def close(self, status: str) -> None:
        """End whatever is still open: nothing in MLflow looks as if it went on."""
        if self._tracker is None:
            return
        for child in self._open.values():
            child.finish(status)
        self._open.clear()
        self._tracker.finish(status)

    def _child(self, arm: str, seed: int, job: TrainJob) -> ChildRun:
        label = f"{arm}/seed{seed}"
        if label not in self._open:
            tags = {"git_commit": git_commit(), "bank_fingerprint": job.bank_fingerprint or ""}
            params = job.model_dump(mode="json", exclude={"out": True, "stream": {"run", "bank"}})
            self._open[label] = self.tracker.child(arm, seed, job.config_hash, tags, params)
        return self._open[label]
