"""Reads and writes local paths and fsspec URIs (`s3://bucket/run`) in the same way.

A local write appears whole or not at all (temporary file, fsync, rename); an object store's PUT is atomic already.
Endpoint, credentials and retries are the driver's own settings (`AWS_ENDPOINT_URL`, `AWS_MAX_ATTEMPTS`, `FSSPEC_S3_…`,
`~/.config/fsspec`).

A missing remote file raises the same error as a missing local file. If the store cannot be asked (it is down, refuses
us or gives up midway), functions raise StageError, never InputError. Otherwise a subject that could not be fetched
would be left out as if its files were bad.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from storage.errors import InputError, StageError

if TYPE_CHECKING:
    from zarr.abc.store import Store

A = TypeVar("A")
B = TypeVar("B")

FILE_SCHEME = "file://"
BEGINNING = 2**16  # bytes of a file that its change stamp covers
REQUESTS = 16  # to a store at a time
BLOCK = 2**21  # bytes of a remote file a request: the first block has the header, about ten hold a study
# fsspec would keep listings for ever, and it is not safe to clear them while another thread reads them.
NO_LISTINGS = {"use_listings_cache": False}
# The parts of a URI with secrets: what precedes the host, and the query, which may have signatures and tokens.
_SECRET = re.compile(r"(?<=://)[^/\s]*@|\?[^\s\"')]*")


def is_local(uri: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return uri.startswith(FILE_SCHEME) or "://" not in uri


def local_path(uri: str) -> Path:
    """The path of a local URI. Raises InputError for a remote one."""
    if not is_local(uri):
        raise InputError(redacted(uri), "is not on this machine's disk", "give a local path here")
    return Path(uri.removeprefix(FILE_SCHEME))


def join(base: str, *parts: str) -> str:
    """`base/part/part`, for paths and URIs alike; an empty base is the current folder."""
    pieces = [p.strip("/") for p in parts if p.strip("/")]
    if not base:
        return "/".join(pieces)
    root = base.rstrip("/")
    if not root or root.endswith(":"):  # "/" or "memory://": the slashes belong to it
        return base + "/".join(pieces)
    return "/".join([root, *pieces])


def absolute(uri: str) -> str:
    """A local path made absolute, so that a process with another working directory finds it.

    A remote URI only loses a slash at its end.
    """
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


_guards: dict[str, Callable[[], str]] = {}


def guard(place: str, check: Callable[[], str] | None) -> None:
    """Call `check` before each write and removal at or below a remote place. If it is None, no longer do so.

    `check` raises if this process must not write there any more. Otherwise it returns its owner's name, which every
    object that is written keeps in its metadata.
    """
    if check is None:
        _guards.pop(place, None)
    else:
        _guards[place] = check


def exists(uri: str) -> bool:
    """Whether a file or folder (or any object under that prefix) is there."""
    if is_local(uri):
        return local_path(uri).exists()
    return _info(uri) is not None


def read_bytes(uri: str) -> bytes:
    """Read a whole file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    with remote(uri) as (fs, path):
        return bytes(fs.cat_file(path))


def read_range(uri: str, start: int, end: int | None = None) -> bytes:
    """Read the bytes from `start` to `end` (exclusive), or to the end of the file if `end` is None.

    A negative `start` counts from the end. If the file is shorter, fewer bytes come. Raises FileNotFoundError, and for
    a local file any OSError.
    """
    if not is_local(uri):
        with remote(uri) as (fs, path):
            return bytes(fs.cat_file(path, start=start, end=end))
    with local_path(uri).open("rb") as file:
        at = start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start)
        file.seek(at)
        return file.read() if end is None else file.read(end - at)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, atomically; folders above it are made.

    A local file is synced to disk, so that it outlasts a power cut.
    """
    if not is_local(uri):
        owner = _ask_guards(uri)
        with remote(uri) as (fs, path):
            fs.pipe_file(path, data, **({"Metadata": {"owner": owner}} if owner else {}))
        return
    target = local_path(uri)
    made = list(takewhile(lambda folder: not folder.exists(), target.parents))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for folder in (target.parent, *(folder.parent for folder in made)):
        _sync(folder)


def _sync(folder: Path) -> None:
    """Sync the names in a folder to disk, if its file system can do so and this user may read the folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def read_text(uri: str) -> str:
    """Read a whole file as UTF-8, without a byte-order mark. Raises FileNotFoundError, UnicodeDecodeError."""
    return read_bytes(uri).decode("utf-8-sig")


def write_new(uri: str, data: bytes) -> None:
    """Write a remote file that must not be there yet. Raises FileExistsError if it is.

    A store without exclusive writes replaces the file instead.
    """
    with remote(uri) as (fs, path):
        try:
            fs.pipe_file(path, data, mode="create")
        except (NotImplementedError, TypeError, ValueError):
            fs.pipe_file(path, data)


def write_text(uri: str, text: str) -> None:
    """Write UTF-8, atomically."""
    write_bytes(uri, text.encode("utf-8"))


def remove(uri: str) -> None:
    """Remove a file, or a folder with all below it; nothing happens if it is absent.

    Raises InputError for a remote name with one of * ? [ in it.
    """
    if not is_local(uri):
        if has_magic(uri):  # fsspec would remove all that matches
            raise InputError(redacted(uri), "has one of * ? [ in its name, so it is not removed", "name it without")
        _ask_guards(uri)
        with suppress(FileNotFoundError), remote(uri) as (fs, path):
            fs.rm(path, recursive=True)
        return
    target = local_path(uri)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def list_names(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; empty if the folder is absent. Unfinished writes are not shown."""
    if is_local(uri):
        folder = local_path(uri)
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    else:
        try:
            with remote(uri) as (fs, path):
                found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        # An object store may list the prefix itself as an entry of its own.
        names = [base_name(str(p)) for p in found if str(p).strip("/") != str(path).strip("/")]
    return sorted(n for n in names if not (n.startswith(".") and n.endswith(".tmp")))


def map_concurrently(
    place: str,
    function: Callable[[A], B],
    items: Iterable[A],
    finished: Callable[[int], None] | None = None,
    computes: bool = False,
) -> list[B]:
    """Call `function` with each item. Returns the results in order, or raises the first exception once all calls ended.

    A remote place has up to 16 calls at a time, since a request takes tens of milliseconds. A local place has one; with
    `computes` (such as hashing) one for each CPU, up to 16. `finished` is called in this thread with the number done.
    """
    at_once = min(REQUESTS, len(os.sched_getaffinity(0)) if computes else 1) if is_local(place) else REQUESTS
    if at_once == 1:
        return _collected(map(function, items), finished)
    with ThreadPoolExecutor(at_once) as pool:
        return _collected(pool.map(function, items), finished)


def _collected(results: Iterable[B], finished: Callable[[int], None] | None) -> list[B]:
    collected = []
    for result in results:
        collected.append(result)
        if finished is not None:
            finished(len(collected))
    return collected


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder (or a prefix with objects under it)."""
    if is_local(uri):
        return local_path(uri).is_dir()
    info = _info(uri)
    return info is not None and info["type"] == "directory"


def change_stamp(uri: str) -> str:
    """A text that changes when a file's content changes: size, time and a checksum of its beginning.

    For an object it is the size and the ETag, or the time if there is no ETag. Raises FileNotFoundError.
    """
    if is_local(uri):
        with local_path(uri).open("rb") as file:
            status, beginning = os.fstat(file.fileno()), file.read(BEGINNING)
        return f"{status.st_size}:{status.st_mtime_ns}:{zlib.crc32(beginning):08x}"
    with remote(uri) as (fs, path):
        info = fs.info(path)
    seen = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    return f"{info.get('size')}:{next((str(s) for s in seen if s is not None), '')}"


def open_binary(uri: str) -> BinaryIO:
    """Open a file for reading; it is seekable. Raises FileNotFoundError, and for a local file any OSError."""
    if is_local(uri):
        return local_path(uri).open("rb")
    with remote(uri) as (fs, path):
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(fs.open(path, "rb", block_size=BLOCK), uri)))


def size(uri: str) -> int:
    """The size of a file in bytes. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    with remote(uri) as (fs, path):
        return int(fs.size(path))


def base_name(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def zarr_store(uri: str, read_only: bool) -> Store:
    """A Zarr store at `uri`."""
    from zarr.storage import FsspecStore, LocalStore

    if is_local(uri):
        return LocalStore(local_path(uri), read_only=read_only)
    if not read_only:
        _ask_guards(uri)
    with remote(uri):  # translates the driver's errors
        return FsspecStore.from_url(uri, storage_options=NO_LISTINGS, read_only=read_only)


class _RemoteFile(io.RawIOBase):
    """An open remote file. A failed read raises the errors of this module, so that it does not look like damage."""

    def __init__(self, file: BinaryIO, uri: str) -> None:
        self._file, self._uri = file, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        with _failures(self._uri):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _ask_guards(uri: str) -> str | None:
    """Call the guards of all places around `uri`. Raises what they raise.

    Returns the owner that the last of them names, None if there is no guard.
    """
    owner = None
    for place, check in list(_guards.items()):
        if uri == place or uri.startswith(f"{place}/"):
            owner = check()
    return owner


def _info(uri: str) -> dict[str, Any] | None:
    """What the store says of a remote file or folder; None if there is none. (fsspec's `exists` hides failures.)"""
    try:
        with remote(uri) as (fs, path):
            return dict(fs.info(path))
    except FileNotFoundError:
        return None


@contextmanager
def remote(uri: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URI and the path inside it, for the body of a `with` statement to call.

    Any number of threads may use it. Exceptions of the driver are translated as `_failures` says. Raises InputError for
    a URI that cannot be used.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(uri, **NO_LISTINGS)
    except ImportError as error:
        raise InputError(redacted(uri), f"no driver for it ({error})", "pip install 'cardiomix[s3]'") from error
    except ValueError as error:
        remedy = "use a path or a scheme that fsspec knows, such as s3://"
        raise InputError(redacted(uri), redacted(str(error)), remedy) from error
    with _failures(uri):
        yield fs, str(path)


@contextmanager
def _failures(uri: str) -> Iterator[None]:
    """Translate a driver's exceptions. Absence stays as it is.

    A fault of the URI, such as a bucket that does not exist, becomes an InputError; everything else becomes a
    StageError.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError) as error:
        if "(NoSuchBucket)" in str(error.__cause__):
            raise InputError(redacted(uri), "there is no such bucket", "make it, or correct the name") from error
        raise
    except ValueError as error:
        raise InputError(redacted(uri), redacted(str(error)), "correct it") from error
    except Exception as error:  # botocore's errors, for one, have no other common base
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        remedy = "check its endpoint and the credentials, then give the same command again"
        raise StageError(f"{redacted(uri)}: the object store failed ({redacted(told)}); {remedy}") from error


def redacted(text: str) -> str:
    """A URI, or a text about one, on one line and without the credentials and queries of its URIs."""
    return " ".join(_SECRET.sub("", text).split())
