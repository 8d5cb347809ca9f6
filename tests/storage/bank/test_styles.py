"""Styles: what leaves a site holds no pixel and no name; what comes in is of the same network and adds donors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.bank.bank import FactorBank
from storage.bank.styles import COLUMNS, export_styles, import_styles, modality_donors
from storage.bank.verify import verify
from storage.errors import InputError
from storage.lock import bank_lock
from tests.storage.banks import DECODER, DECODER_CONFIG, digests, factors, index, made, same, spec, write

AWAY = ("s2", "s3")


@pytest.fixture
def home(tmp_path: Path) -> FactorBank:
    return made(tmp_path / "home.zarr")


@pytest.fixture
def away(tmp_path: Path) -> FactorBank:
    return made(tmp_path / "away.zarr", subjects=AWAY)


@pytest.fixture
def styles(away: FactorBank, tmp_path: Path) -> Path:
    assert export_styles(away, str(tmp_path / "styles.parquet")) == 10
    return tmp_path / "styles.parquet"


def test_styles_hold_the_vectors_and_facts_and_no_pixel(styles: Path) -> None:
    table = pq.read_table(styles)
    assert table.column_names == [*COLUMNS, "modality"]
    assert np.array_equal(np.array(table["modality"].to_pylist(), np.float32), factors(AWAY).modality)
    for name in set(COLUMNS) - {"subject"}:
        assert table[name].to_pylist() == index(AWAY)[name].to_pylist()
    about = json.loads(table.schema.metadata[b"cardiomix_styles"])
    assert (about["format"], about["version"], about["terms"]) == ("cardiomix-styles", 1, ["CC BY 4.0"])
    assert about["sdnet_fingerprint"] == "0123456789abcdef"
    # Ten slices of 1,536 pixels would not fit, at a bit a pixel, into what is left beside vectors and facts.
    content = styles.read_bytes()
    maps = factors(AWAY).anatomy
    assert not any(row.tobytes() in content for slice_ in maps for row in slice_ if len(np.unique(row)) > 2)
    assert b"weights" not in content


def test_one_vendor_s_styles_leave_alone(away: FactorBank, tmp_path: Path) -> None:
    out = tmp_path / "b.parquet"
    assert export_styles(away, str(out), vendors=["B"]) == 5
    table = pq.read_table(out)
    assert set(table["vendor"].to_pylist()) == {"B"}
    assert np.array_equal(np.array(table["modality"].to_pylist(), np.float32), factors(AWAY).modality[5:])
    with pytest.raises(InputError, match=r"away\.zarr: has no slice of vendor C; choose from A, B"):
        export_styles(away, str(tmp_path / "c.parquet"), vendors=["E", "B", "D", "C"])
    assert not (tmp_path / "c.parquet").exists()


def test_styles_leave_under_the_terms_of_their_own_slices_alone(tmp_path: Path) -> None:
    table = index(AWAY)
    terms = pa.array([f"terms of {vendor}" for vendor in table["vendor"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("terms"), table.schema.field("terms"), terms)
    bank = FactorBank.create(str(tmp_path / "bank.zarr"), spec(), table, DECODER, DECODER_CONFIG)
    for shard in range(bank.shards()):
        write(bank, shard, factors(AWAY))
    for vendors, expected in (((), ["terms of A", "terms of B"]), (("B",), ["terms of B"])):
        out = tmp_path / f"{len(vendors)}.parquet"
        export_styles(bank, str(out), vendors=vendors)
        assert json.loads(pq.read_schema(out).metadata[b"cardiomix_styles"])["terms"] == expected


def test_an_exported_bank_never_reads_anatomy_mask_or_decoder(
    away: FactorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FactorBank.open(away.uri)
    for name in ("anatomy/c", "mask/c", "decoder.safetensors"):
        (Path(away.uri) / name).rename(tmp_path / name.replace("/", "-"))
    assert export_styles(opened, str(tmp_path / "alone.parquet")) == 10


def test_subjects_leave_as_pseudonyms_that_nobody_can_try_out(away: FactorBank, styles: Path, tmp_path: Path) -> None:
    names = pq.read_table(styles)["subject"].to_pylist()
    assert len(set(names)) == 2 and names == [names[0]] * 5 + [names[5]] * 5
    for subject in AWAY:
        assert subject not in names and subject.encode() not in styles.read_bytes()
    export_styles(away, str(tmp_path / "again.parquet"))
    assert not set(pq.read_table(tmp_path / "again.parquet")["subject"].to_pylist()) & set(names)
    export_styles(away, str(tmp_path / "named.parquet"), keep_subjects=True)
    assert set(pq.read_table(tmp_path / "named.parquet")["subject"].to_pylist()) == set(AWAY)


def test_imported_styles_are_further_donors(home: FactorBank, styles: Path, tmp_path: Path) -> None:
    before = home.fingerprint
    assert import_styles(str(styles), home) == 10
    opened = FactorBank.open(home.uri)
    found = modality_donors(opened, str(tmp_path / "cache"))
    expected = np.concatenate([factors().modality, factors(AWAY).modality])
    assert np.array_equal(found.modality, expected)
    assert found.vendor.tolist() == ["A"] * 5 + ["B"] * 5 + ["A"] * 5 + ["B"] * 5
    assert opened.fingerprint != before
    assert same(opened.load(), slice(None))
    assert verify(opened) == []
    after = digests(Path(home.uri))
    import_styles(str(styles), home)  # twice is once
    assert digests(Path(home.uri)) == after


def test_styles_are_not_imported_while_somebody_writes_to_the_bank(home: FactorBank, styles: Path) -> None:
    with bank_lock(home.uri), pytest.raises(InputError, match="is being worked on by process"):
        import_styles(str(styles), home)
    assert import_styles(str(styles), home) == 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sdnet_fingerprint": "fedcba9876543210"}, "its sdnet_fingerprint is fedcba9876543210"),
        ({"preprocess": {"size": 64}}, "its preprocess is"),
    ],
)
def test_styles_of_another_network_or_preprocessing_are_refused(
    home: FactorBank, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    before = digests(Path(home.uri))
    export_styles(made(tmp_path / "other.zarr", subjects=AWAY, **changes), str(tmp_path / "styles.parquet"))
    with pytest.raises(InputError, match=rf"^styles\.parquet: {says}"):
        import_styles(str(tmp_path / "styles.parquet"), home)
    assert digests(Path(home.uri)) == before


def test_what_is_no_file_of_styles_is_refused(home: FactorBank, styles: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(styles.read_bytes()[:-100])
    pq.write_table(index(), tmp_path / "index.parquet")
    broken = pq.read_table(styles)
    pq.write_table(broken.drop_columns(["vendor"]), tmp_path / "lacking.parquet")
    for name in ("cut", "index", "lacking", "absent"):
        with pytest.raises(InputError, match=rf"^{name}\.parquet"):
            import_styles(str(tmp_path / f"{name}.parquet"), home)
    with pytest.raises(InputError, match=r"was exported from away\.zarr itself"):
        import_styles(str(styles), FactorBank.open(str(tmp_path / "away.zarr")))


def test_an_export_keeps_what_is_there_and_needs_a_whole_bank(home: FactorBank, styles: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        export_styles(home, str(styles))
    with pytest.raises(InputError, match="not in the ledger"):
        export_styles(made(tmp_path / "part.zarr", shards=[0]), str(tmp_path / "new.parquet"))
    assert not (tmp_path / "new.parquet").exists()
