from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.bank import ledger
from storage.bank.bank import FactorBank
from storage.bank.index import BANK_INDEX_SCHEMA
from storage.bank.verify import verify
from storage.errors import InputError
from tests.storage.banks import (
    DECODER,
    DECODER_CONFIG,
    FACTORS,
    MODALITY,
    N,
    digests,
    index,
    made,
    same,
    spec,
    write,
)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A complete bank in another folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "bank.zarr"))


def test_factors_come_back_bit_for_bit_by_shard_by_row_and_whole(whole: Path) -> None:
    bank = FactorBank.open(str(whole))
    assert bank.shards() == 3
    assert [len(bank.shard_rows(k)) for k in range(3)] == [4, 4, 2]
    assert same(bank.read_shard(1), slice(4, 8))
    assert same(bank.load(), slice(None))
    rows = [9, 0, 3, 9, 4, 4, 7]
    assert same(bank.read(rows), rows)
    assert len(bank.read([])) == 0
    assert bank.index.cast(BANK_INDEX_SCHEMA).equals(index())
    assert bank.decoder() == (DECODER, DECODER_CONFIG)
    assert bank.is_complete()
    assert verify(bank) == []


@pytest.mark.parametrize("rows", [[-1], [N], [0, 99]])
def test_rows_that_do_not_exist_are_an_error(whole: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match=f"of a bank of {N}"):
        FactorBank.open(str(whole)).read(rows)


def test_a_bank_is_readable_by_plain_zarr_with_nothing_of_ours(whole: Path, tmp_path: Path) -> None:
    expected = {name: getattr(FACTORS, name) for name in ("anatomy", "mask", "modality")}
    np.savez(tmp_path / "expected.npz", **expected)
    code = f"""
import sys, json, hashlib, numpy, zarr, pyarrow.parquet
group = zarr.open_group({str(whole)!r}, mode="r", zarr_format=3)
attributes = dict(group.attrs)
assert attributes["format"] == "cardiomix-factor-bank" and attributes["version"] == 1, attributes
expected = numpy.load("expected.npz")
for name in expected:
    assert numpy.array_equal(group[name][:], expected[name]), name
channel_3 = (group["anatomy"][5] >> 3) & 1
assert channel_3.any()
index = pyarrow.parquet.read_table({str(whole / "index.parquet")!r})
assert index.num_rows == group["anatomy"].shape[0] == group["mask"].shape[0]

def digest(rows):
    content = b""
    for name in rows.column_names:
        values = rows[name].to_pylist()
        if isinstance(values[0], str):
            packed = b"".join(v.encode() + bytes(1) for v in values)
        else:
            packed = rows[name].to_numpy().tobytes()
        content += name.encode() + bytes(1) + packed
    return hashlib.sha256(content).hexdigest()

assert digest(index) == index.schema.metadata[b"cardiomix_sha256"].decode()
for shard in range(3):
    with open({str(whole / "ledger")!r} + f"/shard-{{shard:05d}}.json") as file:
        entry = json.load(file)
    assert digest(index[entry["start"] : entry["stop"]]) == entry["index_sha256"]
    for name, wanted in entry["sha256"].items():
        rows = group[name][entry["start"] : entry["stop"]]
        assert hashlib.sha256(rows.tobytes()).hexdigest() == wanted, (shard, name)
assert attributes["canvas"] == list(group["anatomy"].shape[1:])
assert not {{"storage", "pipeline", "actors", "experiments"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_creating_it_again_opens_it_and_keeps_its_shards(tmp_path: Path) -> None:
    made(tmp_path / "b", range(2))
    before = digests(tmp_path)
    again = made(tmp_path / "b", range(0), code_version="another")
    assert again.committed() == {0, 1}
    assert again.is_committed(1) and not again.is_committed(2)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sdnet_fingerprint": "fedcba9876543210"}, "SDNet 0123456789abcdef, not fedcba9876543210"),
        ({"preprocess": {"size": 64}}, "its preprocess is"),
        ({"shard_slices": 5}, "its shard_slices is"),
        ({"channels": 7}, "its channels is"),
    ],
)
def test_another_bank_in_the_same_place_is_refused(copy: Path, changes: dict[str, Any], says: str) -> None:
    before = digests(copy)
    with pytest.raises(InputError, match=says):
        made(copy, range(0), **changes)
    assert digests(copy) == before


def test_a_creation_that_was_cut_short_is_done_again(copy: Path, whole: Path) -> None:
    (copy / "zarr.json").unlink()
    (copy / "modality" / "zarr.json").unlink()
    made(copy)
    assert digests(copy) == digests(whole)


def test_a_folder_with_something_else_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a factor bank"):
        made(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_bank_with_shards_missing_opens_only_as_partial(tmp_path: Path) -> None:
    made(tmp_path / "b", range(2))
    with pytest.raises(InputError, match="not complete: 1 of 3 shards are missing"):
        FactorBank.open(str(tmp_path / "b"))
    partial = FactorBank.open(str(tmp_path / "b"), partial=True)
    assert not partial.is_complete()
    assert same(partial.read([0, 7]), [0, 7])
    with pytest.raises(InputError, match="shard 2: is not in the ledger"):
        partial.load()
    assert len(verify(partial)) == 1


def test_a_shard_of_another_network_does_not_count(copy: Path) -> None:
    path = copy / "ledger" / "shard-00001.json"
    path.write_text(path.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    assert FactorBank.open(str(copy), partial=True).committed() == {0, 2}


def test_the_order_of_shards_and_a_killed_attempt_leave_no_trace(tmp_path: Path, whole: Path) -> None:
    bank = made(tmp_path / "b", range(2, -1, -1))
    for name in ("anatomy", "mask", "modality"):  # what kills in the middle of a write leave
        for chunk in sorted(p for p in (tmp_path / "b" / name / "c" / "2").rglob("*") if p.is_file()):
            chunk.with_name(".1234.tmp").write_bytes(b"half a sh")
            chunk.write_bytes(b"half a shard")
    (tmp_path / "b" / "ledger" / ".5678.tmp").write_bytes(b"{")
    write(bank, 2)
    bank.tidy()
    assert digests(tmp_path / "b") == digests(whole)


def test_a_slice_that_is_refused_leaves_its_draft_as_it_was(copy: Path) -> None:
    bank, before = FactorBank.open(str(copy)), digests(copy)
    draft = bank.draft(0)
    for row in range(4):
        factors = FACTORS.anatomy[row], FACTORS.modality[row], FACTORS.mask[row]
        for bad in (np.int64(0), np.nan):
            with pytest.raises(ValueError, match="of shard 0 is"):
                draft.append(factors[0], factors[1] * np.float32(bad), factors[2].astype(np.int64))
        draft.append(*factors)
    draft.commit()
    assert digests(copy) == before


def test_what_is_not_a_whole_shard_is_not_written(copy: Path) -> None:
    bank, before = FactorBank.open(str(copy)), digests(copy)
    anatomy, modality, mask = FACTORS.anatomy[:5], FACTORS.modality[:5], FACTORS.mask[:5]
    for slices in (3, 5):
        with pytest.raises(ValueError, match="shard 0 has 4 slices"):
            bank.write_shard(0, anatomy[:slices], modality[:slices], mask[:slices])
    with pytest.raises(ValueError):
        bank.write_shard(0, anatomy[:4], modality[:3], mask[:4])
    for shape in (anatomy[:4, :-1], anatomy[:4].astype(np.int16)):
        with pytest.raises(ValueError, match="anatomy of shard 0 is"):
            bank.write_shard(0, shape, modality[:4], mask[:4])
    with pytest.raises(ValueError, match="not finite"):
        bank.write_shard(0, FACTORS.anatomy[:4], np.full((4, MODALITY), np.nan, np.float32), FACTORS.mask[:4])
    assert digests(copy) == before


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": lambda b: shutil.rmtree(b),
    "a file": lambda b: b.rename(b.with_name("moved")) and b.write_text("x"),
    "no root": lambda b: (b / "zarr.json").unlink(),
    "root not JSON": lambda b: (b / "zarr.json").write_bytes(b"\xff\x00{"),
    "root a list": lambda b: (b / "zarr.json").write_text("[]"),
    "another format": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].update(format="ome-zarr")),
    "a later version": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].update(version=2)),
    "no canvas": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].pop("canvas")),
    "no checksum": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].pop("decoder_sha256")),
    "canvas of nothing": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].update(canvas=[0, 48])),
    "nine channels": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].update(channels=9)),
    "another canvas": lambda b: rewritten(b / "zarr.json", lambda d: d["attributes"].update(canvas=[16, 16])),
    "no index": lambda b: (b / "index.parquet").unlink(),
    "index cut": lambda b: (b / "index.parquet").write_bytes((b / "index.parquet").read_bytes()[:200]),
    "index of something else": lambda b: pa.parquet.write_table(pa.table({"a": [1]}), b / "index.parquet"),
    "index without its checksum": lambda b: pa.parquet.write_table(index(), b / "index.parquet"),
    "index shorter": lambda b: pa.parquet.write_table(index().slice(0, 9), b / "index.parquet"),
    "no array": lambda b: shutil.rmtree(b / "mask"),
    "array not JSON": lambda b: (b / "anatomy" / "zarr.json").write_text("{"),
    "array of another codec": lambda b: rewritten(b / "mask" / "zarr.json", lambda d: d["codecs"].clear()),
    "array of another shape": lambda b: rewritten(b / "anatomy" / "zarr.json", lambda d: d.update(shape=[9, 32, 48])),
    "no ledger": lambda b: shutil.rmtree(b / "ledger"),
    "ledger entry cut": lambda b: (b / "ledger" / "shard-00001.json").write_text('{"start": 4,'),
    "ledger entry a list": lambda b: (b / "ledger" / "shard-00001.json").write_text("[1]"),
    "ledger entry of other rows": lambda b: rewritten(b / "ledger" / "shard-00001.json", lambda d: d.update(stop=9)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_opening_a_damaged_bank_is_one_clear_line(copy: Path, damage: Callable[[Path], object]) -> None:
    damage(copy)
    with pytest.raises(InputError) as caught:
        FactorBank.open(str(copy))
    assert str(caught.value).startswith("bank.zarr")
    assert "\n" not in str(caught.value)


DATA_DAMAGES: dict[str, Callable[[Path], object]] = {
    "anatomy shard lost": lambda b: (b / "anatomy" / "c" / "1" / "0" / "0").unlink(),
    "mask shard lost": lambda b: (b / "mask" / "c" / "1" / "0" / "0").unlink(),
    "modality chunk lost": lambda b: (b / "modality" / "c" / "1" / "0").unlink(),
    "anatomy shard cut": lambda b: (b / "anatomy" / "c" / "1" / "0" / "0").write_bytes(b"x" * 50),
    "anatomy shard emptied": lambda b: (b / "anatomy" / "c" / "1" / "0" / "0").write_bytes(b""),
    "shards swapped": lambda b: shutil.copy(b / "mask" / "c" / "0" / "0" / "0", b / "mask" / "c" / "1" / "0" / "0"),
}


@pytest.mark.parametrize("damage", DATA_DAMAGES.values(), ids=DATA_DAMAGES)
def test_damaged_data_are_never_read_as_factors(copy: Path, damage: Callable[[Path], object]) -> None:
    damage(copy)
    bank = FactorBank.open(str(copy))
    with pytest.raises(InputError, match=r"^bank\.zarr, shard 1: its (anatomy|mask|modality)"):
        bank.read([5])
    assert same(bank.read([0, 9]), [0, 9])
    assert len(verify(bank)) == 1


@pytest.mark.parametrize("at", range(0, 100, 9))
def test_a_flipped_byte_anywhere_in_a_shard_is_found(copy: Path, at: int) -> None:
    path = copy / "anatomy" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[at * len(content) // 100] ^= 0x10
    path.write_bytes(content)
    bank = FactorBank.open(str(copy))
    try:
        assert same(bank.read_shard(0), slice(0, 4))  # a byte that no value depends on
    except InputError:
        assert len(verify(bank)) == 1


def test_verify_names_a_changed_decoder_strays_and_what_no_bank_holds(copy: Path) -> None:
    bank = FactorBank.open(str(copy))
    mask = FACTORS.mask[4:8].copy()
    mask[0, 10:20, 10:20] = 7
    bank.write_shard(1, FACTORS.anatomy[4:8], FACTORS.modality[4:8], mask)
    (copy / "decoder.safetensors").write_bytes(b"Weights")
    (copy / "notes.txt").write_text("mine")
    (copy / "mask" / "c" / "9").mkdir()
    ledger.commit(str(copy), 7, ledger.Entry(28, 32, {}, {}, "", "0123456789abcdef", "1"))
    problems = verify(FactorBank.open(str(copy)))
    words = ("decoder", "notes.txt", "shard 7", "mask/c/9", "shard 1: its mask has values")
    assert len(problems) == len(words)
    for word in words:
        assert any(word in p for p in problems), word


def test_verify_tells_bits_beyond_the_channels(tmp_path: Path) -> None:
    problems = verify(made(tmp_path / "b", channels=7))
    assert problems == [f"b, shard {k}: its anatomy has bits beyond the 7 channels" for k in range(3)]


def test_an_index_of_other_slices_with_a_checksum_of_its_own_vouches_for_no_shard(copy: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other.zarr", subjects=("s2", "s3"))
    shutil.copy(tmp_path / "other.zarr" / "index.parquet", copy / "index.parquet")
    assert other.committed() == {0, 1, 2}
    assert FactorBank.open(str(copy), partial=True).committed() == set()


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        ({"vendor": "B"}, range(5, 10)),
        ({"labelled": False}, (8, 9)),
        ({"vendor": ["A", "B"], "slice": (0, 4)}, (0, 4, 5, 9)),
        ({"subject": "nobody"}, ()),
        ({}, range(10)),
    ],
)
def test_rows_are_found_by_what_the_index_says(whole: Path, columns: dict[str, Any], rows: Any) -> None:
    assert FactorBank.open(str(whole)).where(**columns).tolist() == list(rows)


def test_a_column_that_no_index_has_is_refused(whole: Path) -> None:
    with pytest.raises(InputError, match="where colour: an index has no such column"):
        FactorBank.open(str(whole)).where(colour="red")


@pytest.mark.parametrize("wrong", [{"top": -1}, {"left": 9}, {"height": 33}, {"width": 0}])
def test_an_index_whose_images_are_not_on_the_canvas_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    FactorBank.create(str(tmp_path / "b"), spec(), index(**wrong), DECODER, DECODER_CONFIG)
    with pytest.raises(InputError, match=r"b, index\.parquet: the image of row 0 is not on the canvas of 32 × 48"):
        FactorBank.open(str(tmp_path / "b"), partial=True)


def test_the_fingerprint_names_the_content(whole: Path, tmp_path: Path, copy: Path) -> None:
    name = FactorBank.open(str(whole)).fingerprint
    assert FactorBank.open(str(copy)).fingerprint == name
    assert made(tmp_path / "newer", code_version="9.9").fingerprint == name
    assert made(tmp_path / "part", range(2)).fingerprint != name
    bank = FactorBank.open(str(copy))
    bank.write_shard(2, FACTORS.anatomy[8:] ^ np.uint8(1), FACTORS.modality[8:], FACTORS.mask[8:])
    assert FactorBank.open(str(copy)).fingerprint != name


def test_a_bank_travels_between_processes_and_folders(copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    sent = pickle.loads(pickle.dumps(FactorBank.open(str(moved))))
    assert same(sent.load(), slice(None))


def test_a_bank_lives_in_an_object_store_too(whole: Path) -> None:
    bank = made("memory://store/bank.zarr")
    assert same(FactorBank.open("memory://store/bank.zarr").load(), slice(None))
    assert bank.fingerprint == FactorBank.open(str(whole)).fingerprint
    write(bank, 1)
    assert verify(bank) == []
    with pytest.raises(InputError, match="no factor bank here"):
        FactorBank.open("memory://store/other.zarr")
