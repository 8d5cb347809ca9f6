"""Find a run's MLflow store and open it. If it cannot be opened, the error is one clear line."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from experiments.tracking.own_database import DATABASE, database_file, prepare
from storage import fs
from storage.errors import InputError, one_line
from storage.places import in_a_jobs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, RUN_TAG = "mlflow.parentRunId", "cardiomix_run"
FINGERPRINTS = ("data_fingerprint", "bank_fingerprint", "sdnet_fingerprint", "start_fingerprint")  # tags of a child
OWN_FOLDER = "this folder"
_DATABASES = ("postgresql", "mysql", "mssql")  # how their addresses begin, `+driver` or not
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a machine with patients' data must not report to anyone
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would repeat failed requests itself. If only the answer was lost, that would make a second run. We look
    # what is there before we repeat.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds after which a server that hangs counts as away
}


class StoreError(InputError):
    """MLflow's store cannot be opened, or does not answer."""


def tracking_uri_of(run: str, tracking_uri: str | None = None) -> str:
    """The tracking URI of a run: the one given, else `MLFLOW_TRACKING_URI`, else the run's own SQLite database (see
    `own_database.database_file`).

    Raises InputError in a Ray job if the address is relative to the job's own folder, since that is removed.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    path = (uri or "").removeprefix("sqlite:///").removeprefix("file:")
    is_path = "://" not in path and not path.startswith("databricks")
    if uri and in_a_jobs_folder() and is_path and not Path(path).is_absolute():
        problem = "is relative to a job's own folder, which Ray removes"
        raise InputError(f"MLFLOW_TRACKING_URI={redacted(uri)}", problem, "give a full path, or a server's address")
    return uri or _own_uri(run)


def is_own(run: str, tracking_uri: str) -> bool:
    """Whether this is the address of the run's own database."""
    return tracking_uri == _own_uri(run)


def _own_uri(run: str) -> str:
    # SQLAlchemy reads this as a URL, in which a `?` would begin the query.
    return f"sqlite:///{str(database_file(run)).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of an SQLite database's address; None for any other address."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0]))


def run_key(run: str, tracking_uri: str) -> str:
    """The tag `cardiomix_run` of the parent run, by which it is found again.

    In a run's own database the tag is constant, because the database moves with the run and holds no other. Elsewhere
    it is a hash of the folder's place, so that runs of the same name differ.
    """
    if is_own(run, tracking_uri):
        return OWN_FOLDER
    place = str(fs.local_path(run).resolve()) if fs.is_local(run) else run.rstrip("/")
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def is_server(tracking_uri: str) -> bool:
    """Whether this is the address of a tracking server, not of a database."""
    return tracking_uri.startswith(("http://", "https://"))


def redacted(tracking_uri: str) -> str:
    """The address without user name and password."""
    return re.sub(r"//[^/@]*@", "//***@", tracking_uri)


def ui_command(run: str, tracking_uri: str) -> str:
    """The command that shows this store in a browser on this machine; for a tracking server, its address."""
    if is_server(tracking_uri):
        return redacted(tracking_uri)
    if is_own(run, tracking_uri) and not fs.is_local(run):  # the open file is temporary
        snapshot, tracking_uri = fs.join(run, DATABASE), f"sqlite:///{DATABASE}"
        return f"copy {redacted(snapshot)} to this machine, then: {_serve(tracking_uri)}"
    return _serve(redacted(tracking_uri))


def ui_address(tracking_uri: str) -> str:
    """The address at which a browser finds the store once `ui_command` runs."""
    return redacted(tracking_uri).rstrip("/") if is_server(tracking_uri) else "http://127.0.0.1:5000"


def _serve(tracking_uri: str) -> str:
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)} --host 127.0.0.1"


def open_store(run: str, tracking_uri: str) -> MlflowClient:
    """`open_client` for the store of this run. The run's own database is prepared first (`own_database.prepare`).

    Raises StoreError as `open_client` does, and StageError if the run's object store does not answer.
    """
    if is_own(run, tracking_uri):
        prepare(run)
    return open_client(tracking_uri)


def require_answer(run: str) -> None:
    """Raises StoreError if `MLFLOW_TRACKING_URI`, or the database that a local run has, cannot be used for this run.

    Only reads: no database, folder or experiment is made. A database that is not there yet is checked by its folder,
    unless the run makes that folder. What only a plugin of MLflow can open is not checked.
    """
    own = fs.is_local(run) and is_own(run, tracking_uri_of(run))
    if not own and not os.environ.get("MLFLOW_TRACKING_URI"):
        return  # the run's own database in an object store
    uri = tracking_uri_of(run)
    try:
        if sqlite_file(uri) is not None:
            _look_into_sqlite(uri, run)
        elif uri.startswith(_DATABASES):
            _look_into_database(uri)
        elif is_server(uri) or uri.startswith("databricks"):
            open_client(uri)
        elif ("://" not in uri or uri.startswith("file:")) and not _folders_allowed():
            open_client(uri)  # a folder is refused; where it is allowed, this would make it
    except StoreError as error:
        where = error.where if own else f"MLFLOW_TRACKING_URI={redacted(uri)}"
        raise StoreError(where, error.problem, error.remedy) from None


def _folders_allowed() -> bool:
    return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")


def open_client(tracking_uri: str) -> MlflowClient:
    """A client whose store has answered. MLflow will not repeat failed requests by itself.

    Raises StoreError if the store cannot be opened or does not answer.
    """
    _set_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("alembic", "mlflow.store.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it would print a traceback and raise too
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
    except Exception as error:  # drivers raise types of their own: no database, permission or connection
        problem = f"cannot open the MLflow store ({type(error).__name__})"
        remedy = "check that it is reachable and writable, or unset MLFLOW_TRACKING_URI"
        raise StoreError(redacted(tracking_uri), problem, remedy) from None
    return client


def _set_environment() -> None:
    """Call this before MLflow is imported, because it reads some variables only once."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _no_folder_of_an_escaped_name(tracking_uri: str) -> Iterator[None]:
    """Remove the folder that MLflow makes because it does not unescape the address of an SQLite database."""
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
    """Why MLflow failed, in at most 300 characters and without a password."""
    if isinstance(error, InputError):
        return error.problem
    text = redacted(one_line(error, skip="(raised as a result"))
    for words in ("Connection refused", "Connection reset", "Connection aborted", "timed out", "Name or service"):
        if words in text:
            return f"the MLflow server does not answer ({words.lower()})"
    return text if len(text) <= 300 else text[:297] + "…"


def is_away(error: BaseException) -> bool:
    """Whether the error means that the store as a whole does not work, not only this request."""
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


def newest_trainings(children: Iterable[Run]) -> dict[tuple[str, str], Run]:
    """{(arm, seed): the newest child run}, of those children alone that share the settings of the arm's newest one.

    `children` come oldest first. So seeds that were trained with earlier settings are not averaged with later ones. A
    setting that one version of cardiomix logs and another does not is not compared.
    """
    oldest_first = list(children)
    last = {child.data.tags["arm"]: child for child in oldest_first}
    newest: dict[tuple[str, str], Run] = {}
    for child in oldest_first:
        arm, known = child.data.tags["arm"], last[child.data.tags["arm"]]
        pairs = [(child.data.params, known.data.params), (child.data.tags, known.data.tags)]
        names = [set(ours) & set(theirs) - {"seed"} for ours, theirs in pairs]
        names[1] &= set(FINGERPRINTS)
        if all(ours[n] == theirs[n] for (ours, theirs), own in zip(pairs, names, strict=True) for n in own):
            newest[arm, child.data.tags["seed"]] = child
    return newest


def _check_sqlite(tracking_uri: str) -> None:
    """Raises StoreError if an SQLite file cannot be written. MLflow would find out only after 100 seconds."""
    path = sqlite_file(tracking_uri)
    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StoreError(
            tracking_uri, "cannot open the MLflow store here", "give a writable file in an existing folder"
        )


def _look_into_sqlite(tracking_uri: str, run: str) -> None:
    """Raises StoreError if an SQLite file is none or cannot be written. It may be absent from a folder of the run."""
    path = sqlite_file(tracking_uri)
    if path is None:
        return
    made = Path(fs.local_path(run)).absolute() if fs.is_local(run) else None
    if not path.exists() and made is not None and path.absolute().parent in (made, *made.parents):
        return
    _check_sqlite(tracking_uri)
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:  # somebody writes to it at this moment
        return
    except sqlite3.DatabaseError as error:
        remedy = "move the file away, or name another"
        raise StoreError(tracking_uri, f"cannot open the MLflow store ({error})", remedy) from None


def _look_into_database(tracking_uri: str) -> None:
    """Raises StoreError if a database server does not answer. MLflow would find out only after 100 seconds."""
    _set_environment()
    from mlflow.store.db.utils import create_sqlalchemy_engine

    try:
        engine = create_sqlalchemy_engine(tracking_uri)  # with the certificates that MLflow's variables name
        engine.connect().close()
        engine.dispose()
    except Exception as error:  # drivers raise types of their own: no driver, no database, permission or connection
        problem = f"cannot open the MLflow store ({type(error).__name__})"
        remedy = "check that it is reachable, or give another tracking URI"
        raise StoreError(redacted(tracking_uri), problem, remedy) from None
