"""The factor bank: SDNet's factors of every training slice, one byte a pixel; enough by itself to make FA samples.

    <bank>/zarr.json                 Zarr v3 group; its attributes say what the bank is. Written once, last at creation
    <bank>/anatomy, mask             (N, H, W) uint8; a shard is `shard_slices` rows, a chunk one slice
    <bank>/modality                  (N, modality_size) float32; a chunk is `shard_slices` rows
    <bank>/index.parquet             `BANK_INDEX_SCHEMA`, one row a slice; its rows are the bank's
    <bank>/decoder.safetensors, decoder.json
    <bank>/ledger/shard-00000.json   that shard counts (see `storage.bank.ledger`)
    <bank>/manifest.json             every shard counts: the whole ledger in one file
    <bank>/styles/….parquet          modality vectors of other banks (see `storage.bank.styles`)

Specified in docs/bank-format.md. Rows are written and read a whole shard at a time: one writer a shard, and never fancy
indexing into shards, which costs Zarr many times more than a contiguous read. For reading slices at random see
`storage.bank.node_cache.BankView`; for what may be wrong with a bank, `storage.bank.verify`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import fs
from storage.bank import ledger
from storage.bank.arrays import (
    ARRAYS,
    check_metadata,
    decoded_rows,
    dtype,
    row_shape,
    shard_uri,
    write_metadata,
)
from storage.bank.index import (
    BANK_INDEX_SCHEMA,
    append_missing_slices,
    read_index,
    require_on_canvas,
    row_digests,
    rows_where,
    validated_index,
    write_index,
)
from storage.bank.shard_builder import ShardDraft
from storage.bank.spec import (
    INDEX,
    ROOT,
    STYLES,
    WEIGHTS,
    WEIGHTS_CONFIG,
    BankSpec,
    as_json,
    read_root,
    require_same_network,
    root_document,
    sha256,
)
from storage.errors import InputError
from storage.parquet import different_texts

__all__ = ["ARRAYS", "BANK_INDEX_SCHEMA", "BankSpec", "FactorBank", "PackedBank"]

KNOWN_FILES = frozenset({ROOT, INDEX, WEIGHTS, WEIGHTS_CONFIG, STYLES, ledger.FOLDER, ledger.MANIFEST, *ARRAYS})


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
    """A bank at a local path or an fsspec URI. Make one with `create` or `open`.

    Its index is that of the time when it was opened, and so is its ledger once it has been seen complete.
    `decoder_sha256` is over the decoder's weights and configuration, as the bank records it.
    """

    def __init__(self, bank: str, spec: BankSpec, index: pa.Table, index_sha256: str, decoder_sha256: str) -> None:
        self.uri = bank
        self.spec = spec.model_copy(update={"terms": tuple(different_texts(index["terms"]))})
        self.index = index
        self._index_sha256, self.decoder_sha256 = index_sha256, decoder_sha256
        self._whole: ledger.Manifest | None = None

    @classmethod
    def create(
        cls, bank: str, spec: BankSpec, index: pa.Table, decoder: bytes, decoder_config: Mapping[str, Any]
    ) -> FactorBank:
        """An empty bank; or the one that is there already, if it is of the same network, extended by what it lacks.

        Args: index, one row a slice, with the columns of `BANK_INDEX_SCHEMA`; decoder, safetensors bytes;
        decoder_config, what builds the network they fit. A creation that was cut short is done again.
        Raises InputError if the place holds another bank (see `append`) or something else.
        """
        index, config = validated_index(index), as_json(decoder_config)
        if fs.exists(fs.join(bank, ROOT)):
            found = cls.open(bank, partial=True)
            require_same_network(found.spec, spec, fs.base_name(bank))
            return found.append(index)
        _clear_unfinished(bank)
        digest = sha256(decoder, config.encode())
        index_sha256 = write_index(bank, index)
        fs.write_bytes(fs.join(bank, WEIGHTS), decoder)
        fs.write_text(fs.join(bank, WEIGHTS_CONFIG), config)
        for name in ARRAYS:
            write_metadata(bank, name, spec, index.num_rows)
        fs.write_text(fs.join(bank, ROOT), root_document(spec, digest))
        return cls(bank, spec, index, index_sha256, digest)

    @classmethod
    def open(cls, bank: str, partial: bool = False) -> FactorBank:
        """Open a bank. Raises InputError if it is absent, not ours, damaged, of an unknown version, or not complete.

        With `partial`, missing shards are no error; they are when they are read.
        """
        spec, decoder = read_root(bank)
        found = cls(bank, spec, *read_index(bank), decoder)
        require_on_canvas(found.index, spec.canvas, fs.base_name(bank))
        for name in ARRAYS:
            check_metadata(bank, name, spec, len(found))
        if not partial and not found.is_complete():
            missing = found.shards() - len(found.committed())
            raise InputError(
                fs.base_name(bank),
                f"is not complete: {missing} of {found.shards()} shards are missing",
                "run `cardiomix extract` to its end",
            )
        return found

    def append(self, index: pa.Table) -> FactorBank:
        """This bank with the slices of `index` that it lacks after its own; itself if it lacks none.

        `index` has a row for every slice that the bank is to hold, its own included, in any order; row, top and left
        do not count, the images are centred on the bank's canvas. Shards that are committed stay, but for a last one
        that was not full: its rows count as missing until it is written again. Killed at any point, the bank is the
        old one or the new one. Call it only while nobody else writes.
        Raises InputError if `index` lacks a slice of the bank or has changed one, or if a new one is too large.
        """
        wanted = append_missing_slices(self.index, validated_index(index), self.spec.canvas, fs.base_name(self.uri))
        if wanted.num_rows == len(self):
            return self
        for name in ARRAYS:  # longer than the index says for a moment, which readers allow
            write_metadata(self.uri, name, self.spec, wanted.num_rows)
        return FactorBank(self.uri, self.spec, wanted, write_index(self.uri, wanted), self.decoder_sha256)

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
        """Shards whose ledger entry is there and is about this bank's rows and network; read anew at each call, the
        manifest left out."""
        return set(self._ledger())

    def is_committed(self, shard: int) -> bool:
        """Whether one shard is committed; read anew at each call."""
        entry = ledger.read_entry(self.uri, shard)
        return entry is not None and self._entry_matches(shard, entry)

    def is_complete(self) -> bool:
        """Whether every shard is committed. Read until it is so, and never again."""
        return self._seen_whole() is not None

    def is_sealed(self) -> bool:
        """Whether the manifest is there, and the ledger has a file for every shard: asked without reading these."""
        found = self._manifest()
        return found is not None and set(found.entries) <= ledger.listed(self.uri)

    def seal(self) -> None:
        """Write the manifest of a bank whose ledger is complete, from that ledger; else nothing happens. Call it only
        while nobody else writes."""
        whole = self.ledger_as_manifest()
        if len(whole.entries) == self.shards():
            ledger.write_manifest(self.uri, whole)

    def unseal(self) -> None:
        """Remove the manifest, before shards are written that it may vouch for."""
        ledger.remove_manifest(self.uri)
        self._whole = None

    def ledger_as_manifest(self) -> ledger.Manifest:
        """What the ledger says now, the manifest left out."""
        entries = self._ledger()
        shards = [[k, dict(entry.sha256)] for k, entry in sorted(entries.items())]
        name = sha256(as_json({**self._identity, "shards": shards}).encode())[:16]
        return ledger.Manifest(self._identity, name, entries)

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
        draft = self.draft(shard)
        for of_slice in zip(anatomy, modality, mask, strict=True):
            draft.append(*of_slice)
        draft.commit()

    def draft(self, shard: int) -> ShardDraft:
        """A shard to be compressed slice by slice, for whoever gets them one by one. Raises IndexError."""
        self._whole = None
        return ShardDraft(self.uri, shard, self.shard_rows(shard), self.spec, self._row_digests[shard])

    def read_shard(self, shard: int) -> PackedBank:
        """One whole shard, its files checked against the ledger. Raises InputError if it is missing or damaged."""
        entry = self.entry(shard)
        return PackedBank(**{name: self.read_array(name, shard, entry) for name in ARRAYS})

    def read_array(self, name: str, shard: int, entry: ledger.Entry | None = None) -> npt.NDArray[Any]:
        """One array's rows of a shard, as `read_rows` reads them."""
        out = np.empty((len(self.shard_rows(shard)), *row_shape(name, self.spec)), dtype=dtype(name))
        for _ in self.read_rows(name, shard, out, entry):
            pass
        return out

    def read_rows(
        self, name: str, shard: int, out: npt.NDArray[Any] | None = None, entry: ledger.Entry | None = None
    ) -> Iterator[npt.NDArray[Any]]:
        """One array's rows of a shard, decoded one by one; into the rows of `out` if that is given.

        The file is checked against the shard's `entry`, read if it is not given, before the first row. Raises
        InputError if it is missing or damaged.
        """
        rows, entry = self.shard_rows(shard), entry or self.entry(shard)
        where = f"{fs.base_name(self.uri)}, shard {shard}"
        remedy = f"remove ledger/shard-{shard:05d}.json and run `cardiomix extract`, or restore the bank's copy"
        try:
            stored = fs.read_bytes(shard_uri(self.uri, name, shard))
            # A tenth of the values' bytes; that the two agree is for `verify` to see.
            if sha256(stored) != entry.files_sha256.get(name):
                raise InputError(where, f"its {name} is not what the ledger says", remedy)
            yield from decoded_rows(name, stored, self.spec, len(rows), out)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(where, f"its {name} cannot be read ({type(error).__name__})", remedy) from error

    def read_column(self, name: str) -> npt.NDArray[Any]:
        """One array's rows of the whole bank, as `read_rows` reads them; several shards at a time from far away."""
        out = np.empty((len(self), *row_shape(name, self.spec)), dtype=dtype(name))

        def read(shard: int) -> None:
            rows = self.shard_rows(shard)
            out[rows.start : rows.stop] = self.read_array(name, shard)

        fs.map_concurrently(self.uri, read, range(self.shards()))
        return out

    def entry(self, shard: int) -> ledger.Entry:
        """What the ledger says of a shard. Raises InputError if it says nothing, IndexError."""
        if not 0 <= shard < self.shards():
            raise IndexError(f"shard {shard} of {self.shards()}")
        if self._whole is not None:
            return self._whole.entries[shard]
        entry = ledger.read_entry(self.uri, shard)
        if entry is None or not self._entry_matches(shard, entry):
            where = f"{fs.base_name(self.uri)}, shard {shard}"
            raise InputError(where, "is not in the ledger", "run `cardiomix extract` to its end")
        return entry

    def read(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> PackedBank:
        """The given rows in the given order, repeats allowed; every shard is read once, whole. Raises IndexError."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a bank of {len(self)}")
        out = PackedBank(**{n: np.empty((len(wanted), *row_shape(n, self.spec)), dtype=dtype(n)) for n in ARRAYS})
        shard_of = wanted // self.spec.shard_slices

        def read(shard: int) -> None:
            here = np.flatnonzero(shard_of == shard)
            found, at = self.read_shard(shard), wanted[here] - shard * self.spec.shard_slices
            for name in ARRAYS:
                getattr(out, name)[here] = getattr(found, name)[at]

        fs.map_concurrently(self.uri, read, np.unique(shard_of).tolist())
        return out

    def load(self) -> PackedBank:
        """The whole bank: 2 · N · H · W bytes and a little. Raises InputError if a shard is missing or damaged."""
        return self.read(np.arange(len(self)))

    def where(self, **columns: Any) -> npt.NDArray[np.int64]:
        """Rows whose index has these values, or one of several: `bank.where(vendor="A", phase=["ED", "ES"])`.

        Raises InputError for a column that an index does not have.
        """
        return rows_where(self.index, columns)

    def decoder(self) -> tuple[bytes, dict[str, Any]]:
        """The decoder's weights (safetensors) and configuration. Raises InputError if they are missing or damaged."""
        where, remedy = fs.base_name(self.uri), f"restore {WEIGHTS} and {WEIGHTS_CONFIG}"
        try:
            weights = fs.read_bytes(fs.join(self.uri, WEIGHTS))
            config = fs.read_bytes(fs.join(self.uri, WEIGHTS_CONFIG))
        except OSError as error:
            raise InputError(where, "its decoder is missing", remedy) from error
        if sha256(weights, config) != self.decoder_sha256:
            raise InputError(where, "its decoder is not the one it was made with", remedy)
        return weights, dict(json.loads(config))

    @property
    def content_fingerprint(self) -> str:
        """Names the factors: 16 hex digits of SHA-256 over identity, index, decoder and the ledger's checksums."""
        return (self._seen_whole() or self.ledger_as_manifest()).fingerprint

    @property
    def fingerprint(self) -> str:
        """Names all that samples are made from: `content_fingerprint`, unless there are imported styles."""
        styles = fs.list_names(fs.join(self.uri, STYLES))
        content = self.content_fingerprint
        return sha256(as_json([content, styles]).encode())[:16] if styles else content

    def tidy(self) -> None:
        """Remove what killed writers left of unfinished files; call it only while nobody writes."""
        if fs.is_local(self.uri):  # an object store has no unfinished objects
            for path in fs.local_path(self.uri).rglob(".*.tmp"):
                path.unlink(missing_ok=True)

    @cached_property
    def _row_digests(self) -> list[str]:
        return row_digests(self.index, map(self.shard_rows, range(self.shards())))

    def _ledger(self) -> dict[int, ledger.Entry]:
        return {k: entry for k, entry in ledger.committed(self.uri).items() if self._entry_matches(k, entry)}

    def _seen_whole(self) -> ledger.Manifest | None:
        """The complete ledger, from the manifest or, where there is none of this bank, from the entries; None if shards
        are missing. It is read once."""
        if self._whole is None:
            found = self._manifest() or self.ledger_as_manifest()
            self._whole = found if len(found.entries) == self.shards() else None
        return self._whole

    def _manifest(self) -> ledger.Manifest | None:
        """The manifest, if it is of this bank and whole."""
        found = ledger.read_manifest(self.uri)
        ours = found is not None and found.bank == self._identity and set(found.entries) == set(range(self.shards()))
        return found if ours else None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a ledger is of, as JSON values."""
        return {"spec": self.spec.identity(), "index": self._index_sha256, "decoder": self.decoder_sha256}

    def _entry_matches(self, shard: int, entry: ledger.Entry) -> bool:
        return (
            0 <= shard < self.shards()
            and entry.sdnet_fingerprint == self.spec.sdnet_fingerprint
            and range(entry.start, entry.stop) == self.shard_rows(shard)
            and entry.index_sha256 == self._row_digests[shard]
        )


def _clear_unfinished(bank: str) -> None:
    """Remove what a creation that was cut short left. Raises InputError if there is anything else, which is kept."""
    if not fs.exists(bank):
        return
    if not fs.is_folder(bank) or set(fs.list_names(bank)) - KNOWN_FILES:
        raise InputError(fs.base_name(bank), "is there and is not a factor bank", "name a new folder for the bank")
    fs.remove(bank)
