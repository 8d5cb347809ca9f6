"""Styles: how a site's scanners draw, as modality vectors and facts about their slices, without a pixel.

A file of styles is one Parquet file whose metadata say what it is. If it is imported into another bank of the same
SDNet and preprocessing, it lies in `<bank>/styles/`, and its vectors are further donors for FA. The format is specified
in docs/bank-format.md.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage import fs
from storage.bank.bank import FactorBank
from storage.bank.index import BANK_INDEX_SCHEMA
from storage.bank.node_cache import map_modality
from storage.bank.spec import STYLES, as_json, code_version, sha256
from storage.errors import InputError
from storage.lock import bank_lock
from storage.parquet import different_texts, read_parquet, text_array

FORMAT: Final = "cardiomix-styles"
VERSION: Final = 1
METADATA: Final = b"cardiomix_styles"
COLUMNS: Final = (
    *("subject", "vendor", "centre", "phase", "frame", "slice", "pixel_area_mm2"),
    *("native_height", "native_width", "native_row_mm", "native_col_mm", "terms"),
)

_IMPORTED: WeakKeyDictionary[FactorBank, list[pa.Table]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Donors:
    """Modality vectors to draw with: `modality` (D, M) float32; `vendor` and `subject`, (D,) text each."""

    modality: npt.NDArray[np.float32]
    vendor: npt.NDArray[np.str_]
    subject: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.modality)


def modality_donors(bank: FactorBank, cache: str | None = None) -> Donors:
    """The bank's own vectors (donor r is row r), then those of imported styles in the order of their files' names.

    The bank's own vectors are mapped from the node's cache, in the folder `cache`. Raises InputError if a shard or a
    file of styles is missing or damaged, or if the cache has no room.
    """
    vectors = [map_modality(bank, cache), *map(_vectors, _imported(bank))]
    whole = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
    return Donors(whole, donor_texts(bank, "vendor"), donor_texts(bank, "subject"))


def donor_texts(bank: FactorBank, name: str) -> npt.NDArray[np.str_]:
    """(D,) text: the `vendor`, `subject` or another text column of the index, for every donor.

    The bank's own vectors are not read.
    """
    return np.concatenate([text_array(table[name]) for table in (bank.index, *_imported(bank))])


def different_donors(bank: FactorBank, name: str) -> list[str]:
    """The different texts that `donor_texts` gives, sorted."""
    return sorted({text for table in (bank.index, *_imported(bank)) for text in different_texts(table[name])})


def _imported(bank: FactorBank) -> list[pa.Table]:
    """The imported styles, one table a file. They are read once for each opened bank."""
    if bank not in _IMPORTED:
        names = fs.list_names(fs.join(bank.uri, STYLES))
        _IMPORTED[bank] = fs.map_concurrently(bank.uri, lambda name: read_styles(bank, name), names)
    return _IMPORTED[bank]


def export_styles(bank: FactorBank, out: str, keep_subjects: bool = False, vendors: Sequence[str] = ()) -> int:
    """Write a complete bank's modality vectors and facts about its slices to a new file; returns the number of slices.

    The file has no anatomy, mask, image or decoder. Unless `keep_subjects` is set, subjects get names made with a key
    that is thrown away, so that nobody can find a subject by trying names. `vendors` are the vendors to export; empty
    means all. Raises InputError if the bank is not complete or has no slice of a vendor, or if `out` exists.
    """
    if fs.exists(out):
        raise InputError(fs.base_name(out), "is there already", "name a new file")
    plain = pa.schema([BANK_INDEX_SCHEMA.field(name) for name in COLUMNS])
    table, key = bank.index.select(COLUMNS).cast(plain), secrets.token_bytes(32)
    if not keep_subjects:
        names = [hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12] for name in table["subject"].to_pylist()]
        table = table.set_column(0, table.schema.field("subject"), pa.array(names))
    vectors, there = bank.read_column("modality"), text_array(table["vendor"])
    for vendor in sorted(set(vendors) - set(there.tolist())):
        has = ", ".join(sorted(set(there.tolist())))
        raise InputError(fs.base_name(bank.uri), f"has no slice of vendor {vendor}", f"choose from {has}")
    if vendors:
        kept = np.flatnonzero(np.isin(there, vendors))
        table, vectors = table.take(kept), vectors[kept]
    about = {
        "format": FORMAT,
        "version": VERSION,
        "sdnet_fingerprint": bank.spec.sdnet_fingerprint,
        "preprocess": bank.spec.preprocess,
        "modality_size": bank.spec.modality_size,
        "subjects": "as in the bank" if keep_subjects else "pseudonyms",
        "terms": different_texts(table["terms"]),
        "code_version": code_version(),
    }
    content = _styles_file(table.combine_chunks(), vectors, about)
    fs.write_bytes(out, content)
    return int(table.num_rows)


def import_styles(styles: str, bank: FactorBank) -> int:
    """Add a file of styles to a bank's donors; returns the number of its vectors. The same file counts once.

    Raises InputError if the file cannot be read, is no file of styles, is damaged, or is of another SDNet or
    preprocessing, if all its vectors are the bank's own, or if somebody else is writing to the bank.
    """
    where = fs.base_name(styles)
    try:
        content = fs.read_bytes(styles)
    except OSError as error:
        raise InputError(where, f"cannot be read ({type(error).__name__})", "correct the path") from error
    table, about = _parsed_styles(content, where)
    _require_same(about, bank, where)
    own = bank.read_column("modality")
    if {row.tobytes() for row in _vectors(table)} <= {row.tobytes() for row in own}:
        raise InputError(where, f"was exported from {fs.base_name(bank.uri)} itself", "import it into another bank")
    # The file is written anew, so that nothing else that it held enters the bank.
    clean = _styles_file(table.select(COLUMNS), _vectors(table), about)
    with bank_lock(bank.uri):
        fs.write_bytes(fs.join(bank.uri, STYLES, f"{sha256(clean)[:16]}.parquet"), clean)
    _IMPORTED.pop(bank, None)
    return int(table.num_rows)


def read_styles(bank: FactorBank, name: str) -> pa.Table:
    """Read an imported file of styles as a table.

    Raises InputError if it is missing, damaged or of another SDNet or preprocessing.
    """
    where = f"{fs.base_name(bank.uri)}, {STYLES}/{name}"
    try:
        content = fs.read_bytes(fs.join(bank.uri, STYLES, name))
    except OSError as error:
        raise InputError(where, "cannot be read", "remove it, and import it again") from error
    if name != f"{sha256(content)[:16]}.parquet":
        raise InputError(where, "is not the file that was imported", "remove it, and import it again")
    table, about = _parsed_styles(content, where)
    _require_same(about, bank, where)
    return table


def _styles_file(table: pa.Table, modality: npt.NDArray[np.float32], about: dict[str, Any]) -> bytes:
    flat = pa.array(modality.reshape(-1), type=pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(flat, modality.shape[1])
    whole = table.append_column("modality", vectors).replace_schema_metadata({METADATA: as_json(about)})
    out = io.BytesIO()
    pq.write_table(whole, out, compression="zstd")
    return out.getvalue()


def _parsed_styles(content: bytes, where: str) -> tuple[pa.Table, dict[str, Any]]:
    remedy = "export it again with `cardiomix bank export-styles`"
    try:
        table = read_parquet(content).combine_chunks()
        about = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
        found = about.get("format") if isinstance(about, dict) else None
    except (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(where, "is no file of styles, or a damaged one", remedy) from error
    if found != FORMAT or about.get("version") != VERSION:
        raise InputError(where, f"is no file of styles of version {VERSION}", remedy)
    kind = pa.list_(pa.float32(), int(about.get("modality_size", 0)))
    if not table.num_rows or not {*COLUMNS, "modality"} <= set(table.column_names):
        raise InputError(where, "lacks columns or rows", remedy)
    if table["modality"].type != kind or any(column.null_count for column in table.columns):
        raise InputError(where, "its modality vectors are not whole", remedy)
    if not np.isfinite(_vectors(table)).all():
        raise InputError(where, "its modality vectors are not finite", remedy)
    return table, about


def _vectors(table: pa.Table) -> npt.NDArray[np.float32]:
    column = table["modality"].combine_chunks()
    flat: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return flat.reshape(table.num_rows, -1)


def _require_same(about: dict[str, Any], bank: FactorBank, where: str) -> None:
    for key in ("sdnet_fingerprint", "preprocess", "modality_size"):
        ours = bank.spec.model_dump(mode="json")[key]
        if about.get(key) != ours:
            problem = f"its {key} is {about.get(key)}, that of {fs.base_name(bank.uri)} is {ours}"
            raise InputError(where, problem, "vectors of two networks do not mix; use styles of the same network")
