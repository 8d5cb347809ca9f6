"""Store the files of MLflow's runs and models where MLflow looks for them.

If that place is in a run in an object store, `storage.fs` writes the files, with the settings that the driver has
already. MLflow itself would need another package and other settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.tracking.own_database import artifacts_uri
from storage import fs

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Artifacts:
    """Stores files for MLflow. `run` is the run folder, a path or URI."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self._client = client
        self._ours = "" if fs.is_local(run) else artifacts_uri(run) + "/"

    def text(self, run_id: str, text: str, name: str) -> None:
        """Store a text as a file of an MLflow run; a file of the same name is replaced."""
        place = self._place(self._client.get_run(run_id).info.artifact_uri)
        if place is None:
            self._client.log_text(run_id, text, name)
        else:
            fs.write_text(fs.join(place, name), text)

    def folder(self, run_id: str, folder: str, name: str) -> None:
        """Store a local folder's files with an MLflow run, under `name`."""
        place = self._place(self._client.get_run(run_id).info.artifact_uri)
        if place is None:
            self._client.log_artifacts(run_id, folder, name)
        else:
            _copy(folder, fs.join(place, name))

    def model(self, model_id: str, folder: str) -> None:
        """Store a saved model's files with an MLflow model."""
        place = self._place(self._client.get_logged_model(model_id).artifact_location)
        if place is None:
            self._client.log_model_artifacts(model_id, folder)
        else:
            _copy(folder, place)

    def _place(self, uri: str | None) -> str | None:
        """`uri` if it lies in our run in an object store, otherwise None: then MLflow stores the file."""
        return uri if uri and self._ours and uri.startswith(self._ours) else None


def _copy(folder: str, target: str) -> None:
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            fs.write_bytes(fs.join(target, path.relative_to(folder).as_posix()), path.read_bytes())
