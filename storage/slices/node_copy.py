"""Subjects of a slice store that lies far away, copied to this node's disk when they are first read.

    <node folder>/<hash of the run's URI>-slices-<boot>/<subject>-<hash>/{image,mask}/…    the store's own files

A request to an object store takes tens of milliseconds whatever it asks for. Read slice by slice, an epoch would wait
that long for each image and again for each mask. A subject's four files come side by side instead, once for all
processes of a node, and every later slice of it is read from the disk. The subject's `frames.json` says what its arrays
were made from: a subject that was ingested anew has another hash, and another copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from storage import fs
from storage.errors import InputError
from storage.node_folder import boot, make_room, node_folder
from storage.sharded_array import FILES_OF_THREE

FRAMES, KINDS = "frames.json", ("image", "mask")
RESERVED = 256 * 2**20  # bytes for which room is made at once: looking at all copies takes long


class NodeCopy:
    """The copies of one store's subjects, for one process. Any number of threads and processes may use them.

    If the node has no room, subjects are read where they are.
    """

    def __init__(self, run: str, folder: str | None = None) -> None:
        self._key = f"{_hash(run.encode())}-slices-{boot()}"
        self._folder, self._room, self._full = folder, 0, fs.is_local(run)
        self._copies: dict[str, Path] = {}

    def of(self, subject: str) -> str:
        """Where to read the arrays of `subject`, the folder of a subject in the store.

        A copy of the folder on this node, which is made if it is absent. The folder itself, if it is local or lacks a
        file, or if the node has no room for a copy.
        """
        if self._full:
            return subject
        known = self._copies.get(subject)
        if known is not None and known.is_dir():
            return str(known)
        try:
            root = node_folder(self._folder)
            made_from = _hash(fs.read_bytes(fs.join(subject, FRAMES)))
            own = root / self._key / f"{fs.base_name(subject)}-{made_from}"
            if not own.is_dir():
                self._fetch(subject, root, own)
                os.utime(root / self._key)  # opened last
            self._copies[subject] = own
            return str(own)
        except FileNotFoundError:  # the reader says which file
            return subject
        except (InputError, OSError):
            self._full = True
            return subject

    def _fetch(self, subject: str, root: Path, own: Path) -> None:
        names = [f"{kind}/{file}" for kind in KINDS for file in FILES_OF_THREE]
        contents = fs.map_concurrently(subject, lambda name: fs.read_bytes(fs.join(subject, name)), names)
        size = sum(map(len, contents))
        own.parent.mkdir(exist_ok=True)
        if size > self._room:
            make_room(root, self._key, max(size, RESERVED))
            self._room = max(size, RESERVED)
        self._room -= size
        partial = own.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            for name, content in zip(names, contents, strict=True):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
            with suppress(OSError):  # another process was faster
                os.rename(partial, own)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
