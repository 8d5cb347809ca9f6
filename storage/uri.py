"""Local paths and fsspec URIs (`s3://bucket/run`), read and written one way.

A local write appears whole or not at all (temporary file, fsync, rename); an object store's PUT is atomic already.
Remote settings, such as an endpoint, come from fsspec's own configuration (`FSSPEC_S3_ENDPOINT_URL`,
`~/.config/fsspec`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.errors import InputError

if TYPE_CHECKING:
    from zarr.abc.store import Store

FILE_SCHEME = "file://"


def is_local(uri: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return uri.startswith(FILE_SCHEME) or "://" not in uri


def local_path(uri: str) -> Path:
    """The path of a local URI. Raises InputError for a remote one."""
    if not is_local(uri):
        raise InputError(uri, "is not on this machine's disk", "give a local path here")
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


def exists(uri: str) -> bool:
    """Whether a file or folder (or any object under that prefix) is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = _remote(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = _remote(uri)
    return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, atomically; folders above it are made."""
    if not is_local(uri):
        fs, path = _remote(uri)
        fs.pipe_file(path, data)
        return
    target = local_path(uri)
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


def read_text(uri: str) -> str:
    """A whole file as UTF-8, a leading byte-order mark dropped. Raises FileNotFoundError, UnicodeDecodeError."""
    return read_bytes(uri).decode("utf-8-sig")


def write_text(uri: str, text: str) -> None:
    """Write UTF-8, atomically."""
    write_bytes(uri, text.encode("utf-8"))


def remove(uri: str) -> None:
    """Remove a file or a folder with all below it; nothing happens if it is absent."""
    if not is_local(uri):
        fs, path = _remote(uri)
        if fs.exists(path):
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
    fs, path = _remote(uri)
    try:
        found = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    # An object store may list the prefix itself as an entry of its own.
    names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in found if str(p).strip("/") != str(path).strip("/")]
    return sorted(names)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder (or a prefix with objects under it)."""
    if is_local(uri):
        return local_path(uri).is_dir()
    fs, path = _remote(uri)
    return bool(fs.isdir(path))


def stamp(uri: str) -> str:
    """What changes when a file's content does: its size and time, or an object's size and ETag.

    Raises FileNotFoundError.
    """
    if is_local(uri):
        status = local_path(uri).stat()
        return f"{status.st_size}:{status.st_mtime_ns}"
    fs, path = _remote(uri)
    info = fs.info(path)
    seen = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    return f"{info.get('size')}:{next((str(s) for s in seen if s is not None), '')}"


def open_binary(uri: str) -> BinaryIO:
    """A file opened for reading, seekable. Raises FileNotFoundError, OSError."""
    if is_local(uri):
        return local_path(uri).open("rb")
    fs, path = _remote(uri)
    handle: BinaryIO = fs.open(path, "rb")
    return handle


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    fs, path = _remote(uri)
    return int(fs.size(path))


def base_name(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def zarr_store(uri: str, read_only: bool) -> Store:
    """A Zarr store at `uri`."""
    from zarr.storage import FsspecStore, LocalStore

    if is_local(uri):
        return LocalStore(local_path(uri), read_only=read_only)
    _remote(uri)  # for its error
    return FsspecStore.from_url(uri, read_only=read_only)


def _remote(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path inside it, its listing cache emptied: other processes write too."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(uri)
    except ImportError as error:
        raise InputError(uri, f"no driver for it ({error})", "pip install 'cardiomix[s3]'") from error
    except ValueError as error:
        raise InputError(uri, str(error), "use a path or a scheme that fsspec knows, such as s3://") from error
    fs.invalidate_cache()
    return fs, str(path)
