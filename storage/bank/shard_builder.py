"""Builds a shard of a bank: slices are compressed one by one, then written and committed together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.bank import ledger
from storage.bank.arrays import ARRAYS, EncodedRow, ShardFile, dtype, row_shape, shard_uri
from storage.bank.spec import BankSpec, code_version, sha256


class ShardDraft:
    """A shard in the making; `FactorBank.draft` returns one. Nothing is written before `commit`.

    Any thread may encode. Only one thread at a time may append.
    """

    def __init__(self, bank: str, shard: int, rows: range, spec: BankSpec, index_sha256: str) -> None:
        self._bank, self._shard, self._rows, self._spec, self._index_sha256 = bank, shard, rows, spec, index_sha256
        self._files = {name: ShardFile(name, spec) for name in ARRAYS}
        self._appended = 0

    def append(
        self, anatomy: npt.NDArray[np.uint8], modality: npt.NDArray[np.float32], mask: npt.NDArray[np.uint8]
    ) -> None:
        """Compress and append the next slice's factors; see `encoded` and `append_encoded`."""
        self.append_encoded(self.encoded(anatomy, modality, mask))

    def encoded(
        self, anatomy: npt.NDArray[np.uint8], modality: npt.NDArray[np.float32], mask: npt.NDArray[np.uint8]
    ) -> dict[str, EncodedRow]:
        """Compress one slice's factors: anatomy and mask (H, W) uint8, modality (modality_size,) float32.

        Raises ValueError for other shapes or types, or a modality that is not finite.
        """
        if not np.isfinite(modality).all():
            raise ValueError(f"modality of shard {self._shard} is not finite")
        row: dict[str, npt.NDArray[Any]] = {"anatomy": anatomy, "mask": mask, "modality": modality}
        for name, values in row.items():
            wanted, shape = dtype(name), row_shape(name, self._spec)
            if values.shape != shape or values.dtype != wanted:
                found = f"{values.dtype} {values.shape}"
                raise ValueError(f"{name} of shard {self._shard} is {found} a slice, not {wanted} {shape}")
        return {name: self._files[name].encoded(values) for name, values in row.items()}

    def append_encoded(self, row: dict[str, EncodedRow]) -> None:
        """Append the next slice. Raises ValueError for more slices than the shard has."""
        if self._appended == len(self._rows):
            raise ValueError(f"shard {self._shard} has {len(self._rows)} slices, more are given")
        for name, values in row.items():
            self._files[name].append(values)
        self._appended += 1

    def commit(self) -> None:
        """Write the files, then the ledger entry. Raises ValueError if slices are missing."""
        if self._appended != len(self._rows):
            raise ValueError(f"shard {self._shard} has {len(self._rows)} slices, {self._appended} are given")
        contents = {name: file.content() for name, file in self._files.items()}
        if fs.exists(ledger.entry_uri(self._bank, self._shard)):
            ledger.retract(self._bank, self._shard)
        for name, content in contents.items():
            fs.write_bytes(shard_uri(self._bank, name, self._shard), content)
        entry = ledger.Entry(
            self._rows.start,
            self._rows.stop,
            {name: file.values_sha256() for name, file in self._files.items()},
            {name: sha256(content) for name, content in contents.items()},
            self._index_sha256,
            self._spec.sdnet_fingerprint,
            code_version(),
        )
        ledger.commit(self._bank, self._shard, entry)
