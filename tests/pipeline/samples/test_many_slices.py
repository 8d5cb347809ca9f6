"""What a maker of samples and the driver ask of a store and a bank with 10⁵ slices: requests and scans, not seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import draw_up, make_settings
from experiments.run import jobs
from experiments.run.workload import workload
from pipeline.samples.maker import SampleMaker
from storage import fs
from storage.bank import bank, index, ledger
from storage.bank.bank import FactorBank
from storage.slices import store as slice_store

ROWS = 100_000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARDIOMIX_CACHE", str(place / "cache"))
        draw_up(str(place / "run"), ROWS)
        yield str(place / "run")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Files read and folders listed, by name (a shard's entry as `entry`); and passes over the whole of an index."""
    seen: Counter[str] = Counter()

    def watched(of: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
        def call(first: Any, *others: Any, **named: Any) -> Any:
            seen[name(first)] += 1
            return of(first, *others, **named)

        return call

    def file(uri: str) -> str:
        return "entry" if f"/{ledger.FOLDER}/" in uri else "/".join(uri.split("/")[-2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "read_bytes", watched(fs.read_bytes, file))
        patch.setattr(fs, "list_names", watched(fs.list_names, lambda uri: f"listing of {fs.base_name(uri)}"))
        digests = watched(index.row_digests, lambda _: "digests of the index")
        for module in (index, bank):
            patch.setattr(module, "row_digests", digests)
        patch.setattr(slice_store, "name_of", watched(slice_store.name_of, lambda _: "name of the slices"))
        yield seen


def test_a_makers_start_reads_every_file_once_and_no_ledger_entry(run: str) -> None:
    stream = jobs.arm_stream(run, make_settings(run), "ss_sdnet_ra_fa")
    SampleMaker(stream)  # fills the node's cache
    with counted() as seen:
        maker = SampleMaker(stream)
    assert maker.bank is not None and maker.bank.shards() == ROWS * 4 // 5 // 64
    assert seen.pop("listing of styles") <= 2  # for the bank's name, and to read them
    assert max(seen.values()) == 1, seen
    assert seen["bank.zarr/manifest.json"] == 1 and seen["entry"] == 0
    assert sum(seen.values()) <= 12, seen


def test_a_bank_without_a_manifest_is_scanned_once(run: str, tmp_path: Path) -> None:
    stream = jobs.arm_stream(run, make_settings(run), "ss_sdnet_ra_fa")
    named = FactorBank.open(f"{run}/bank.zarr").fingerprint
    hidden = Path(run, "bank.zarr", ledger.MANIFEST).rename(tmp_path / "hidden")
    try:
        with counted() as seen:
            opened = SampleMaker(stream).bank
    finally:
        hidden.rename(Path(run, "bank.zarr", ledger.MANIFEST))
    assert opened is not None and opened.fingerprint == named
    assert seen.pop("entry") == opened.shards()
    assert seen.pop("listing of styles") <= 2
    assert seen.pop("digests of the index") == 2  # of the whole, and of every shard
    assert max(seen.values()) == 1, seen


def test_a_plan_asks_no_entry_and_works_no_name_out(run: str) -> None:
    settings = make_settings(run).model_copy(update={"seeds": 3})
    with counted() as seen:
        work = workload(run, settings)
        jobs.require_trainable(run, settings)
    assert len(work.arms) == 15
    assert seen["entry"] == seen["name of the slices"] == 0
    with counted() as more_arms:
        jobs.arm_runs(run, settings)
    assert more_arms["bank.zarr/index.parquet"] <= 2 and more_arms["run/slices.parquet"] <= 3, more_arms
