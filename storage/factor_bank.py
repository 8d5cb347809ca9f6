"""The factor bank: SDNet's factors of every training slice, one byte a pixel; enough by itself to make FA samples.

    <bank>/zarr.json                 Zarr v3 group; its attributes say what the bank is. Written last at creation
    <bank>/anatomy, mask             (N, H, W) uint8; a shard is `shard_slices` rows, a chunk one slice
    <bank>/modality                  (N, modality_size) float32; a chunk is `shard_slices` rows
    <bank>/index.parquet             `BANK_INDEX_SCHEMA`, one row a slice
    <bank>/decoder.safetensors, decoder.json
    <bank>/ledger/shard-00000.json   that shard counts (see `storage.ledger`)

Specified in docs/bank-format.md. Rows are written and read a whole shard at a time: one writer a shard, and never fancy
indexing into shards, which costs Zarr many times more than a contiguous read.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from pydantic import ValidationError
from zarr.codecs import BloscCodec

from storage import ledger, uri
from storage.bank_spec import (
    ARRAYS,
    BANK_INDEX_SCHEMA,
    FORMAT,
    INDEX,
    OURS,
    ROOT,
    VERSION,
    WEIGHTS,
    WEIGHTS_CONFIG,
    BankSpec,
    as_json,
    code_version,
    in_schema,
    index_digest,
    read_attributes,
    read_index,
    sha256,
)
from storage.errors import InputError

__all__ = ["BANK_INDEX_SCHEMA", "BankSpec", "FactorBank", "PackedBank", "index_digest"]


@dataclass(frozen=True)
class PackedBank:
    """Rows of a bank in memory: anatomy (n, H, W) uint8, channel c in bit c; mask (n, H, W) uint8, LV 1, MYO 2, RV 3,
    zeros where not labelled; modality (n, modality_size) float32."""

    anatomy: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    modality: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.anatomy)


class FactorBank:
    """A bank at a local path or an fsspec URI. Make one with `create` or `open`."""

    def __init__(self, bank: str, spec: BankSpec, index: pa.Table, attributes: Mapping[str, Any]) -> None:
        self.uri = bank
        self.spec = spec
        self.index = index
        self._attributes = attributes

    @classmethod
    def create(
        cls, bank: str, spec: BankSpec, index: pa.Table, decoder: bytes, decoder_config: Mapping[str, Any]
    ) -> FactorBank:
        """An empty bank, or the one that is there already if it is the same.

        Args: index, one row a slice, with the columns of `BANK_INDEX_SCHEMA`; decoder, safetensors bytes;
        decoder_config, what builds the network they fit. A creation that was cut short is done again.
        Raises InputError if the place holds another bank or something else.
        """
        index = in_schema(index)
        if uri.exists(uri.join(bank, ROOT)):
            found = cls.open(bank, partial=True)
            found._require_same(spec, index)
            return found
        _clear_unfinished(bank)
        config = as_json(decoder_config)
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            **spec.model_dump(mode="json"),
            "slices": index.num_rows,
            "index_sha256": index_digest(index),
            "decoder_sha256": sha256(decoder, config.encode()),
        }
        out = io.BytesIO()
        pq.write_table(index, out, compression="zstd")
        uri.write_bytes(uri.join(bank, INDEX), out.getvalue())
        uri.write_bytes(uri.join(bank, WEIGHTS), decoder)
        uri.write_text(uri.join(bank, WEIGHTS_CONFIG), config)
        for name in ARRAYS:
            _create_array(uri.join(bank, name), name, spec, index.num_rows)
        zarr.create_group(uri.zarr_store(bank, read_only=False), zarr_format=3, attributes=attributes)
        return cls(bank, spec, index, attributes)

    @classmethod
    def open(cls, bank: str, partial: bool = False) -> FactorBank:
        """Open a bank. Raises InputError if it is absent, not ours, damaged, of an unknown version, or not complete.

        With `partial`, missing shards are no error; they are when they are read.
        """
        name = uri.base_name(bank)
        attributes = read_attributes(bank)
        try:
            spec = BankSpec(**attributes)
        except (ValidationError, TypeError) as error:
            raise InputError(name, "its attributes are damaged", "restore zarr.json, or extract again") from error
        index = read_index(bank, attributes)
        found = cls(bank, spec, index, attributes)
        for array in ARRAYS:
            found._array(array)
        missing = found.shards() - len(found.committed())
        if missing and not partial:
            raise InputError(
                name,
                f"is not complete: {missing} of {found.shards()} shards are missing",
                "run `cardiomix extract` to its end",
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorBank.open, (self.uri, True)  # other processes open their own

    def __len__(self) -> int:
        return int(self.index.num_rows)

    def shards(self) -> int:
        """How many shards the bank has when it is complete."""
        return -(-len(self) // self.spec.shard_slices)

    def shard_rows(self, shard: int) -> range:
        """The rows of a shard; the last one may have fewer. Raises IndexError."""
        if not 0 <= shard < self.shards():
            raise IndexError(f"shard {shard} of {self.shards()}")
        start = shard * self.spec.shard_slices
        return range(start, min(start + self.spec.shard_slices, len(self)))

    def committed(self) -> set[int]:
        """Shards whose ledger entry is there and is about this bank's rows and network; read anew at each call."""
        return {k for k, entry in ledger.committed(self.uri).items() if self._vouches(k, entry)}

    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.committed()) == self.shards()

    def write_shard(
        self,
        shard: int,
        anatomy: npt.NDArray[np.uint8],
        modality: npt.NDArray[np.float32],
        mask: npt.NDArray[np.uint8],
    ) -> None:
        """Write one whole shard, then its ledger entry. Any number of attempts leave the same files.

        Shapes and types as in `PackedBank`, for all rows of the shard. Raises ValueError if they are not.
        """
        rows = self.shard_rows(shard)
        data: dict[str, npt.NDArray[Any]] = {"anatomy": anatomy, "mask": mask, "modality": modality}
        for name, values in data.items():
            shape, dtype = (len(rows), *_row_shape(name, self.spec)), _dtype(name)
            if values.shape != shape or values.dtype != dtype:
                raise ValueError(f"{name} of shard {shard} is {values.dtype} {values.shape}, not {dtype} {shape}")
        if not np.isfinite(modality).all():
            raise ValueError(f"modality of shard {shard} is not finite")
        ledger.retract(self.uri, shard)
        for name, values in data.items():
            # An attempt that was killed may have left a file, whole or not, that Zarr would read back and merge into.
            folder = uri.join(self.uri, name, "c", str(shard))
            uri.remove(folder)
            self._array(name, writable=True)[rows.start : rows.stop] = values
            _flush(folder)
        hashes = {name: ledger.array_sha256(values) for name, values in data.items()}
        entry = ledger.Entry(rows.start, rows.stop, hashes, self.spec.sdnet_fingerprint, code_version())
        ledger.commit(self.uri, shard, entry)

    def read_shard(self, shard: int) -> PackedBank:
        """One whole shard, its bytes checked against the ledger. Raises InputError if it is missing or damaged."""
        rows = self.shard_rows(shard)
        where = f"{uri.base_name(self.uri)}, shard {shard}"
        entry = ledger.read_entry(self.uri, shard)
        if entry is None or not self._vouches(shard, entry):
            raise InputError(where, "is not in the ledger", "run `cardiomix extract` to its end")
        data = {}
        for name in ARRAYS:
            remedy = f"remove ledger/shard-{shard:05d}.json and run `cardiomix extract`, or restore the bank's copy"
            try:
                data[name] = np.asarray(self._array(name)[rows.start : rows.stop])
            except Exception as error:  # what a damaged chunk raises depends on which of its bytes were hit
                raise InputError(where, f"its {name} cannot be read ({type(error).__name__})", remedy) from error
            if ledger.array_sha256(data[name]) != entry.sha256.get(name):
                raise InputError(where, f"its {name} is not what the ledger says", remedy)
        return PackedBank(**data)

    def read(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> PackedBank:
        """The given rows in the given order, repeats allowed; every shard is read once, whole. Raises IndexError."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a bank of {len(self)}")
        out = self._empty(len(wanted))
        shard_of = wanted // self.spec.shard_slices
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            found, at = self.read_shard(int(shard)), wanted[here] - int(shard) * self.spec.shard_slices
            for name in ARRAYS:
                getattr(out, name)[here] = getattr(found, name)[at]
        return out

    def load(self) -> PackedBank:
        """The whole bank: 2 · N · H · W bytes and a little. Raises InputError if a shard is missing or damaged."""
        return self.read(np.arange(len(self)))

    def decoder(self) -> tuple[bytes, dict[str, Any]]:
        """The decoder's weights (safetensors) and configuration. Raises InputError if they are missing or damaged."""
        where, remedy = uri.base_name(self.uri), f"restore {WEIGHTS} and {WEIGHTS_CONFIG}"
        try:
            weights = uri.read_bytes(uri.join(self.uri, WEIGHTS))
            config = uri.read_bytes(uri.join(self.uri, WEIGHTS_CONFIG))
        except FileNotFoundError as error:
            raise InputError(where, "its decoder is missing", remedy) from error
        if sha256(weights, config) != self._attributes["decoder_sha256"]:
            raise InputError(where, "its decoder is not the one it was made with", remedy)
        return weights, dict(json.loads(config))

    @property
    def fingerprint(self) -> str:
        """Names the content: 16 hex digits of SHA-256 over identity, index, decoder and the ledger's checksums."""
        entries = ledger.committed(self.uri)
        content = {
            "spec": self.spec.identity(),
            "index": self._attributes["index_sha256"],
            "decoder": self._attributes["decoder_sha256"],
            "shards": [[k, dict(entries[k].sha256)] for k in sorted(entries) if self._vouches(k, entries[k])],
        }
        return sha256(as_json(content).encode())[:16]

    def verify(self) -> list[str]:
        """Everything that is wrong, one line each; empty if the bank is whole and every byte is as the ledger says."""
        problems = []
        if index_digest(self.index) != self._attributes["index_sha256"]:
            problems.append("index.parquet is not the index that the bank was made with")
        checks: list[Callable[[], object]] = [self.decoder]
        checks += [lambda k=k: self.read_shard(k) for k in range(self.shards())]  # type: ignore[misc]
        for check in checks:
            try:
                check()
            except InputError as error:
                problems.append(str(error))
        for name in sorted(set(uri.list_names(self.uri)) - OURS):
            problems.append(f"{name} does not belong in a bank; move it elsewhere")
        problems += [f"ledger: shard {k} is beyond the bank's {self.shards()}" for k in self._beyond()]
        return problems

    def tidy(self) -> None:
        """Remove what killed writers left of unfinished files; call it only while nobody writes."""
        if uri.is_local(self.uri):  # an object store has no unfinished objects
            for pattern in ("*.partial", ".*.tmp"):  # Zarr's and ours
                for path in uri.local_path(self.uri).rglob(pattern):
                    path.unlink(missing_ok=True)

    def _beyond(self) -> list[int]:
        return sorted(k for k in ledger.committed(self.uri) if k >= self.shards())

    def _vouches(self, shard: int, entry: ledger.Entry) -> bool:
        if not 0 <= shard < self.shards() or entry.sdnet_fingerprint != self.spec.sdnet_fingerprint:
            return False
        return range(entry.start, entry.stop) == self.shard_rows(shard)

    def _require_same(self, spec: BankSpec, index: pa.Table) -> None:
        """Raises InputError, naming what differs, unless this bank is what `create` was asked for."""
        name, elsewhere = uri.base_name(self.uri), "name another bank, or remove this one to extract it again"
        ours, theirs = self.spec.identity(), spec.identity()
        if ours["sdnet_fingerprint"] != theirs["sdnet_fingerprint"]:
            problem = f"was made with SDNet {ours['sdnet_fingerprint']}, not {theirs['sdnet_fingerprint']}"
            raise InputError(name, problem, elsewhere)
        if not self.index.equals(index):
            raise InputError(name, "holds other slices than this run's training slices", elsewhere)
        for key in ours:
            if ours[key] != theirs[key]:
                raise InputError(name, f"its {key} is {ours[key]}, not {theirs[key]}", elsewhere)

    def _empty(self, n: int) -> PackedBank:
        arrays = {name: np.empty((n, *_row_shape(name, self.spec)), dtype=_dtype(name)) for name in ARRAYS}
        return PackedBank(**arrays)

    @cached_property
    def _opened(self) -> dict[tuple[str, bool], zarr.Array[Any]]:
        return {}

    def _array(self, name: str, writable: bool = False) -> zarr.Array[Any]:
        """One of the arrays, checked against the attributes when it is first opened. Raises InputError."""
        if (name, writable) not in self._opened:
            where = f"{uri.base_name(self.uri)}, {name}"
            try:
                store = uri.zarr_store(uri.join(self.uri, name), read_only=not writable)
                array = zarr.open_array(store, mode="r+" if writable else "r")
            except Exception as error:  # absent or damaged metadata raises almost anything
                raise InputError(where, "is missing or damaged", "restore its zarr.json, or extract again") from error
            shape = (len(self), *_row_shape(name, self.spec))
            if array.shape != shape or array.dtype != _dtype(name):
                problem = f"is {array.dtype} {array.shape}, the bank's attributes and index say {shape}"
                raise InputError(where, problem, "restore the bank's copy, or extract again")
            self._opened[name, writable] = array
        return self._opened[name, writable]


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if name == "modality" else np.uint8)


def _row_shape(name: str, spec: BankSpec) -> tuple[int, ...]:
    return (spec.modality_size,) if name == "modality" else spec.canvas


def _create_array(path: str, name: str, spec: BankSpec, rows: int) -> None:
    row, shard = _row_shape(name, spec), spec.shard_slices
    flat = name == "modality"  # a shard of it is 2 KB: chunks within it would only add an index
    zarr.create_array(
        store=uri.zarr_store(path, read_only=False),
        shape=(rows, *row),
        dtype=_dtype(name),
        chunks=(shard if flat else 1, *row),
        shards=None if flat else (shard, *row),
        compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        fill_value=float("nan") if flat else 0,
        zarr_format=3,
        dimension_names=("row", "factor") if flat else ("row", "y", "x"),
    )


def _clear_unfinished(bank: str) -> None:
    """Remove what a creation that was cut short left. Raises InputError if there is anything else, which is kept."""
    if not uri.exists(bank):
        return
    if not uri.is_folder(bank) or set(uri.list_names(bank)) - OURS:
        raise InputError(uri.base_name(bank), "is there and is not a factor bank", "name a new folder for the bank")
    uri.remove(bank)


def _flush(folder: str) -> None:
    """Bring a shard's files to the disk before the ledger says that they are there."""
    if uri.is_local(folder):
        for path in uri.local_path(folder).rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
