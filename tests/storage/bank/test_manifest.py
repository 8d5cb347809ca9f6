"""A complete bank's manifest says what its ledger says, in one file, and never vouches for what the ledger does not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from storage import fs
from storage.bank import ledger
from storage.bank.bank import FactorBank
from storage.bank.index import BANK_INDEX_SCHEMA, index_digest, rows_of, slice_keys, validated_index
from storage.bank.merge import merge
from storage.bank.verify import verify
from storage.errors import InputError
from tests.storage.banks import digests, index, made, same, write


@pytest.fixture
def sealed(tmp_path: Path) -> FactorBank:
    bank = made(tmp_path / "bank.zarr")
    bank.seal()
    return bank


def test_a_bank_with_a_manifest_is_the_same_bank(sealed: FactorBank, tmp_path: Path) -> None:
    other = made(tmp_path / "other.zarr")
    opened = FactorBank.open(sealed.uri)
    assert opened.fingerprint == other.fingerprint == FactorBank.open(other.uri).fingerprint
    assert same(opened.load(), slice(None))
    assert opened.committed() == {0, 1, 2}
    assert verify(opened) == []
    assert digests(Path(other.uri)).items() <= digests(Path(sealed.uri)).items()


def test_a_bank_with_a_manifest_is_opened_and_read_without_its_ledger(sealed: FactorBank) -> None:
    fs.remove(fs.join(sealed.uri, ledger.FOLDER))
    assert same(FactorBank.open(sealed.uri).load(), slice(None))
    assert FactorBank.open(sealed.uri, partial=True).committed() == set()  # what a resume goes by
    assert not sealed.is_sealed()


def test_a_sealed_bank_is_known_by_its_manifest_and_the_names_in_its_ledger(sealed: FactorBank, tmp_path: Path) -> None:
    assert sealed.is_sealed() and FactorBank.open(sealed.uri, partial=True).is_sealed()
    Path(ledger.entry_uri(sealed.uri, 1)).unlink()  # as the remedy of a damaged shard says
    assert not FactorBank.open(sealed.uri, partial=True).is_sealed()
    assert not made(tmp_path / "other.zarr").is_sealed()


def test_an_incomplete_bank_gets_no_manifest(tmp_path: Path) -> None:
    bank = made(tmp_path / "bank.zarr", shards=[0, 2])
    bank.seal()
    assert not (tmp_path / "bank.zarr" / ledger.MANIFEST).exists()


def test_a_shard_that_is_written_again_takes_the_manifest_along(sealed: FactorBank) -> None:
    draft = sealed.draft(1)
    ledger.retract(sealed.uri, 1)
    with pytest.raises(InputError, match="is not complete: 1 of 3 shards are missing"):
        FactorBank.open(sealed.uri)
    assert draft is not None and not sealed.is_complete()
    write(sealed, 1)
    assert sealed.is_complete() and not Path(sealed.uri, ledger.MANIFEST).exists()


def test_an_extended_bank_is_not_complete_by_its_old_manifest(sealed: FactorBank) -> None:
    longer = FactorBank.open(sealed.uri).append(index(("s0", "s1", "s2")))
    assert not longer.is_complete() and longer.committed() == {0, 1}
    with pytest.raises(InputError, match="is not complete: 2 of 4"):
        FactorBank.open(sealed.uri)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"entries": {"0": 1}}', '{"entries": []}'])
def test_a_damaged_manifest_is_as_good_as_none(sealed: FactorBank, damage: str) -> None:
    name = sealed.fingerprint
    Path(sealed.uri, ledger.MANIFEST).write_text(damage)
    assert FactorBank.open(sealed.uri).fingerprint == name
    sealed.seal()
    assert json.loads(Path(sealed.uri, ledger.MANIFEST).read_text())["fingerprint"] == name


def test_a_manifest_of_another_bank_vouches_for_nothing(sealed: FactorBank, tmp_path: Path) -> None:
    other = made(tmp_path / "other.zarr", subjects=("s0", "s3"))
    name = other.fingerprint
    fs.write_bytes(fs.join(other.uri, ledger.MANIFEST), fs.read_bytes(fs.join(sealed.uri, ledger.MANIFEST)))
    assert FactorBank.open(other.uri).fingerprint == name
    assert verify(other) == [f"{ledger.MANIFEST} is not what the ledger says; remove it"]


def test_a_merged_bank_has_a_manifest(sealed: FactorBank, tmp_path: Path) -> None:
    other = made(tmp_path / "other.zarr", subjects=("s3", "s4"))
    told: list[tuple[int, int]] = []
    out = merge([sealed.uri, other.uri], str(tmp_path / "out.zarr"), lambda done, of: told.append((done, of)))
    assert told[-1] == (out.shards(), out.shards()) and Path(out.uri, ledger.MANIFEST).exists()
    again = merge([sealed.uri, other.uri], out.uri)
    assert again.fingerprint == out.fingerprint and verify(out) == []


def test_a_bank_far_away_is_verified_in_the_words_of_a_local_one(sealed: FactorBank, tmp_path: Path) -> None:
    for shard in (0, 2):
        path = Path(sealed.uri, "modality", "c", str(shard), "0")
        path.write_bytes(path.read_bytes()[:-1])
    far, told = "memory://verified/bank.zarr", [0]
    for path in Path(sealed.uri).rglob("*"):
        if path.is_file():
            fs.write_bytes(fs.join(far, str(path.relative_to(sealed.uri))), path.read_bytes())
    problems = verify(FactorBank.open(far), lambda done, _: told.append(done))
    assert len(problems) == 2 and problems == verify(FactorBank.open(sealed.uri))
    assert told == [0, 1, 2, 3]


def test_slices_are_found_by_what_names_them() -> None:
    whole = validated_index(index(("s0", "s1", "s2")))
    part = whole.take(pa.array([7, 2, 14, 0])).cast(BANK_INDEX_SCHEMA)  # plain text, in another order
    assert rows_of(whole, part).tolist() == [7, 2, 14, 0]
    assert rows_of(part, whole).tolist() == [3, -1, 1, *[-1] * 4, 0, *[-1] * 6, 2]
    assert rows_of(whole.slice(0, 0), part).tolist() == [-1] * 4
    assert rows_of(whole, part.slice(0, 0)).tolist() == []
    far = index(frame=2**31 - 1, slice=-5).slice(0, 1)
    assert rows_of(whole, far).tolist() == [-1] and rows_of(far, far).tolist() == [0]
    assert slice_keys(whole) == slice_keys(whole.cast(BANK_INDEX_SCHEMA))
    assert index_digest(whole) == index_digest(whole.cast(BANK_INDEX_SCHEMA))
