"""Copies subjects of a remote slice store to this node's disk when they are first read.

    <node folder>/<hash of the run's URI>-slices-<boot>/<subject>-<hash>/{image,mask}/…    the store's own files

A request to an object store takes tens of milliseconds whatever it asks for. If an epoch read slice by slice, it would
wait that long for each image and again for each mask. Instead, a subject's four files are fetched side by side, once
for all processes of a node, and every later slice of it is read from the disk. The `<hash>` of a subject is that of its
`frames.json`, which says what the arrays were made from. So a subject that was ingested again has another copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from storage import fs
from storage.errors import InputError
from storage.node_folder import boot, make_room, node_folder
from storage.sharded_array import FILES_OF_THREE

FRAMES, KINDS = "frames.json", ("image", "mask")
RESERVED = 256 * 2**20  # bytes for which room is made at a time, since looking at all copies takes long


class NodeCopy:
    """This node's copies of the subjects of one store. Any number of threads and processes may use them.

    If the node has no room, subjects are read from the store.
    """

    def __init__(self, run: str, folder: str | None = None) -> None:
        self._key = f"{_hash(run.encode())}-slices-{boot()}"
        self._folder, self._room, self._full = folder, 0, fs.is_local(run)
        self._copies: dict[str, Path] = {}

    def of(self, subject: str) -> str:
        """The folder from which to read the arrays of `subject`, which is the subject's folder in the store.

        This is a copy on this node, which is made if it is absent. It is `subject` itself if that is local or lacks a
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
            os.utime(root / self._key)  # copies that were opened longest ago make room
            self._copies[subject] = own
            return str(own)
        except FileNotFoundError:  # reading from the store raises the error that names the file
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
            try:
                os.rename(partial, own)
            except OSError:
                if not own.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
