"""Writes objects only if nobody else has written them meanwhile, by S3's `If-Match` and `If-None-Match`.

These two conditions are S3's own, and those of the stores that speak its protocol. Other stores have such conditions
under other names, and are not supported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from storage import fs
from storage.errors import StageError

NOTE = "note"  # name of the metadata that `look` gives back
NOT_MET = (404, 409, 412)  # HTTP: object is gone, another writes it at this moment, another has written it
NOT_KNOWN = 501  # HTTP: the store has no such condition


class NoConditionsError(StageError):
    """The store refuses conditional writes as something that it does not have."""


@dataclass(frozen=True)
class Seen:
    """An object as the store describes it: its ETag, its note, and its age.

    `age_s` is the time since the object was written, in seconds, by the store's own clock, to within one second.
    """

    etag: str
    note: str
    age_s: float


def supported(uri: str) -> bool:
    """Whether the file system of `uri` has conditional writes at all. A server may still ignore the conditions."""
    with fs.remote(uri) as (store, _):
        return hasattr(store, "call_s3")


def look(uri: str) -> Seen | None:
    """Ask the store about an object; None if there is none.

    Raises StageError as `storage.fs` does, or if the answer has no date.
    """
    try:
        with fs.remote(uri) as (store, path):
            bucket, key, _ = store.split_path(path)
            answer = store.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if date is None:
        raise StageError(f"{fs.redacted(uri)}: the store's answers have no date, so that no lease can be judged")
    age = (parsedate_to_datetime(date) - answer["LastModified"]).total_seconds()
    return Seen(str(answer["ETag"]), str(answer.get("Metadata", {}).get(NOTE, "")), age)


def write(uri: str, note: str, match: str | None) -> str | None:
    """Write a small object with `note` (ASCII) as its content and its metadata; returns its ETag.

    The object is written only if the one that is there has the ETag `match`, or, for None, only if there is none.
    Otherwise nothing is written and None is returned. None may also mean that an earlier try succeeded and its answer
    was lost: `look` tells which. Raises NoConditionsError if the store says that it has none, and StageError as
    `storage.fs` does.
    """
    condition = {"IfNoneMatch": "*"} if match is None else {"IfMatch": match}
    with fs.remote(uri) as (store, path):
        try:
            return _put(store, path, note, condition)
        except OSError as error:
            if _not_met(error):
                return None
            if _status(error) != NOT_KNOWN:
                raise
    raise NoConditionsError(f"{fs.redacted(uri)}: the object store has no conditional writes")


def write_in_any_case(uri: str, note: str) -> str:
    """As `write`, without a condition, for stores that have none. Returns the object's ETag."""
    with fs.remote(uri) as (store, path):
        return _put(store, path, note, {})


def _put(store: Any, path: str, note: str, condition: dict[str, str]) -> str:
    bucket, key, _ = store.split_path(path)
    put = store.call_s3("put_object", Bucket=bucket, Key=key, Body=note.encode(), Metadata={NOTE: note}, **condition)
    return str(put["ETag"])


def remove(uri: str, match: str) -> None:
    """Remove an object if it has this ETag; otherwise nothing happens.

    Raises StageError if the store refuses, as one without conditional removal may.
    """
    with fs.remote(uri) as (store, path):
        bucket, key, _ = store.split_path(path)
        try:
            store.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=match)
        except OSError as error:
            if not _not_met(error):
                raise


def _not_met(error: OSError) -> bool:
    return _status(error) in NOT_MET and _answer(error).get("Error", {}).get("Code") != "NoSuchBucket"


def _status(error: OSError) -> Any:
    return _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _answer(error: OSError) -> dict[str, Any]:
    return getattr(error.__cause__, "response", None) or {}
