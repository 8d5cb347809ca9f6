"""The node's packed cache: filled once by whoever comes first, never half, bounded; and the map-style view on it."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.bank.bank import BANK_INDEX_SCHEMA, FactorBank
from storage.bank.node_cache import VERSION, BankView
from storage.errors import InputError
from storage.node_folder import FOLDER, LIMIT, boot
from tests.storage.banks import CANVAS, FACTORS, MODALITY, N, index, made, same, spec, viewed

ROOT = Path(__file__).resolve().parents[3]
# Opens the view of bank argv[1] on cache argv[2], says how many shards it read of it, and checks what it sees.
READER = """
import os, signal, sys
from storage.bank.bank import FactorBank
from storage.bank.node_cache import BankView
from tests.storage.banks import same, viewed
reads, read_rows = 0, FactorBank.read_rows

def counted(self, *which):
    global reads
    reads += 1
    if reads == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_rows(self, *which)

FactorBank.read_rows = counted
sys.stdin.readline()
assert same(viewed(BankView(FactorBank.open(sys.argv[1]), cache=sys.argv[2])), slice(None))
print(reads)
"""
NEVER = "0"
INSIDE, IMAGE_BYTES = np.s_[1:31, 4:44], 30 * 40  # of each image of the bank on its canvas of 32 × 48

# top, left, height and width of an image anywhere on the canvas
extents = st.builds(
    lambda rows, columns: (rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]),
    *(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True).map(sorted) for n in CANVAS),
)


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


def bank_of(path: Path, places: list[tuple[int, int, int, int]], shard: int, canvas: tuple[int, int]) -> FactorBank:
    """A bank of noise inside these extents, every fourth mask empty."""
    facts = index().to_pylist()[0]
    rows = [
        facts | {"row": row, "slice": row} | dict(zip(("top", "left", "height", "width"), place, strict=True))
        for row, place in enumerate(places)
    ]
    table = pa.Table.from_pylist(rows, schema=BANK_INDEX_SCHEMA)
    bank, rng = (
        FactorBank.create(str(path), spec(shard_slices=shard, canvas=canvas), table, b"", {}),
        np.random.default_rng(0),
    )
    for number in range(bank.shards()):
        part = bank.shard_rows(number)
        anatomy, mask = (np.zeros((len(part), *canvas), dtype=np.uint8) for _ in range(2))
        for k, row in enumerate(part):
            top, left, height, width = places[row]
            anatomy[k, top : top + height, left : left + width] = rng.integers(0, 256, (height, width))
            mask[k, top : top + height, left : left + width] = rng.integers(0, 4, (height, width)) * (row % 4 > 0)
        bank.write_shard(number, anatomy, rng.standard_normal((len(part), MODALITY)).astype(np.float32), mask)
    return bank


@given(st.lists(extents, min_size=1, max_size=9), st.integers(1, 4))
def test_images_of_any_extents_come_back_as_the_bank_has_them_and_take_no_more_than_their_pixels(
    places: list[tuple[int, int, int, int]], shard: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bank = bank_of(Path(folder) / "bank.zarr", places, shard, CANVAS)
        view, expected = BankView(bank, cache=f"{folder}/cache"), bank.load()
        assert same(viewed(view), slice(None), expected)
        for row, (top, left, height, width) in enumerate(places):
            for name in ("anatomy", "mask"):
                inside = getattr(expected, name)[row, top : top + height, left : left + width]
                assert np.array_equal(getattr(view, name)[row], inside)
        for name in ("anatomy", "mask"):
            assert len(getattr(view, name)) == len(places)
            (file,) = Path(folder, "cache").rglob(f"{name}.bin")
            assert file.stat().st_size == sum(height * width for *_, height, width in places)


def test_filling_it_takes_less_memory_than_a_shard(tmp_path: Path, cache: Path) -> None:
    canvas, shard = (128, 128), 32
    view = BankView(bank_of(tmp_path / "bank.zarr", [(40, 40, 48, 48)] * 3 * shard, shard, canvas), cache=str(cache))
    tracemalloc.start()
    try:
        _ = view.anatomy
        assert tracemalloc.get_traced_memory()[1] < shard * canvas[0] * canvas[1]
    finally:
        tracemalloc.stop()


def test_what_is_read_is_not_the_cache_itself(whole: Path, cache: Path) -> None:
    view = BankView(FactorBank.open(str(whole)), cache=str(cache))
    view[0]["anatomy"][:] = 0
    assert np.array_equal(view[0]["anatomy"], FACTORS.anatomy[0])
    with pytest.raises(ValueError, match="read-only"):
        view.anatomy[0][:] = 0


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
    assert same(viewed(BankView(FactorBank.open(str(whole)), cache=str(cache))), slice(None))
    assert not list(cache.rglob("*.partial"))


def test_the_cache_needs_no_bank_any_more(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(cache))
    view = BankView(FactorBank.open(str(whole)))
    assert same(viewed(view), slice(None))
    monkeypatch.setattr(FactorBank, "read_rows", None)
    assert same(viewed(pickle.loads(pickle.dumps(view))), slice(None))


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
    assert same(viewed(BankView(bank, cache=str(cache))), slice(None))
    flipped = np.flip(FACTORS.anatomy[:4], axis=2)
    bank.write_shard(0, flipped, FACTORS.modality[:4], FACTORS.mask[:4])
    assert np.array_equal(BankView(bank, cache=str(cache))[0]["anatomy"], flipped[0])


def test_banks_opened_longest_ago_go_when_the_limit_is_reached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = [made(tmp_path / f"{k}.zarr", subjects=("s0", f"s{k}")) for k in (1, 2, 3)]
    monkeypatch.setenv(LIMIT, str(2.5 * N * IMAGE_BYTES / 1e9))
    views = [BankView(bank, cache=str(cache)) for bank in banks]
    first = views[0].anatomy
    (cache / f"0123456789abcdef-v{VERSION}-1a2b3c4d").mkdir()  # of an earlier boot
    _ = views[1].anatomy
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2
    _ = views[2].anatomy
    kept = {p.parent.name.split("-")[0] for p in cache.rglob("*.bin")}
    assert kept == {banks[1].fingerprint, banks[2].fingerprint}
    assert all(np.array_equal(first[row], FACTORS.anatomy[row][INSIDE]) for row in range(N))  # whoever has it mapped


def test_a_folder_of_the_earlier_layout_is_never_read_and_goes_as_any_other_bank(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = FactorBank.open(str(whole))
    earlier = cache / f"{bank.content_fingerprint}-{boot()}"
    earlier.mkdir(parents=True)
    (earlier / "anatomy.bin").write_bytes(b"\xff" * FACTORS.anatomy.nbytes)  # rows on the whole canvas
    monkeypatch.setenv(LIMIT, str(FACTORS.anatomy.nbytes / 1e9))
    assert same(viewed(BankView(bank, cache=str(cache))), slice(None))
    assert not earlier.exists()


def test_what_a_bank_has_there_already_counts_towards_the_limit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (made(tmp_path / f"{k}.zarr", subjects=("s0", f"s{k}")) for k in (1, 2))
    _ = BankView(first, cache=str(cache)).anatomy
    monkeypatch.setenv(LIMIT, str(2.5 * N * IMAGE_BYTES / 1e9))
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
from tests.storage.banks import DECODER, DECODER_CONFIG, FACTORS, same, viewed
bank = FactorBank.open({str(copy)!r})
view, donors = BankView(bank, cache={str(tmp_path / "cache")!r}), modality_donors(bank, {str(tmp_path / "cache")!r})
assert same(viewed(view), slice(None)) and (donors.modality == FACTORS.modality).all()
assert bank.decoder() == (DECODER, DECODER_CONFIG)
assert not {{"torch", "ray", "mlflow", "zarr"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
