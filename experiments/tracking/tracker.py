"""Log an ablation to MLflow: one parent run, and a child run for each arm and seed. Any call can safely be repeated.

Runs are found again by their tags, and metric steps that are there already are skipped, so logging the same history
twice leaves one copy. Times are computed from the history, not read from the clock: if a request was carried out but
its answer was lost, the store recognises the repeated request. Only the driver writes, from one thread. Opening a
`Tracker` also creates or checks the database, before any worker can use it.

Of the machine only its use is recorded (see `experiments.tracking.system_metrics`): no user, host or path. MLflow's
telemetry is off. Everything here blocks and raises what MLflow raises; a driver uses `experiments.tracking.run_log`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.tracking.artifacts import Artifacts
from experiments.tracking.headline import MEAN, VIEW_TAG, WORST, mean_dice, standing, vendor_means, view
from experiments.tracking.own_database import ARTIFACTS, artifacts_uri
from experiments.tracking.store import (
    OWN_FOLDER,
    PARENT_TAG,
    RUN_TAG,
    is_own,
    is_server,
    newest_trainings,
    open_store,
    run_key,
    search,
    sqlite_file,
    tracking_uri_of,
)
from pipeline.scores.tables import summarise
from storage import fs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Experiment, Run

PARENT_RUN_NAME = "ablation"
DONE_TAG = "logged"

_METRICS, _PARAMS = 500, 100  # most in a request; MLflow allows 1000 and 100
_MAX_PARAM, _MAX_TAG = 6000, 8000  # characters
NOTE_TAG = "mlflow.note.content"
_SCORES = {"dice": "dice_mean", "hd95_median_mm": "hd95_median_mm", "missed": "missed"}


class Tracker:
    """The parent run of one run folder, in the store of `store.tracking_uri_of`.

    Artifacts go to `mlartifacts/` in the run. If the store is another SQLite database than the run's own, they go to
    `mlartifacts/` beside it. A tracking server decides itself. Raises InputError if the store cannot be opened.
    """

    def __init__(
        self, run_uri: str, experiment: str, tracking_uri: str | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        if fs.is_local(run_uri):
            fs.local_path(run_uri).mkdir(parents=True, exist_ok=True)
        self.tracking_uri = tracking_uri_of(run_uri, tracking_uri)
        self.experiment = experiment
        self._client = open_store(run_uri, self.tracking_uri)
        self.files = Artifacts(self._client, run_uri)
        self.experiment_id = self._experiment_id(run_uri)
        run = self._open_run(PARENT_RUN_NAME, {RUN_TAG: run_key(run_uri, self.tracking_uri)}, tags or {})
        self._set_tags(run, tags or {})
        self.run_id: str = run.info.run_id
        self._began_ms = int(run.info.start_time)

    def child(
        self,
        arm: str,
        seed: int,
        config_hash: str,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> ChildRun:
        """The child run of this arm, seed and configuration. It is created if it does not exist.

        An existing run keeps its tags and parameters, such as the commit with which it began.
        """
        run = self._open_run(f"{arm} seed {seed}", self._identity(arm, seed, config_hash), tags or {})
        _log_params(self._client, run, params or {})
        return ChildRun(self._client, run, arm, self.files)

    def describe(self, params: Mapping[str, str], inputs: Sequence[DatasetInput] = ()) -> None:
        """Add parameters and data sets to the parent run. Existing parameters are kept."""
        _log_params(self._client, self._client.get_run(self.run_id), params)
        if inputs:
            self._client.log_inputs(self.run_id, datasets=list(inputs))

    def note(self, text: str) -> None:
        """Set the description of the parent run (Markdown). If it is too long for a tag, it is cut at a line."""
        rest = "\n\n… the rest is in report/table.md, under Artifacts"
        if len(text) > _MAX_TAG:
            text = text[: text.rindex("\n", 0, _MAX_TAG - len(rest))] + rest
        self._client.set_tag(self.run_id, NOTE_TAG, text)

    def log_standing(self) -> None:
        """Log to the parent run what `headline.standing` gives for the children's scores, and save the view of them.

        The newest scored children of each arm count (`store.newest_trainings`). A number that has changed is logged as
        the next step.
        """
        children = search(self._client, self.experiment_id, {PARENT_TAG: self.run_id})
        newest = newest_trainings(run for run in children if MEAN in run.data.metrics)
        metrics, tags = standing([(arm, run.data.metrics) for (arm, _), run in sorted(newest.items())])
        if not metrics:
            return
        parent = self._client.get_run(self.run_id)
        points = []
        for key, value in metrics.items():
            if parent.data.metrics.get(key) != value:
                known = [metric.step for metric in self._client.get_metric_history(self.run_id, key)]
                step = max(known, default=-1) + 1
                points.append((key, value, step, self._began_ms + step))
        _log_metrics(self._client, self.run_id, points)
        self._set_tags(parent, tags)
        names = [str(run.info.run_name) for run in newest.values()]
        saved = view(names, vendor_means(metrics), self._began_ms)
        if self._client.get_experiment(self.experiment_id).tags.get(VIEW_TAG) != saved:
            self._client.set_experiment_tag(self.experiment_id, VIEW_TAG, saved)

    def is_logged(self, arm: str, seed: int, config_hash: str, mark: str) -> bool:
        """Whether this child run ended with this very mark, so that nothing of it is missing."""
        found = search(self._client, self.experiment_id, self._identity(arm, seed, config_hash))
        return bool(found) and found[0].info.status != "RUNNING" and found[0].data.tags.get(DONE_TAG) == mark

    def log_text(self, text: str, name: str) -> None:
        """Store a text as a file of the parent run."""
        self.files.text(self.run_id, text, name)

    def log_artifacts(self, folder: str | Path) -> None:
        """Store a folder's files with the parent run, under the folder's own name."""
        self.files.folder(self.run_id, str(folder), Path(folder).name)

    def log_system(self, samples: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log samples of the driver's machine: (milliseconds since 1970, values by metric).

        The step is the number of seconds since the start of the parent run, so a repeated sample is the same point.
        """
        points = (
            (k, v, max(0, at - self._began_ms) // 1000, at) for at, numbers in samples for k, v in numbers.items()
        )
        _log_metrics(self._client, self.run_id, points)

    def finish(self, status: str = "FINISHED") -> None:
        """End the parent run as `FINISHED`, `FAILED` or `KILLED`. Child runs that are still open end as `KILLED`."""
        for run in search(self._client, self.experiment_id, {PARENT_TAG: self.run_id}):
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
        self._client.set_terminated(self.run_id, status)

    def runs(self) -> list[dict[str, Any]]:
        """All child runs: arm, seed, config_hash, status, last metrics (`dice/<vendor>/<structure>`, `val/dice`, …)."""
        rows = [
            {
                "arm": run.data.tags.get("arm", ""),
                "seed": int(run.data.tags.get("seed", -1)),
                "config_hash": run.data.tags.get("config_hash", ""),
                "status": run.info.status,
                "metrics": dict(run.data.metrics),
            }
            for run in search(self._client, self.experiment_id, {PARENT_TAG: self.run_id})
        ]
        return sorted(rows, key=lambda row: (row["arm"], row["seed"], row["config_hash"]))

    def _identity(self, arm: str, seed: int, config_hash: str) -> dict[str, str]:
        return {"arm": arm, "seed": str(seed), "config_hash": config_hash, PARENT_TAG: self.run_id}

    def _experiment_id(self, run_uri: str) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None and is_own(run_uri, self.tracking_uri):
            found = self._under_its_former_name()
        if found is None:
            place = _artifacts_place(run_uri, self.tracking_uri)
            return str(self._client.create_experiment(self.experiment, artifact_location=place))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _under_its_former_name(self) -> Experiment | None:
        """Find the experiment of a run folder that was renamed, and give it the new name. None if there is none.

        If there are several, the newest is taken.
        """
        known = sorted(self._client.search_experiments(), key=lambda each: int(each.creation_time or 0))
        for each in reversed(known):
            if search(self._client, each.experiment_id, {RUN_TAG: OWN_FOLDER}):
                self._client.rename_experiment(each.experiment_id, self.experiment)
                return each
        return None

    def _set_tags(self, run: Run, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            if run.data.tags.get(key) != value:
                self._client.set_tag(run.info.run_id, key, value)

    def _open_run(self, name: str, identity: Mapping[str, str], tags: Mapping[str, str]) -> Run:
        found = search(self._client, self.experiment_id, identity)
        if not found:
            return self._client.create_run(self.experiment_id, tags={**tags, **identity}, run_name=name)
        run, *twins = found
        for twin in twins:  # made by a request that was carried out after we had given up on it
            if not twin.data.metrics:
                self._client.delete_run(twin.info.run_id)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._set_tags(run, {key: value for key, value in tags.items() if key not in run.data.tags})
        return run


class ChildRun:
    """The MLflow run of one arm and seed, made by `Tracker.child`."""

    def __init__(self, client: MlflowClient, run: Run, arm: str, files: Artifacts) -> None:
        self._client, self.files = client, files
        self._arm = arm
        self.run_id: str = run.info.run_id
        self._began_ms = self._now_ms = int(run.info.start_time)
        self._steps: dict[str, set[int]] = {
            key: {metric.step for metric in client.get_metric_history(self.run_id, key)} for key in run.data.metrics
        }

    def log_history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log the records of `history.jsonl`: every finite number at the record's `step` (or else `epoch`), except at
        steps that are logged already.

        If an interruption left two records of one step, the later one counts. A record's time is the start of the run
        plus the seconds of training and validation until then.
        """
        by_step: dict[int, Mapping[str, Any]] = {}
        for record in records:
            by_step[int(record["step"] if "step" in record else record["epoch"])] = record
        points, now = [], float(self._began_ms)
        for step, record in sorted(by_step.items()):
            now += 1000 * (record.get("train_seconds", 0.0) + record.get("validation_seconds", 0.0))
            points += [
                (key, float(value), step, int(now))
                for key, value in sorted(record.items(), key=lambda item: _history_order(item[0]))
                if key != "step" and isinstance(value, (int, float)) and step not in self._steps.get(key, ())
            ]
        self._now_ms = int(now)
        self._log(points)

    def log_scores(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Log the scores in this arm's rows of `cases.csv`.

        The metrics are `dice/mean` over all vendors, `dice/worst` (the worst vendor's), `dice/<vendor>/mean`, and from
        `pipeline.scores.tables.summarise` `dice/<vendor>/<structure>`, and likewise HD95 (mm) and missed structures.
        If a score has changed, because the arm was evaluated anew, it is logged as the next step; an unchanged score is
        not logged again.
        """
        own = [case for case in cases if case["arm"] == self._arm]
        means = mean_dice(own)
        whole = means.pop("", None)
        values = {} if whole is None else {MEAN: whole, WORST: min(means.values())}
        values |= {_metric_name("dice", vendor, "mean"): value for vendor, value in means.items()}
        for row in summarise(own):
            for name, column in _SCORES.items():
                values[_metric_name(name, row["vendor"], row["structure"])] = float(row[column])
        current = self._client.get_run(self.run_id).data.metrics
        points = []
        for key, value in values.items():
            if current.get(key) != value:
                step = max(self._steps.get(key, {-1})) + 1
                points.append((key, value, step, self._now_ms + step))
        self._log(points)

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """Log the data sets that the run was made from. MLflow keeps one of each name and digest."""
        self._client.log_inputs(self.run_id, datasets=list(inputs))

    def log_text(self, text: str, name: str) -> None:
        """Store a text as a file of this run; a file of the same name is replaced."""
        self.files.text(self.run_id, text, name)

    def finish(self, status: str = "FINISHED", mark: str = "") -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`. `mark` names what was logged, see `Tracker.is_logged`."""
        self._client.set_tag(self.run_id, DONE_TAG, mark)
        self._client.set_terminated(self.run_id, status)

    def _log(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        for key, step in _log_metrics(self._client, self.run_id, points):
            self._steps.setdefault(key, set()).add(step)


def _history_order(key: str) -> int:
    """Sort key of metrics: MLflow opens its compare page on a run's first metric, and lists metrics in this order."""
    return 0 if key == "val/dice" else 1 if key.startswith("val/") else 3 if "/" not in key else 2


def _artifacts_place(run_uri: str, tracking_uri: str) -> str | None:
    """The URI for the artifacts of a new experiment; None if the server decides."""
    if is_server(tracking_uri):
        return None
    file = sqlite_file(tracking_uri)
    if file is None or is_own(run_uri, tracking_uri):
        return artifacts_uri(run_uri)
    return (file.absolute().parent / ARTIFACTS).as_uri()  # beside the database, which stays if the run is moved


def _log_metrics(
    client: MlflowClient, run_id: str, points: Iterable[tuple[str, float, int, int]]
) -> list[tuple[str, int]]:
    """Log finite points (key, value, step, milliseconds since 1970). Returns the (key, step) of those logged."""
    from mlflow.entities import Metric

    # MLflow would turn infinity into 1.8e308, which spoils a chart. Missed structures have a metric of their own.
    finite = [Metric(key, value, at, step) for key, value, step, at in points if math.isfinite(value)]
    for batch in _batches(finite, _METRICS):
        client.log_batch(run_id, metrics=batch)
    return [(metric.key, metric.step) for metric in finite]


def _log_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    # MLflow refuses to change a parameter. By the config hash, nothing that matters has changed.
    new = [Param(key, text[:_MAX_PARAM]) for key, text in params.items() if key not in run.data.params]
    for batch in _batches(new, _PARAMS):
        client.log_batch(run.info.run_id, params=batch)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _metric_name(*parts: str) -> str:
    """Join the parts to a metric's name. Characters that MLflow does not allow, as in a vendor's name, become `_`."""
    return "/".join(re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII).strip(". ") or "_" for part in parts)
