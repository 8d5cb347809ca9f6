"""Local paths and fsspec URIs (`s3://bucket/run`), read and written one way.

A local write appears whole or not at all (temporary file, fsync, rename); an object store's PUT is atomic already.
Endpoint, credentials and retries are the driver's own settings (`AWS_ENDPOINT_URL`, `AWS_MAX_ATTEMPTS`,
`FSSPEC_S3_…`, `~/.config/fsspec`).

Of a remote place that is absent, functions say what they say of a local one. Where the store cannot be asked (it is
down, refuses us or gives up midway) they raise StageError, never InputError: that a subject could not be fetched is no
fact about the subject, and it must not be left out for that.
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
BEGINNING = 2**16  # bytes
REQUESTS = 16  # at a time
BLOCK = 2**21  # bytes fetched at once of a remote file: a header is in the first, a whole study in about ten
# fsspec would remember listings for ever, and forgetting them is not safe while another thread reads them.
NO_LISTINGS = {"use_listings_cache": False}
# Of a URI: what precedes its host, and its query, where signatures and tokens are.
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
    """The same place, named so that a process with another working directory finds it."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


_guards: dict[str, Callable[[], str]] = {}


def guard(place: str, check: Callable[[], str] | None) -> None:
    """Have `check` called before each write and removal at or below a remote place; None: no longer.

    `check` raises where this process may not write there any more. It returns its owner's name, which every object that
    is written keeps in its metadata.
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
    """A whole file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    with remote(uri) as (fs, path):
        return bytes(fs.cat_file(path))


def read_range(uri: str, start: int, end: int | None = None) -> bytes:
    """Bytes `start` to `end` of a file, or to its own end; fewer where it is shorter. -n is n bytes before its end.

    Raises FileNotFoundError, and OSError for a local file.
    """
    if not is_local(uri):
        with remote(uri) as (fs, path):
            return bytes(fs.cat_file(path, start=start, end=end))
    with local_path(uri).open("rb") as file:
        at = start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start)
        file.seek(at)
        return file.read() if end is None else file.read(end - at)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, atomically; folders above it are made. A local file is there after a power cut too."""
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
    """Have the names in a folder on disk, where its file system can, and this user may read it."""
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
    """A whole file as UTF-8, a leading byte-order mark dropped. Raises FileNotFoundError, UnicodeDecodeError."""
    return read_bytes(uri).decode("utf-8-sig")


def write_new(uri: str, data: bytes) -> None:
    """Write a remote file that is not to be there yet: FileExistsError if it is, where the store can tell."""
    with remote(uri) as (fs, path):
        try:
            fs.pipe_file(path, data, mode="create")
        except (NotImplementedError, TypeError, ValueError):
            fs.pipe_file(path, data)


def write_text(uri: str, text: str) -> None:
    """Write UTF-8, atomically."""
    write_bytes(uri, text.encode("utf-8"))


def remove(uri: str) -> None:
    """Remove a file or a folder with all below it; nothing happens if it is absent."""
    if not is_local(uri):
        if has_magic(uri):  # fsspec would remove whatever it matches
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
        return sorted(n for n in names if not (n.startswith(".") and n.endswith(".tmp")))
    try:
        with remote(uri) as (fs, path):
            found = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    # An object store may list the prefix itself as an entry of its own.
    names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in found if str(p).strip("/") != str(path).strip("/")]
    return sorted(names)


def map_concurrently(
    place: str, function: Callable[[A], B], items: Iterable[A], finished: Callable[[int], None] | None = None
) -> list[B]:
    """`function` of each item, in order: one after another for a local place, side by side for a remote one. `finished`
    hears in this thread, now and then, of how many items the results are there.

    A request to an object store takes tens of milliseconds whatever it asks, so that hundreds of folders listed one
    after another would take minutes. The first exception passes through, once no call is under way any more.
    """
    if is_local(place):
        return _collected(map(function, items), finished)
    with ThreadPoolExecutor(REQUESTS) as pool:
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
    """What changes when a file's content does: its size, time and beginning, or an object's size and ETag.

    Raises FileNotFoundError.
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
    """A file opened for reading, seekable. Raises FileNotFoundError, and OSError for a local file."""
    if is_local(uri):
        return local_path(uri).open("rb")
    with remote(uri) as (fs, path):
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(fs.open(path, "rb", block_size=BLOCK), uri)))


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
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
    with remote(uri):  # for its errors
        return FsspecStore.from_url(uri, storage_options=NO_LISTINGS, read_only=read_only)


class _RemoteFile(io.RawIOBase):
    """An open remote file of which a failed read is told as by the functions here: it does not look like damage."""

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
    """Raises where a guard of a place around `uri` does; the owner that the last of them names, None without any."""
    owner = None
    for place, check in list(_guards.items()):
        if uri == place or uri.startswith(f"{place}/"):
            owner = check()
    return owner


def _info(uri: str) -> dict[str, Any] | None:
    """What the store says of a remote file or folder; None if there is none. (fs.exists takes any failure for that.)"""
    try:
        with remote(uri) as (fs, path):
            return dict(fs.info(path))
    except FileNotFoundError:
        return None


@contextmanager
def remote(uri: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URI and the path inside it, for the body to call. Any number of threads may."""
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
    """A driver's exceptions, sorted: absence as it is, what is wrong with the URI as InputError, else StageError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError) as error:
        if "(NoSuchBucket)" in str(error.__cause__):
            raise InputError(redacted(uri), "there is no such bucket", "make it, or correct the name") from error
        raise
    except ValueError as error:
        raise InputError(redacted(uri), redacted(str(error)), "correct it") from error
    except Exception as error:  # botocore's, for one, have no base but this
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        remedy = "check its endpoint and the credentials, then give the same command again"
        raise StageError(f"{redacted(uri)}: the object store failed ({redacted(told)}); {remedy}") from error


def redacted(text: str) -> str:
    """A URI, or one line about one, without the credentials and queries of URIs in it."""
    return " ".join(_SECRET.sub("", text).split())
