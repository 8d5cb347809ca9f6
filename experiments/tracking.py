"""The ablation in MLflow: one parent run, a child run for each arm and seed, safe to repeat after any interruption.

Runs are found again by their tags and metric steps that are already there are skipped, so that logging the same history
twice leaves one copy. Only the driver writes: constructing a `Tracker` also creates or checks the database, before any
worker could touch it. Nothing about the machine is recorded (no system metrics, user, host or source path) and MLflow's
usage telemetry is switched off.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import uri
from storage.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_RUN_NAME = "ablation"

_PARENT_TAG = "mlflow.parentRunId"
_RUN_TAG = "cardiomix_run"
_BATCH = 100  # a request may hold 1000 metrics, but only 100 params and 100 tags
_MAX_PARAM = 6000
_SCORES = {"dice": "dice_mean", "hd95_median_mm": "hd95_median_mm", "missed": "missed"}


class Tracker:
    """The parent run of one run folder.

    `tracking_uri` wins over `MLFLOW_TRACKING_URI`, which wins over SQLite in `<run>/mlflow.db` (in the working
    directory where the run lives in an object store, since SQLite needs a file). Artifacts of a database go to
    `mlartifacts/` beside it; a tracking server decides itself. Raises `InputError` where the store cannot be opened.
    """

    def __init__(
        self, run_uri: str, experiment: str, tracking_uri: str | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        home = uri.local_path(run_uri).absolute() if uri.is_local(run_uri) else Path.cwd()
        home.mkdir(parents=True, exist_ok=True)
        own = f"sqlite:///{home / 'mlflow.db'}"
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        self.experiment = experiment
        # A database in the run folder moves with it and knows no other run; elsewhere a hash tells them apart.
        alone = self.tracking_uri == own and uri.is_local(run_uri)
        self._run_key = "this folder" if alone else hashlib.sha256(_canonical(run_uri).encode()).hexdigest()[:16]
        artifacts = None if self.tracking_uri.startswith("http") else (home / "mlartifacts").as_uri()
        self._client = _client(self.tracking_uri)
        self.experiment_id = self._experiment_id(artifacts)
        self.run_id = self._open_run(PARENT_RUN_NAME, {_RUN_TAG: self._run_key}, None, tags or {}).info.run_id

    def child(
        self,
        arm: str,
        seed: int,
        config_hash: str,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> ChildRun:
        """The run of this arm, seed and configuration, existing or new; nested `params` get names joined by dots."""
        identity = {"arm": arm, "seed": str(seed), "config_hash": config_hash}
        run = self._open_run(f"{arm} seed {seed}", identity, self.run_id, tags or {})
        _log_params(self._client, run, params or {})
        return ChildRun(self._client, run, arm)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store one file with the parent run."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_artifacts(self, folder: str | Path) -> None:
        """Store a folder's files with the parent run, under the folder's own name."""
        self._client.log_artifacts(self.run_id, str(folder), Path(folder).name)

    def finish(self, status: str = "FINISHED") -> None:
        """End the parent run as `FINISHED`, `FAILED` or `KILLED`."""
        self._client.set_terminated(self.run_id, status)

    def ui_command(self) -> str:
        """The command that serves this experiment to a browser on this machine; for a tracking server, its address."""
        if self.tracking_uri.startswith("http"):
            return _without_password(self.tracking_uri)
        return f"mlflow ui --backend-store-uri {shlex.quote(self.tracking_uri)} --host 127.0.0.1"

    def runs(self) -> list[dict[str, Any]]:
        """Every child: arm, seed, config_hash, status and last metrics (`dice/<vendor>/<structure>`, `val/dice`, …)."""
        children = self._search(f"tags.`{_PARENT_TAG}` = '{self.run_id}'")
        rows = [
            {
                "arm": run.data.tags.get("arm", ""),
                "seed": int(run.data.tags.get("seed", -1)),
                "config_hash": run.data.tags.get("config_hash", ""),
                "status": run.info.status,
                "metrics": dict(run.data.metrics),
            }
            for run in children
        ]
        return sorted(rows, key=lambda row: (row["arm"], row["seed"], row["config_hash"]))

    def _experiment_id(self, artifact_location: str | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            return str(self._client.create_experiment(self.experiment, artifact_location=artifact_location))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _search(self, condition: str) -> list[Run]:
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs([self.experiment_id], condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _open_run(self, name: str, identity: Mapping[str, str], parent: str | None, tags: Mapping[str, str]) -> Run:
        wanted = dict(identity) | ({_PARENT_TAG: parent} if parent else {})
        found = self._search(" and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items()))
        if not found:
            everything = {key: str(value) for key, value in tags.items()} | wanted
            return self._client.create_run(self.experiment_id, tags=everything, run_name=name)
        run = min(found, key=lambda r: r.info.start_time)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        for key, value in tags.items():
            if run.data.tags.get(key) != str(value):
                self._client.set_tag(run.info.run_id, key, str(value))
        return run


class ChildRun:
    """One arm and seed; made by `Tracker.child`."""

    def __init__(self, client: MlflowClient, run: Run, arm: str) -> None:
        self._client = client
        self._arm = arm
        self.run_id: str = run.info.run_id
        self._steps: dict[str, set[int]] = {
            key: {metric.step for metric in client.get_metric_history(self.run_id, key)} for key in run.data.metrics
        }

    def log_history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log the records of `history.jsonl`: every finite number at the record's `step` (or `epoch`), except at steps
        already logged.

        Where an interruption left two records for one step, the later one counts.
        """
        by_step: dict[int, Mapping[str, Any]] = {}
        for record in records:
            by_step[int(record["step"] if "step" in record else record["epoch"])] = record
        self._log(
            (key, float(value), step)
            for step, record in sorted(by_step.items())
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float)) and step not in self._steps.get(key, ())
        )

    def log_scores(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log rows of `pipeline.evaluation.summarise` that belong to this arm as `dice/<vendor>/<structure>`, likewise
        HD95 and missed.

        A score that has not changed is not logged again; one that has (the arm was evaluated anew) becomes the next
        step.
        """
        current = self._client.get_run(self.run_id).data.metrics
        self._log(
            (key, value, max(self._steps.get(key, {-1})) + 1)
            for row in rows
            if row["arm"] == self._arm
            for name, column in _SCORES.items()
            for key, value in [(_metric_name(name, row["vendor"], row["structure"]), float(row[column]))]
            if current.get(key) != value
        )

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store one file with this run; a file of the same name is replaced."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`."""
        self._client.set_terminated(self.run_id, status)

    def _log(self, points: Iterable[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow would turn infinity into 1.8e308, which ruins a chart; missed structures have a metric of their own.
        finite = [Metric(key, value, now, step) for key, value, step in points if math.isfinite(value)]
        for batch in _batches(finite):
            self._client.log_batch(self.run_id, metrics=batch)
            for metric in batch:
                self._steps.setdefault(metric.key, set()).add(metric.step)


def _client(tracking_uri: str) -> MlflowClient:
    # Before the import: MLflow reads it once, and a study's machine should not report to anyone.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    shown = _without_password(tracking_uri)
    _check_sqlite(tracking_uri)
    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        with _few_retries():
            client.search_experiments(max_results=1)  # the first call is what creates, migrates or refuses the database
    except MlflowException as error:
        remedy = "check that it is reachable, or give another tracking URI"
        if "out-of-date database schema" in str(error):
            remedy = f"back it up, then run: mlflow db upgrade {shlex.quote(shown)}"
        # Not chained: MLflow's text repeats the address, password included.
        raise InputError(shown, _without_password(str(error).splitlines()[0]), remedy) from None
    except Exception as error:  # drivers raise types of their own: no database, no permission, no connection
        problem = f"cannot open the MLflow store ({type(error).__name__})"
        raise InputError(
            shown, problem, "check that it is reachable and writable, or unset MLFLOW_TRACKING_URI"
        ) from None
    return client


def _check_sqlite(tracking_uri: str) -> None:
    """What MLflow would find out only after ten attempts and 100 seconds."""
    if not tracking_uri.startswith("sqlite:///"):
        return
    path = Path(tracking_uri.removeprefix("sqlite:///"))
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(
            tracking_uri, "cannot open the MLflow store here", "give a writable file in an existing folder"
        )


@contextmanager
def _few_retries() -> Iterator[None]:
    """A wrong server address should fail within seconds; once a server has answered, MLflow's own patience is right."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _log_params(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    # MLflow refuses to change a parameter; the config hash says that nothing that matters has changed.
    new = [Param(key, text[:_MAX_PARAM]) for key, text in _flat(params) if key not in run.data.params]
    for batch in _batches(new):
        client.log_batch(run.info.run_id, params=batch)


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _metric_name(*parts: str) -> str:
    """MLflow allows letters, digits and `_-. :/` in a name; a vendor may be called anything."""
    return "/".join(re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII).strip(". ") or "_" for part in parts)


def _canonical(run_uri: str) -> str:
    return str(uri.local_path(run_uri).resolve()) if uri.is_local(run_uri) else run_uri.rstrip("/")


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", address)
