"""The MLflow database that a run keeps in itself: wherever the run is, renamed, copied or in a bucket, it fits there.

SQLite needs a file. So a run in an object store keeps a snapshot there: the driver takes it up into a temporary folder,
writes there, and puts a new snapshot into the run. Only the holder of the run's lock may put one.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from storage import fs

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_PLACES = (("runs", "artifact_uri"), ("logged_models", "artifact_location"))
_TAKEN_UP: dict[str, TemporaryDirectory[str]] = {}


def database_file(run: str) -> Path:
    """The file to open: in the run folder, or of a run in an object store in a temporary folder of this process."""
    if fs.is_local(run):
        return fs.local_path(run).absolute() / DATABASE
    if run not in _TAKEN_UP:
        _TAKEN_UP[run] = TemporaryDirectory(prefix="cardiomix-mlflow-")
    return Path(_TAKEN_UP[run].name) / DATABASE


def artifacts_uri(run: str) -> str:
    """Where this database's artifacts are: in the run."""
    return (fs.local_path(run).absolute() / ARTIFACTS).as_uri() if fs.is_local(run) else fs.join(run, ARTIFACTS)


def prepare(run: str) -> Path:
    """The file, before it is opened: taken up from the run's snapshot, and its artifacts where the run is now.

    There is no file yet if the run has no database. Raises StageError where the object store does not answer.
    """
    file = database_file(run)
    if not fs.is_local(run) and not file.exists():
        with suppress(FileNotFoundError):
            file.write_bytes(fs.read_bytes(fs.join(run, DATABASE)))
    if file.is_file():
        with suppress(sqlite3.Error):  # what is wrong with it is told by whoever opens it
            _point_artifacts(file, artifacts_uri(run))
    return file


def put_snapshot(run: str) -> None:
    """Store the database as it is now in the run; nothing happens for a local run, whose database is there."""
    if not fs.is_local(run):
        with closing(sqlite3.connect(database_file(run))) as database:
            fs.write_bytes(fs.join(run, DATABASE), database.serialize())


def let_go(run: str) -> None:
    """Remove the temporary copy; the next use takes up the run's snapshot."""
    taken_up = _TAKEN_UP.pop(run, None)
    if taken_up is not None:
        taken_up.cleanup()


def _point_artifacts(file: Path, here: str) -> None:
    """Of every experiment whose artifacts are in a run's `mlartifacts`, move the stored places to `here`: MLflow stores
    them in full, and a run that was moved or copied would write to where it was."""
    with closing(sqlite3.connect(file)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        stored = database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
        for experiment, was in stored:
            if not was or was == here or not was.endswith(f"/{ARTIFACTS}"):
                continue
            for table, column in _PLACES:
                if table in tables:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE experiment_id = ? AND substr({column}, 1, ?) = ?",
                        (here, len(was) + 1, experiment, len(was) + 1, f"{was}/"),
                    )
            database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (here, experiment))
