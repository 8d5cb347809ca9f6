"""Keep MLflow up to date with the run folder. The driver is the only writer, in a thread of its own.

The run folder is the truth, and logging replays it. So a server that goes away delays only logging: what could not be
logged is tried again until it succeeds, at the latest by the next command that drives the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from experiments.config import CONFIG_FILE, Settings, as_yaml, shareable
from experiments.tracking import own_database, store
from experiments.tracking.system_metrics import SystemSampler
from experiments.tracking.writer import LogWriter
from experiments.version import git_commit
from storage import fs
from storage.errors import InputError

if TYPE_CHECKING:
    from actors.stages import ArmRun
    from actors.train_job import TrainJob
    from experiments.tracking.tracker import ChildRun, Tracker

PATIENCE_S = 10.0  # how long the end of a run waits for a server that is away
NAMED = 5  # most arms that a warning names
TABLE = "table.md"  # in the report's folder
_LAYOUT = 2  # version of what is logged of an arm; arms logged with an earlier one are completed


@dataclass
class _Arm:
    """What the run folder holds of a network. `outcome` is the status of its MLflow run at its end; None before."""

    arm: str
    seed: int
    job: TrainJob
    records: list[dict[str, Any]] = field(default_factory=list)
    outcome: str | None = None
    scored: bool = False
    logged: int = 0  # epochs that are in MLflow

    @property
    def label(self) -> str:
        return f"{self.arm}/seed{self.seed}"

    def mark(self) -> str:
        """A hash of everything that is to be logged, 16 hex digits."""
        from actors.evaluate_arm import CASES

        scores = fs.read_text(fs.join(self.job.out, CASES)) if self.scored else ""
        text = json.dumps([_LAYOUT, self.records, self.outcome, scores])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunLog:
    """The parent and child runs in MLflow of one run folder.

    Only `require`, `page` and `close` wait for MLflow. Only `require` raises if MLflow fails, with an InputError. `say`
    shows a line to the user.
    """

    def __init__(
        self, run: str, name: str, settings: Settings, say: Callable[[str], None], tracking_uri: str | None = None
    ) -> None:
        self.run, self.name, self.settings, self._say = run, name, settings, say
        self.tracking_uri = store.tracking_uri_of(run, tracking_uri)
        self._own = store.is_own(run, self.tracking_uri)
        self._unsaved = False
        self._tracker: Tracker | None = None  # only the writer's thread sets this and the next
        self._children: dict[str, ChildRun] = {}
        self._arms: dict[str, _Arm] = {}
        self._required = self._refused = False
        self._writer = LogWriter(self._forget, store.is_away, self._say_change)
        self._system = SystemSampler(run, self._log_system)

    def start(self) -> None:
        """Begin to open MLflow in the background. The first time this takes seconds."""
        if not self._required:
            self._writer.post("open", lambda: store.open_store(self.run, self.tracking_uri))

    def require(self) -> None:
        """Wait until MLflow has the parent run, then begin to sample the machine.

        Raises InputError if MLflow does not answer, or refuses. Once it has answered, it may go away.
        """
        if not self._required:
            self._writer.post("parent", self._parent)
            error = self._writer.wait("parent")
            if error is not None:
                self._refused = True
                where, remedy = store.redacted(self.tracking_uri), "mend it, or set another MLFLOW_TRACKING_URI"
                raise error if isinstance(error, InputError) else InputError(where, store.reason(error), remedy)
        self._required = True
        self._system.start()

    def follow(self, arm: str, seed: int, job: TrainJob) -> list[dict[str, Any]]:
        """Log the new epochs of a network. Returns the records of all its epochs."""
        from actors.train_job import read_history

        known = self._arms.setdefault(f"{arm}/seed{seed}", _Arm(arm, seed, job))
        records = read_history(job)
        if len(records) > len(known.records) or known.job != job:
            self._post(_Arm(arm, seed, job, records))
        return records

    def finish(self, arm: str, seed: int, job: TrainJob, status: str = "FINISHED", scored: bool = False) -> None:
        """Log a network's epochs and end its MLflow run with `status`. With `scored`, log scores and the model too."""
        from actors.train_job import read_history

        self._post(_Arm(arm, seed, job, read_history(job), status, scored))

    def finish_arm(self, run: ArmRun, failed: bool) -> None:
        """Log an arm's epochs and, unless it failed, its scores and model; then end its MLflow run."""
        self.finish(run.arm, run.seed, run.job, "FAILED" if failed else "FINISHED", scored=not failed)

    def report(self) -> None:
        """Make the report's table the description of the parent run. A local run's report is also stored there."""
        self._writer.post("report", self._log_report)

    def page(self) -> str | None:
        """The address, below MLflow's own, of the list of this run's arms with Dice in its first columns.

        None if MLflow does not answer. Waits until the parent run is there.
        """
        from experiments.tracking.headline import VIEW

        self._writer.post("parent", self._parent)
        self._writer.wait("parent")
        tracker = self._tracker
        return None if tracker is None else f"#/experiments/{tracker.experiment_id}/runs?viewStateShareKey={VIEW}"

    def close(self, status: str | None) -> None:
        """End all open MLflow runs, the parent run with `status`. With None they are left open.

        Says what could not be logged. The run folder is complete in any case.
        """
        self._system.stop()
        if status is None or self._refused or not (self._required or self._arms):
            self._writer.close(0)  # returns only after a database that is being made
            return
        for arm in list(self._arms.values()):
            if arm.outcome is None and arm.records:
                self._post(_Arm(arm.arm, arm.seed, arm.job, arm.records, "KILLED"))
        self._log_system()
        self._writer.post("end", partial(self._log_end, status))
        missing = self._writer.close(PATIENCE_S)
        if missing:
            self._system.keep()
            self._say(self._what_is_missing(missing))
        if self._own:
            own_database.let_go(self.run)

    def _what_is_missing(self, missing: list[str]) -> str:
        behind = [
            f"{arm.label} after epoch {arm.logged}" if arm.logged < len(arm.records) else f"{arm.label}'s end"
            for arm in self._arms.values()
            if arm.label in missing
        ]
        behind += [name for name in missing if name in ("report", "system")]
        named = ", ".join(behind[:NAMED]) or "the run's end"
        named += f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
        why = store.reason(self._writer.error) if self._writer.error else "it was not waited for"
        where = "the run's MLflow" if self._own else store.redacted(self.tracking_uri)
        then = " once the server is back" if store.is_server(self.tracking_uri) else ", once that is mended"
        return f"warning: {why}: {where} lacks {named}; nothing is lost, `cardiomix report --run RUN` logs it{then}"

    def _post(self, arm: _Arm) -> None:
        before = self._arms.get(arm.label)
        arm.logged = before.logged if before is not None and before.job == arm.job else 0
        self._arms[arm.label] = arm
        self._writer.post(arm.label, partial(self._log_arm, arm))

    # The methods below run in the writer's thread.

    def _parent(self) -> Tracker:
        if self._tracker is None:
            from experiments.tracking.lineage import run_params
            from experiments.tracking.tracker import Tracker

            tags = self._tags() | {"config_hash": self.settings.config_hash}
            tags |= {"arms": ", ".join(self.settings.arms), "seeds": str(self.settings.seeds)}
            tracker = Tracker(self.run, self.name, self.tracking_uri, tags)
            tracker.describe(run_params(self.settings))
            tracker.log_text(as_yaml(shareable(self.settings)), CONFIG_FILE)
            self._tracker = tracker
        return self._tracker

    def _tags(self) -> dict[str, str]:
        return {"git_commit": git_commit(), "preset": self.settings.preset}

    def _log_system(self) -> None:
        self._writer.post("system", lambda: self._system.flush(self._parent().log_system))

    def _log_arm(self, arm: _Arm) -> None:
        mark = arm.mark()
        if not (arm.outcome and self._parent().is_logged(arm.arm, arm.seed, arm.job.config_hash, mark)):
            self._unsaved = True
            self._log_state(arm, mark)
        arm.logged = len(arm.records)
        if arm.outcome and self._unsaved:
            self._parent().log_standing()
            self._save()

    def _log_state(self, arm: _Arm, mark: str) -> None:
        from experiments.tracking.lineage import job_inputs, job_params, job_tags

        job = arm.job
        if arm.label not in self._children:
            tags, params, inputs = self._tags() | job_tags(job), job_params(arm.arm, arm.seed, job), job_inputs(job)
            child = self._parent().child(arm.arm, arm.seed, job.config_hash, tags, params)
            child.log_inputs(inputs)
            self._parent().describe({}, inputs)
            self._children[arm.label] = child
        child = self._children[arm.label]
        child.log_history(arm.records)
        arm.logged = len(arm.records)
        if arm.scored:
            self._log_result(arm, child)
        if arm.outcome:
            child.finish(arm.outcome, mark)
            del self._children[arm.label]

    def _log_result(self, arm: _Arm, child: ChildRun) -> None:
        """Log the scores, `cases.csv`, and the network as a model with a signature."""
        from actors.evaluate_arm import CASES
        from experiments.tracking.model import log_model
        from pipeline.scores.tables import read_cases

        cases = fs.join(arm.job.out, CASES)
        child.log_scores(read_cases(cases))
        child.log_text(fs.read_text(cases), CASES)
        log_model(child.run_id, self.tracking_uri, arm.job.out, child.files)

    def _log_report(self) -> None:
        folder = fs.join(self.run, "report")
        self._parent().note(fs.read_text(fs.join(folder, TABLE)))
        if fs.is_local(self.run):
            self._parent().log_artifacts(fs.local_path(folder))

    def _log_end(self, status: str) -> None:
        self._parent().log_standing()
        self._parent().finish(status)
        self._save()

    def _save(self) -> None:
        """Store a snapshot of the run's own database, if the run is in an object store."""
        if self._own:
            own_database.put_snapshot(self.run)
        self._unsaved = False

    def _forget(self) -> None:
        """Forget what the store holds: after a failure this is not known, so the store is asked again."""
        self._tracker = None
        self._children.clear()

    def _say_change(self, error: BaseException | None) -> None:
        if error is None:
            where = "the run's database" if self._own else store.redacted(self.tracking_uri)
            self._say(f"MLflow: {where} is back, all is logged")
        elif self._writer.succeeded:
            self._say(f"MLflow: {store.reason(error)}; it will be tried again, training goes on")
