"""The MLflow database inside a run's own folder. It stays valid if the run is renamed, moved or copied.

SQLite needs a local file. So a run in an object store keeps a snapshot of the database: the driver copies it to a
temporary folder, writes there, and stores a new snapshot in the run. Only the holder of the run's lock may store one.
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
    """The file to open: in a local run's folder, otherwise in a temporary folder of this process."""
    if fs.is_local(run):
        return fs.local_path(run).absolute() / DATABASE
    if run not in _TAKEN_UP:
        _TAKEN_UP[run] = TemporaryDirectory(prefix="cardiomix-mlflow-")
    return Path(_TAKEN_UP[run].name) / DATABASE


def artifacts_uri(run: str) -> str:
    """The URI of this database's artifacts, which are in the run."""
    return (fs.local_path(run).absolute() / ARTIFACTS).as_uri() if fs.is_local(run) else fs.join(run, ARTIFACTS)


def prepare(run: str) -> Path:
    """Prepare the database file before it is opened, and return its path.

    A run in an object store is copied from its snapshot first. Stored places of artifacts are changed to where the run
    is now. If the run has no database yet, the file does not exist. Raises StageError if the object store fails.
    """
    file = database_file(run)
    if not fs.is_local(run) and not file.exists():
        with suppress(FileNotFoundError):
            part = file.with_suffix(".part")
            part.write_bytes(fs.read_bytes(fs.join(run, DATABASE)))
            part.replace(file)  # a part of it would pass for a database without runs
    if file.is_file():
        with suppress(sqlite3.Error):  # opening the file reports what is wrong with it
            _point_artifacts(file, artifacts_uri(run))
    return file


def put_snapshot(run: str) -> None:
    """Store a snapshot of the database in a run in an object store. Does nothing for a local run."""
    if not fs.is_local(run):
        with closing(sqlite3.connect(database_file(run))) as database:
            fs.write_bytes(fs.join(run, DATABASE), database.serialize())


def let_go(run: str) -> None:
    """Remove the temporary copy. The next use copies the run's snapshot again."""
    taken_up = _TAKEN_UP.pop(run, None)
    if taken_up is not None:
        taken_up.cleanup()


def _point_artifacts(file: Path, here: str) -> None:
    """Change the stored places of artifacts to `here`, for every experiment with artifacts in a run's `mlartifacts`.

    MLflow stores full paths. Without this, a run that was moved or copied would write to the old place.
    """
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
