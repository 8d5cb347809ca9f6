"""Objects that are written only if nobody else has written them meanwhile: S3's `If-Match` and `If-None-Match`.

The two conditions are S3's own and those of the stores that speak its protocol. Other stores have such conditions under
other names, and are not supported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from storage import fs
from storage.errors import StageError

NOTE = "note"  # the metadata that `look` gives back
NOT_MET = (404, 409, 412)  # HTTP: gone, written by another at this moment, written by another


@dataclass(frozen=True)
class Seen:
    """An object as the store describes it: its ETag, its note, and the seconds since it was written, by the store's own
    clock, to within one second."""

    etag: str
    note: str
    age_s: float


def supported(uri: str) -> bool:
    """Whether the file system of `uri` has conditional writes at all. A server may still ignore the conditions."""
    with fs.remote(uri) as (store, _):
        return hasattr(store, "call_s3")


def look(uri: str) -> Seen | None:
    """What the store says of an object; None if there is none. Raises StageError as `storage.fs` does."""
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
    """Write a small object, of which `note` (ASCII) is content and metadata; returns its ETag.

    Only if the object that is there has the ETag `match`; None: only if there is none. Otherwise nothing is written and
    None is returned. None may also mean that the answer to an earlier try was lost: `look` tells.
    """
    condition = {"IfNoneMatch": "*"} if match is None else {"IfMatch": match}
    with fs.remote(uri) as (store, path):
        bucket, key, _ = store.split_path(path)
        try:
            put = store.call_s3(
                "put_object", Bucket=bucket, Key=key, Body=note.encode(), Metadata={NOTE: note}, **condition
            )
        except OSError as error:
            if _not_met(error):
                return None
            raise
    return str(put["ETag"])


def remove(uri: str, match: str) -> None:
    """Remove an object that has this ETag; nothing happens if it has another. A store that has no conditional removal
    may refuse it, which raises StageError."""
    with fs.remote(uri) as (store, path):
        bucket, key, _ = store.split_path(path)
        try:
            store.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=match)
        except OSError as error:
            if not _not_met(error):
                raise


def _not_met(error: OSError) -> bool:
    answer = getattr(error.__cause__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in NOT_MET and answer.get("Error", {}).get("Code") != "NoSuchBucket"
