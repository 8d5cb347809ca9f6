"""The node's packed cache: filled once by whoever comes first, never half, bounded; and the map-style view on it."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage.bank.bank import FactorBank
from storage.bank.node_cache import FOLDER, LIMIT, BankView
from storage.errors import InputError
from tests.storage.banks import FACTORS, N, index, made, same

ROOT = Path(__file__).resolve().parents[3]
# Opens the view of bank argv[1] on cache argv[2], says how many shards it read of it, and checks what it sees.
READER = """
import os, signal, sys
from storage.bank.bank import FactorBank
from storage.bank.node_cache import BankView
from tests.storage.banks import same
reads, read_array = 0, FactorBank.read_array

def counted(self, name, shard, out=None):
    global reads
    reads += 1
    if reads == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_array(self, name, shard, out)

FactorBank.read_array = counted
sys.stdin.readline()
assert same(BankView(FactorBank.open(sys.argv[1]), cache=sys.argv[2]), slice(None))
print(reads)
"""
NEVER = "0"


def reader(bank: Path, cache: Path, dies_at: str = NEVER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, str(bank), str(cache), dies_at]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_view_gives_every_slice_bit_for_bit_and_what_the_index_says(whole: Path, cache: Path) -> None:
    view = BankView(FactorBank.open(str(whole)), cache=str(cache))
    assert len(view) == N
    for row, facts in enumerate(index().to_pylist()):
        found = view[row]
        for name in ("anatomy", "mask", "modality"):
            assert np.array_equal(found.pop(name), getattr(FACTORS, name)[row])
        assert found == facts
    assert view[-1]["row"] == N - 1
    with pytest.raises(IndexError, match="slice 10 of 10"):
        view[N]


def test_a_view_of_some_rows_has_these_in_their_order(whole: Path, cache: Path) -> None:
    bank = FactorBank.open(str(whole))
    view = BankView(bank, bank.where(vendor="B", labelled=True)[::-1], cache=str(cache))
    assert [facts["row"] for facts in view] == [7, 6, 5]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        BankView(bank, [0, N])


def test_what_is_read_is_not_the_cache_itself(whole: Path, cache: Path) -> None:
    view = BankView(FactorBank.open(str(whole)), cache=str(cache))
    view[0]["anatomy"][:] = 0
    assert np.array_equal(view[0]["anatomy"], FACTORS.anatomy[0])
    with pytest.raises(ValueError, match="read-only"):
        view.anatomy[0] = 0


def test_torch_s_data_loader_takes_a_view_as_it_is_in_worker_processes_too(whole: Path, cache: Path) -> None:
    from torch.utils.data import DataLoader

    view = BankView(FactorBank.open(str(whole)), cache=str(cache))
    for workers, context in ((0, None), (2, "spawn")):
        loader = DataLoader(view, batch_size=4, num_workers=workers, multiprocessing_context=context)  # type: ignore[arg-type, var-annotated]
        batches = list(loader)
        for name in ("anatomy", "mask", "modality"):
            assert np.array_equal(np.concatenate([b[name].numpy() for b in batches]), getattr(FACTORS, name))
        assert [name for b in batches for name in b["subject"]] == index()["subject"].to_pylist()


def test_several_processes_at_once_fill_it_exactly_once(whole: Path, cache: Path) -> None:
    readers = [reader(whole, cache) for _ in range(4)]
    counts = sorted(int(r.communicate("go\n", timeout=60)[0]) for r in readers)
    assert counts == [0, 0, 0, 9]  # three shards of three arrays, all by one
    assert len(list(cache.rglob("*.bin"))) == 3


@pytest.mark.parametrize("dies_at", ["1", "3", "5", "9"])
def test_whoever_is_killed_while_filling_it_leaves_nothing_that_is_taken_for_it(
    whole: Path, cache: Path, dies_at: str
) -> None:
    dying = reader(whole, cache, dies_at)
    dying.communicate("go\n", timeout=60)
    assert dying.returncode == -signal.SIGKILL
    assert list(cache.rglob("*.partial"))
    assert same(BankView(FactorBank.open(str(whole)), cache=str(cache)), slice(None))
    assert not list(cache.rglob("*.partial"))


def test_the_cache_needs_no_bank_any_more(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(cache))
    view = BankView(FactorBank.open(str(whole)))
    assert same(view, slice(None))
    monkeypatch.setattr(FactorBank, "read_array", None)
    assert same(pickle.loads(pickle.dumps(view)), slice(None))


def test_damage_is_found_while_it_is_filled_and_nothing_stays(tmp_path: Path, cache: Path) -> None:
    made(tmp_path / "bank.zarr")
    shard = tmp_path / "bank.zarr" / "anatomy" / "c" / "1" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"bank\.zarr, shard 1: its anatomy is not what the ledger says"):
        _ = BankView(FactorBank.open(str(tmp_path / "bank.zarr")), cache=str(cache)).anatomy
    assert [p for p in cache.rglob("*") if p.suffix in (".bin", ".partial")] == []


def test_a_changed_bank_has_another_cache(tmp_path: Path, cache: Path) -> None:
    bank = made(tmp_path / "bank.zarr")
    assert same(BankView(bank, cache=str(cache)), slice(None))
    bank.write_shard(0, FACTORS.anatomy[:4] ^ np.uint8(1), FACTORS.modality[:4], FACTORS.mask[:4])
    assert np.array_equal(BankView(bank, cache=str(cache)).anatomy[0], FACTORS.anatomy[0] ^ 1)


def test_banks_opened_longest_ago_go_when_the_limit_is_reached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = [made(tmp_path / f"{k}.zarr", subjects=("s0", f"s{k}")) for k in (1, 2, 3)]
    monkeypatch.setenv(LIMIT, str(2.5 * FACTORS.anatomy.nbytes / 1e9))
    views = [BankView(bank, cache=str(cache)) for bank in banks]
    first = views[0].anatomy
    (cache / "0123456789abcdef-1a2b3c4d").mkdir()  # of an earlier boot
    _ = views[1].anatomy
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2
    _ = views[2].anatomy
    kept = {p.parent.name.split("-")[0] for p in cache.rglob("*.bin")}
    assert kept == {banks[1].fingerprint, banks[2].fingerprint}
    assert np.array_equal(first, FACTORS.anatomy)  # whoever has it mapped keeps it


def test_what_a_bank_has_there_already_counts_towards_the_limit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (made(tmp_path / f"{k}.zarr", subjects=("s0", f"s{k}")) for k in (1, 2))
    _ = BankView(first, cache=str(cache)).anatomy
    monkeypatch.setenv(LIMIT, str(2.5 * FACTORS.anatomy.nbytes / 1e9))
    view = BankView(second, cache=str(cache))
    _ = view.anatomy
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2
    _ = view.mask  # as large as the anatomy: with both of them there is no room for the first bank
    kept = {p.parent.name.split("-")[0] for p in cache.rglob("*.bin")}
    assert kept == {second.fingerprint}


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_cache_that_cannot_be_is_one_clear_line(whole: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"cannot hold a bank's cache .*; name a folder .*{FOLDER}"):
        _ = BankView(FactorBank.open(str(whole)), cache=str(tmp_path / folder)).anatomy


def test_a_disk_without_room_is_one_clear_line(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match=r"has 0\.00 GB free"):
        _ = BankView(FactorBank.open(str(whole)), cache=str(cache)).anatomy


def test_a_copied_bank_alone_is_enough_offline_without_torch_or_ray(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy.zarr"))
    code = f"""
import sys
from storage.bank.bank import FactorBank
from storage.bank.node_cache import BankView
from storage.bank.styles import modality_donors
from tests.storage.banks import DECODER, DECODER_CONFIG, FACTORS, same
bank = FactorBank.open({str(copy)!r})
view, donors = BankView(bank, cache={str(tmp_path / "cache")!r}), modality_donors(bank, {str(tmp_path / "cache")!r})
assert same(view, slice(None)) and (donors.modality == FACTORS.modality).all()
assert bank.decoder() == (DECODER, DECODER_CONFIG)
assert not {{"torch", "ray", "mlflow", "zarr"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
