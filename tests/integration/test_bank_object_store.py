"""A factor bank in a real S3 server (moto's, on loopback), and what a failing server does to it: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from storage import fs
from storage.bank.bank import FactorBank
from storage.bank.merge import merge
from storage.bank.node_cache import BankView
from storage.bank.styles import export_styles, import_styles, modality_donors
from storage.bank.verify import verify
from storage.errors import InputError, StageError
from tests.integration.s3_faults import FAULTS, every_fourth
from tests.storage.banks import factors, made, same, viewed

BUCKET = "s3://bucket"
ROOT = Path(__file__).resolve().parents[2]
THREE = ("s0", "s1", "s2")


@pytest.fixture
def patient(s3_proxy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The way by the proxy, with the driver's own number of tries."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_proxy.url, "key": "me", "secret": "hidden"})
    s3_proxy.mend()
    yield s3_proxy
    s3_proxy.mend()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bank of three subjects in a folder."""
    return made(tmp_path_factory.mktemp("banks") / "bank.zarr", subjects=THREE).uri


def files(bank: str) -> dict[str, bytes]:
    found, folders = {}, [bank]
    for folder in folders:
        for path in (fs.join(folder, name) for name in fs.list_names(folder)):
            if fs.is_folder(path):
                folders.append(path)
            else:
                found[path.removeprefix(bank)] = fs.read_bytes(path)
    return found


def test_a_bank_in_a_bucket_has_the_bytes_of_one_in_a_folder_and_grows_too(s3_endpoint: str, local: str) -> None:
    bank = f"{BUCKET}/plain/bank.zarr"
    made(bank)
    assert verify(made(bank, subjects=THREE)) == []
    assert files(bank) == files(local)


def test_plain_zarr_reads_it(s3_endpoint: str) -> None:
    import zarr

    made(f"{BUCKET}/zarr/bank.zarr")
    found = zarr.open_array(f"{BUCKET}/zarr/bank.zarr/anatomy", mode="r")
    assert (found[:] == factors().anatomy).all()  # type: ignore[union-attr, operator]


@pytest.mark.slow
def test_a_server_that_fails_every_fourth_request_loses_nothing(patient: Any, local: str, tmp_path: Path) -> None:
    failed: list[str] = []
    patient.fault = every_fourth(failed)
    bank = f"{BUCKET}/shaky/bank.zarr"
    made(bank, shards=[0])
    made(bank, subjects=THREE)
    opened = FactorBank.open(bank)
    assert verify(opened) == []
    assert same(viewed(BankView(opened, cache=str(tmp_path))), slice(None), factors(THREE))
    patient.mend()
    assert set(failed) == set(FAULTS)
    assert files(bank) == files(local)


def test_merging_and_styles_work_in_a_bucket_too(s3_endpoint: str, tmp_path: Path) -> None:
    parts = [made(f"{BUCKET}/sites/{name}.zarr", subjects=(name,)).uri for name in ("s0", "s1")]
    merged = merge(parts, f"{BUCKET}/sites/both.zarr")
    assert same(merged.load(), slice(None))
    export_styles(made(f"{BUCKET}/sites/s2.zarr", subjects=("s2",)), f"{BUCKET}/sites/styles.parquet")
    import_styles(f"{BUCKET}/sites/styles.parquet", merged)
    assert len(modality_donors(FactorBank.open(merged.uri), str(tmp_path))) == 15


@pytest.mark.slow
def test_whenever_the_server_goes_away_it_is_one_line_and_nothing_is_called_damaged(
    s3_proxy: Any, s3_impatient: dict[str, Any], local: str, tmp_path: Path
) -> None:
    def work(bank: str, begin: tuple[str, ...] = THREE[:2]) -> None:
        made(bank, subjects=begin)
        opened = made(bank, subjects=THREE)
        assert verify(opened) == []
        assert same(viewed(BankView(opened, cache=str(tmp_path / fs.base_name(bank)))), slice(None), factors(THREE))

    s3_proxy.mend()
    work(f"{BUCKET}/unhurried")
    needed = len(s3_proxy.requests)
    assert needed > 60
    for answered in range(0, needed, needed // 5):
        bank = f"{BUCKET}/after{answered}"
        s3_proxy.mend()
        s3_proxy.fault = lambda number, method, last=answered: "503" if len(s3_proxy.requests) > last else None
        with pytest.raises(StageError) as caught:
            work(bank)
        assert "\n" not in str(caught.value)
        s3_proxy.mend()
        work(bank, THREE)  # and it goes on
        assert files(bank) == files(local)


def test_a_bank_that_is_not_there_is_bad_input(s3_endpoint: str) -> None:
    with pytest.raises(InputError, match="no factor bank here"):
        FactorBank.open(f"{BUCKET}/nowhere.zarr")
    with pytest.raises(InputError, match="no such bucket"):
        FactorBank.open("s3://nowhere/bank.zarr")


@pytest.mark.slow
def test_a_dead_server_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    foreign = ("AWS_", "FSSPEC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "t", "AWS_SECRET_ACCESS_KEY": "t"}
    command = [sys.executable, "-m", "experiments", "bank", "info", f"{BUCKET}/bank.zarr"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("failed: s3://bucket/bank.zarr/zarr.json: the object store failed")
    assert len(done.stderr.splitlines()) == 1
