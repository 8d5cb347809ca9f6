"""Where a run's MLflow is, and how it is opened: at once or with one clear line."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from experiments.tracking.own_database import DATABASE, database_file, prepare
from storage import fs
from storage.errors import InputError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, RUN_TAG = "mlflow.parentRunId", "cardiomix_run"
OWN_FOLDER = "this folder"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a study's machine should not report to anyone
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would repeat a failed request by itself, also one whose answer was lost, which makes a second run. We
    # repeat, and look first what is there.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds that a hung server costs until it counts as away
}


class StoreError(InputError):
    """MLflow's store cannot be opened, or does not answer."""


def tracking_uri_of(run: str, tracking_uri: str | None = None) -> str:
    """The tracking URI of a run: the one given, else `MLFLOW_TRACKING_URI`, else the run's own database, SQLite at
    `own_database.database_file`."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _own_uri(run)


def is_own(run: str, tracking_uri: str) -> bool:
    """Whether this is the database that the run keeps in itself."""
    return tracking_uri == _own_uri(run)


def _own_uri(run: str) -> str:
    # What SQLAlchemy reads is a URL: a `?` would begin its query.
    return f"sqlite:///{str(database_file(run)).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of an SQLite database's address; None for any other address."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0]))


def run_key(run: str, tracking_uri: str) -> str:
    """The parent run's tag `cardiomix_run`. A run's own database moves with it and knows no other run; elsewhere a hash
    of the folder's place tells runs of one name apart."""
    if is_own(run, tracking_uri):
        return OWN_FOLDER
    place = str(fs.local_path(run).resolve()) if fs.is_local(run) else run.rstrip("/")
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def is_server(tracking_uri: str) -> bool:
    """Whether this is a tracking server's address rather than a database's."""
    return tracking_uri.startswith(("http://", "https://"))


def redacted(tracking_uri: str) -> str:
    """The address without a password."""
    return re.sub(r"//[^/@]*@", "//***@", tracking_uri)


def ui_command(run: str, tracking_uri: str) -> str:
    """The command that serves this store to a browser on this machine; for a tracking server, its address."""
    if is_server(tracking_uri):
        return redacted(tracking_uri)
    if is_own(run, tracking_uri) and not fs.is_local(run):  # the file at work goes with this process
        snapshot, tracking_uri = fs.join(run, DATABASE), f"sqlite:///{DATABASE}"
        return f"copy {redacted(snapshot)} to this machine, then: {_serve(tracking_uri)}"
    return _serve(tracking_uri)


def ui_address(tracking_uri: str) -> str:
    """Where a browser finds what `ui_command` names."""
    return redacted(tracking_uri).rstrip("/") if is_server(tracking_uri) else "http://127.0.0.1:5000"


def _serve(tracking_uri: str) -> str:
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)} --host 127.0.0.1"


def open_store(run: str, tracking_uri: str) -> MlflowClient:
    """`open_client` for the store of this run, whose own database is first made to fit where the run is now.

    Raises StoreError as that does, StageError where the run's object store does not answer.
    """
    if is_own(run, tracking_uri):
        prepare(run)
    return open_client(tracking_uri)


def open_client(tracking_uri: str) -> MlflowClient:
    """A client whose store has answered. A request that fails is not repeated by MLflow itself.

    Raises StoreError where the store cannot be opened or does not answer.
    """
    for name, value in _ENVIRONMENT.items():  # before the import: MLflow reads some of it once
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("alembic", "mlflow.store.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for what is raised all the same
    _check_sqlite(tracking_uri)
    try:
        with _no_folder_of_an_escaped_name(tracking_uri):
            client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
            client.search_experiments(max_results=1)  # the first call creates, migrates or refuses the database
    except MlflowException as error:
        remedy = "check that it is reachable, or give another tracking URI"
        if "out-of-date database schema" in str(error):
            remedy = f"back it up, then run: mlflow db upgrade {shlex.quote(redacted(tracking_uri))}"
        # Not chained: MLflow's text repeats the address, password included.
        raise StoreError(redacted(tracking_uri), reason(error), remedy) from None
    except Exception as error:  # drivers raise types of their own: no database, no permission, no connection
        problem = f"cannot open the MLflow store ({type(error).__name__})"
        remedy = "check that it is reachable and writable, or unset MLFLOW_TRACKING_URI"
        raise StoreError(redacted(tracking_uri), problem, remedy) from None
    return client


@contextmanager
def _no_folder_of_an_escaped_name(tracking_uri: str) -> Iterator[None]:
    """MLflow makes the folder that an SQLite address would name if nothing in it were escaped; take it away again."""
    meant, folder = sqlite_file(tracking_uri), Path(tracking_uri.removeprefix("sqlite:///")).parent
    stray = meant is not None and meant.parent != folder and not folder.exists()
    above = next(parent for parent in folder.parents if parent.exists()) if stray else folder
    try:
        yield
    finally:
        while stray and folder != above and folder.is_dir():
            folder.rmdir()
            folder = folder.parent


def reason(error: BaseException) -> str:
    """Why MLflow failed, in a few words and without a password."""
    if isinstance(error, InputError):
        return error.problem
    text = redacted(one_line(error, skip="(raised as a result"))
    for words in ("Connection refused", "Connection reset", "Connection aborted", "timed out", "Name or service"):
        if words in text:
            return f"the MLflow server does not answer ({words.lower()})"
    return text if len(text) <= 300 else text[:297] + "…"


def is_away(error: BaseException) -> bool:
    """Whether the store as a whole does not work now, rather than this one request."""
    from mlflow.exceptions import MlflowException

    refused = isinstance(error, MlflowException) and 400 <= error.get_http_status_code() < 500
    return isinstance(error, (StoreError, MlflowException, ConnectionError, TimeoutError)) and not refused


def search(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """All runs of an experiment with these tags, the oldest first."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], condition, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: int(run.info.start_time))


def _check_sqlite(tracking_uri: str) -> None:
    """What MLflow would find out only after ten attempts and 100 seconds."""
    path = sqlite_file(tracking_uri)
    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StoreError(
            tracking_uri, "cannot open the MLflow store here", "give a writable file in an existing folder"
        )
