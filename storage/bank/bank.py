"""The factor bank: SDNet's factors of every training slice. FA samples can be made from it alone.

    <bank>/zarr.json                 Zarr v3 group; its attributes describe the bank. Written once, last at creation
    <bank>/anatomy, mask             (N, H, W) uint8; a shard is `shard_slices` rows, a chunk one slice
    <bank>/modality                  (N, modality_size) float32; a chunk is `shard_slices` rows
    <bank>/index.parquet             `BANK_INDEX_SCHEMA`, one row for each slice; it says how many the bank holds
    <bank>/decoder.safetensors, decoder.json
    <bank>/ledger/shard-00000.json   this shard is complete (see `storage.bank.ledger`)
    <bank>/manifest.json             every shard is complete: the whole ledger in one file
    <bank>/styles/….parquet          modality vectors of other banks (see `storage.bank.styles`)

The format is specified in docs/bank-format.md. Rows are written and read a whole shard at a time, by one writer a
shard. To read slices at random, use `storage.bank.node_cache.BankView`: Zarr takes many times longer for scattered rows
of a shard than for the whole shard. `storage.bank.verify` finds what is wrong with a bank.
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
from storage.bank.unfinished import clear_unfinished
from storage.errors import InputError
from storage.parquet import different_texts

__all__ = ["ARRAYS", "BANK_INDEX_SCHEMA", "BankSpec", "FactorBank", "PackedBank"]


@dataclass(frozen=True)
class PackedBank:
    """Rows of a bank in memory.

    `anatomy` is (n, H, W) uint8, channel c in bit c. `mask` is (n, H, W) uint8: LV 1, MYO 2, RV 3, all zeros if not
    labelled. `modality` is (n, modality_size) float32.
    """

    anatomy: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    modality: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.anatomy)


class FactorBank:
    """A bank at a local path or an fsspec URI. Use `create` or `open` to get one.

    The index is read when the bank is opened, and not again. The ledger is read until it is complete, and then kept.
    `decoder_sha256` is the checksum of the decoder's weights and configuration, as the bank records it.
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
        """Create an empty bank. If there is a bank of the same network already, append the slices that it lacks.

        `index` has one row for each slice, with the columns of `BANK_INDEX_SCHEMA`. `decoder` holds safetensors bytes,
        `decoder_config` describes their network. An interrupted creation is done again. Raises InputError if the place
        holds another bank (see `append`) or something else, ValueError if `index` is not valid.
        """
        index, config = validated_index(index), as_json(decoder_config)
        if fs.exists(fs.join(bank, ROOT)):
            found = cls.open(bank, partial=True)
            require_same_network(found.spec, spec, fs.base_name(bank))
            return found.append(index)
        clear_unfinished(bank)
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

        With `partial`, the bank may lack shards; reading a missing shard raises the error.
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
        """Append the slices of `index` that the bank lacks. Returns the longer bank, or this one if it lacks none.

        `index` has a row for every slice that the bank is to hold, those that it has included, in any order. `row`,
        `top` and `left` are ignored; images are centred on the bank's canvas. Committed shards are kept, except a
        partly filled last shard, which must be written again. If the process is killed, the bank is the old one or the
        new one. Call this only while nobody else writes.
        Raises InputError if `index` lacks or changes a slice of the bank, or if a new slice is larger than the canvas.
        """
        wanted = append_missing_slices(self.index, validated_index(index), self.spec.canvas, fs.base_name(self.uri))
        if wanted.num_rows == len(self):
            return self
        for name in ARRAYS:  # for a moment longer than the index says, which readers allow
            write_metadata(self.uri, name, self.spec, wanted.num_rows)
        return FactorBank(self.uri, self.spec, wanted, write_index(self.uri, wanted), self.decoder_sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorBank.open, (self.uri, True)  # another process opens the bank itself

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
        """The shards with a ledger entry for this bank's rows and network; each call reads the ledger's files."""
        return set(self._ledger())

    def is_committed(self, shard: int) -> bool:
        """Whether one shard is committed. Each call reads its entry again."""
        entry = ledger.read_entry(self.uri, shard)
        return entry is not None and self._entry_matches(shard, entry)

    def is_complete(self) -> bool:
        """Whether every shard is committed. Once this is true, the ledger is not read again."""
        return self._seen_whole() is not None

    def is_sealed(self) -> bool:
        """Whether the manifest is valid and every shard has a file in the ledger. These files are not read."""
        found = self._manifest()
        return found is not None and set(found.entries) <= ledger.listed(self.uri)

    def seal(self) -> None:
        """If the ledger is complete, write the manifest from it. Call this only while nobody else writes."""
        whole = self.ledger_as_manifest()
        if len(whole.entries) == self.shards():
            ledger.write_manifest(self.uri, whole)

    def unseal(self) -> None:
        """Remove the manifest. Call this before you write shards, for which the manifest would still vouch."""
        ledger.remove_manifest(self.uri)
        self._whole = None

    def ledger_as_manifest(self) -> ledger.Manifest:
        """A manifest of what the ledger's files say now. The manifest's file is not used."""
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

        Raises ValueError unless shapes and types are those of `PackedBank`, for all rows of the shard.
        """
        draft = self.draft(shard)
        for of_slice in zip(anatomy, modality, mask, strict=True):
            draft.append(*of_slice)
        draft.commit()

    def draft(self, shard: int) -> ShardDraft:
        """Begin a shard whose slices are given one by one. Raises IndexError if there is no such shard."""
        self._whole = None
        return ShardDraft(self.uri, shard, self.shard_rows(shard), self.spec, self._row_digests[shard])

    def read_shard(self, shard: int) -> PackedBank:
        """Read one whole shard, checked against the ledger. Raises InputError if it is missing or damaged."""
        entry = self.entry(shard)
        return PackedBank(**{name: self.read_array(name, shard, entry) for name in ARRAYS})

    def read_array(self, name: str, shard: int, entry: ledger.Entry | None = None) -> npt.NDArray[Any]:
        """Read one array's rows of a shard, (rows, …), as `read_rows` does."""
        out = np.empty((len(self.shard_rows(shard)), *row_shape(name, self.spec)), dtype=dtype(name))
        for _ in self.read_rows(name, shard, out, entry):
            pass
        return out

    def read_rows(
        self, name: str, shard: int, out: npt.NDArray[Any] | None = None, entry: ledger.Entry | None = None
    ) -> Iterator[npt.NDArray[Any]]:
        """Decode one array's rows of a shard one by one, into the rows of `out` if that is given.

        The file is checked before the first row, against `entry` or, if that is not given, against the ledger's entry.
        Raises InputError if the shard is missing or damaged.
        """
        rows, entry = self.shard_rows(shard), entry or self.entry(shard)
        where = f"{fs.base_name(self.uri)}, shard {shard}"
        remedy = f"remove ledger/shard-{shard:05d}.json and run `cardiomix extract`, or restore the bank's copy"
        try:
            stored = fs.read_bytes(shard_uri(self.uri, name, shard))
            # The file has a tenth of the values' bytes. `verify` checks that the values agree with it.
            if sha256(stored) != entry.files_sha256.get(name):
                raise InputError(where, f"its {name} is not what the ledger says", remedy)
            yield from decoded_rows(name, stored, self.spec, len(rows), out)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(where, f"its {name} cannot be read ({type(error).__name__})", remedy) from error

    def read_column(self, name: str) -> npt.NDArray[Any]:
        """Read one array of the whole bank, (N, …), as `read_rows` does; if remote, several shards at a time."""
        out = np.empty((len(self), *row_shape(name, self.spec)), dtype=dtype(name))

        def read(shard: int) -> None:
            rows = self.shard_rows(shard)
            out[rows.start : rows.stop] = self.read_array(name, shard)

        fs.map_concurrently(self.uri, read, range(self.shards()))
        return out

    def entry(self, shard: int) -> ledger.Entry:
        """The ledger's entry of a shard. Raises InputError if it is not committed, IndexError if it cannot exist."""
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
        """Read the given rows in the given order; repeats are allowed. Each shard is read once, whole.

        Raises IndexError for rows that the bank does not have, InputError if a shard is missing or damaged.
        """
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
        """Read the whole bank: 2 · N · H · W bytes and a little. Raises InputError if a shard is missing or damaged."""
        return self.read(np.arange(len(self)))

    def where(self, **columns: Any) -> npt.NDArray[np.int64]:
        """The rows whose index has these values, or one of several: `bank.where(vendor="A", phase=["ED", "ES"])`.

        Raises InputError for a column that the index does not have.
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
        """The name of the factors: 16 hex digits of SHA-256 over identity, index, decoder and ledger checksums."""
        return (self._seen_whole() or self.ledger_as_manifest()).fingerprint

    @property
    def fingerprint(self) -> str:
        """The name of all that samples are made from: `content_fingerprint`, or a hash of it and imported styles."""
        styles = fs.list_names(fs.join(self.uri, STYLES))
        content = self.content_fingerprint
        return sha256(as_json([content, styles]).encode())[:16] if styles else content

    def tidy(self) -> None:
        """Remove unfinished files that killed writers left. Call this only while nobody writes."""
        if fs.is_local(self.uri):  # an object store has no unfinished objects
            for path in fs.local_path(self.uri).rglob(".*.tmp"):
                path.unlink(missing_ok=True)

    @cached_property
    def _row_digests(self) -> list[str]:
        return row_digests(self.index, map(self.shard_rows, range(self.shards())))

    def _ledger(self) -> dict[int, ledger.Entry]:
        return {k: entry for k, entry in ledger.committed(self.uri).items() if self._entry_matches(k, entry)}

    def _seen_whole(self) -> ledger.Manifest | None:
        """The complete ledger, from the manifest if it is valid, else from the entries; None if shards are missing."""
        if self._whole is None:
            found = self._manifest() or self.ledger_as_manifest()
            self._whole = found if len(found.entries) == self.shards() else None
        return self._whole

    def _manifest(self) -> ledger.Manifest | None:
        """The manifest, if it belongs to this bank and has every shard; else None."""
        found = ledger.read_manifest(self.uri)
        ours = found is not None and found.bank == self._identity and set(found.entries) == set(range(self.shards()))
        return found if ours else None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Which bank a ledger or a manifest belongs to, as JSON values."""
        return {"spec": self.spec.identity(), "index": self._index_sha256, "decoder": self.decoder_sha256}

    def _entry_matches(self, shard: int, entry: ledger.Entry) -> bool:
        return (
            0 <= shard < self.shards()
            and entry.sdnet_fingerprint == self.spec.sdnet_fingerprint
            and range(entry.start, entry.stop) == self.shard_rows(shard)
            and entry.index_sha256 == self._row_digests[shard]
        )
