"""New subjects in an existing bank: what stays, what is refused, and a process killed at every write."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.bank.bank import FactorBank
from storage.bank.merge import merge
from storage.bank.verify import verify
from storage.errors import InputError
from tests.storage.banks import DECODER, DECODER_CONFIG, FACTORS, digests, factors, index, made, same, spec, write

ROOT = Path(__file__).resolve().parents[3]
THREE = ("s0", "s1", "s2")
# Extends the bank argv[1] in this process, and is killed by SIGKILL before (or, if "after", after) its write argv[2].
KILLED = """
import os, signal, sys
from storage import fs
from tests.storage.banks import made
bank, number, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
writes, write_bytes = 0, fs.write_bytes

def counted(path, data):
    global writes
    writes += 1
    if writes == number and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    write_bytes(path, data)
    if writes == number:
        os.kill(os.getpid(), signal.SIGKILL)

fs.write_bytes = counted
made(bank, subjects=("s0", "s1", "s2"))
"""
WRITES = 3 + 1 + 2 * 4  # the arrays' metadata, the index, two shards of three files and an entry


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank of all three subjects, made at once."""
    path = tmp_path_factory.mktemp("banks") / "bank.zarr"
    made(path, subjects=THREE)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "bank.zarr"
    made(path)
    return path


def test_an_extended_bank_has_the_bytes_of_one_made_at_once(two: Path, three: Path) -> None:
    before = (two / "anatomy" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    bank = made(two, subjects=THREE)
    assert bank.is_complete()
    assert digests(two) == digests(three)
    assert (two / "anatomy" / "c" / "0" / "0" / "0").stat().st_mtime_ns == before


def test_only_a_last_shard_that_was_not_full_is_to_be_written_again(two: Path) -> None:
    bank = FactorBank.open(str(two)).append(index(THREE))
    assert (len(bank), bank.shards(), bank.committed()) == (15, 4, {0, 1})
    with pytest.raises(InputError, match="2 of 4 shards are missing"):
        FactorBank.open(str(two))


def test_rows_keep_their_places_wherever_the_new_subjects_stand_in_the_run(two: Path) -> None:
    bank = made(two, shards=[], subjects=("s2", "s0", "s1"))
    assert bank.index["subject"].to_pylist()[::5] == ["s0", "s1", "s2"]
    assert bank.index["row"].to_pylist() == list(range(15))


def test_nothing_new_changes_nothing(two: Path) -> None:
    before, bank = digests(two), FactorBank.open(str(two))
    assert bank.append(index(("s1", "s0"))) is bank
    assert digests(two) == before


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (index(("s0", "s2")), "holds other slices than the run: 5 of them are not among its own"),
        (index(THREE, pixel_area_mm2=9.0), "some of the same name have changed"),
        (index(THREE).slice(0, 12).append_column("colour", [["red"] * 12]), None),
    ],
    ids=["removed subject", "changed subject", "further column"],
)
def test_removed_or_changed_subjects_are_refused(two: Path, wanted: object, says: str | None) -> None:
    before, bank = digests(two), FactorBank.open(str(two))
    if says is None:
        assert len(bank.append(wanted)) == 12
        return
    with pytest.raises(InputError, match=says):
        bank.append(wanted)
    assert digests(two) == before


def test_a_slice_larger_than_the_canvas_is_refused_and_told_what_to_do(two: Path) -> None:
    before = digests(two)
    rows = index(THREE).to_pylist()
    larger = index(THREE).from_pylist([r | ({"height": 50} if r["subject"] == "s2" else {}) for r in rows])
    with pytest.raises(InputError, match=r"its canvas is 32 × 48, the new slices need 50 × 40; .*bank merge"):
        FactorBank.create(str(two), spec(canvas=(64, 48)), larger, DECODER, DECODER_CONFIG)
    assert digests(two) == before


def test_new_slices_are_centred_on_the_bank_s_canvas_whatever_the_run_s(two: Path) -> None:
    rows = index(THREE, top=99, left=99)
    appended = FactorBank.create(str(two), spec(canvas=(64, 64)), rows, DECODER, DECODER_CONFIG)
    assert set(appended.index["top"].to_pylist()) == {1}
    assert set(appended.index["left"].to_pylist()) == {4}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_killed_at_any_write_it_is_the_old_bank_or_the_new_and_goes_on(
    number: int, moment: str, two: Path, three: Path
) -> None:
    killed(two, number, moment)
    bank = FactorBank.open(str(two), partial=True)
    assert len(bank) in (10, 15)
    if len(bank) == 10:
        assert same(bank.load(), slice(None))
    else:
        assert {0, 1} <= bank.committed()
        assert same(bank.read(range(8)), slice(0, 8))
    made(two, subjects=THREE).tidy()
    assert digests(two) == digests(three)


@pytest.mark.parametrize("number", [2, 4, 5, 8])
def test_killed_at_a_write_it_goes_on(number: int, two: Path, three: Path) -> None:
    killed(two, number, "before")
    made(two, subjects=THREE).tidy()
    assert digests(two) == digests(three)


def killed(bank: Path, number: int, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(bank), str(number), moment], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_an_extension_cut_short_reads_as_the_old_bank_to_plain_zarr_too(two: Path, three: Path) -> None:
    import zarr

    for name in ("anatomy", "mask", "modality"):
        shutil.copy(three / name / "zarr.json", two / name / "zarr.json")
    found = zarr.open_group(str(two), mode="r")
    assert np.array_equal(np.asarray(found["anatomy"])[:10], FACTORS.anatomy)
    assert same(FactorBank.open(str(two)).load(), slice(None))
    assert same(made(two, subjects=THREE).load(), slice(None), factors(THREE))


def partly_drawn(subjects: tuple[str, ...]) -> pa.Table:
    """The index of subjects of which s2 has no RV."""
    rows = index(subjects)
    facts = zip(rows["subject"].to_pylist(), rows["labelled"].to_pylist(), strict=True)
    told = [("LV MYO" if name == "s2" else "LV MYO RV") if labelled else "" for name, labelled in facts]
    return rows.append_column(pa.field("structures", pa.string(), nullable=False), pa.array(told))


def test_a_subject_with_partly_drawn_masks_says_so_and_leaves_committed_shards(two: Path, tmp_path: Path) -> None:
    before = FactorBank.open(str(two))
    assert partly_drawn(("s0", "s1")).num_columns == before.index.num_columns + 1
    assert before.append(partly_drawn(("s0", "s1"))) is before  # all is drawn: nothing is new
    bank = before.append(partly_drawn(THREE))
    assert bank.committed() == {0, 1} and bank.index.column_names[-1] == "structures"
    found = FactorBank.open(str(two), partial=True)
    assert found.index.equals(bank.index) and found.where(structures="LV MYO").tolist() == [10, 11, 12, 13, 14]
    with pytest.raises(InputError, match="some of the same name have changed"):
        bank.append(index(THREE))
    for shard in (2, 3):
        write(bank, shard, factors(THREE))
    other = made(tmp_path / "other.zarr", subjects=("s3", "s4"))
    merged = merge([other.uri, bank.uri], str(tmp_path / "both.zarr"))
    assert merged.where(structures="LV MYO").tolist() == list(range(20, 25))
    assert merged.where(structures="", labelled=False).tolist() == merged.where(labelled=False).tolist()
    assert verify(merged) == []
