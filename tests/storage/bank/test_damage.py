"""A bank with any file cut, changed, removed or exchanged: one clear line, or the right factors."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.bank.bank import FactorBank
from storage.bank.node_cache import BankView
from storage.bank.styles import export_styles, import_styles, modality_donors
from storage.bank.verify import verify
from storage.errors import InputError
from tests.storage.banks import factors, made, same, viewed

PARTS = ("s0", "s1"), ("s2", "s3"), ("s4", "s5")
HOWS = ("truncate", "flip", "delete", "empty", "swap", "exchange", "grow", "folder", "zero")


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bank with imported styles, and another of the same network."""
    folder = tmp_path_factory.mktemp("banks")
    first, second, third = (made(folder / f"{k}.zarr", subjects=part) for k, part in enumerate(PARTS))
    export_styles(third, str(folder / "styles.parquet"))
    import_styles(str(folder / "styles.parquet"), first)
    return Path(first.uri), Path(second.uri)


def damage(bank: Path, other: Path, file: Path, how: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    siblings = [p for p in sorted(bank.rglob("*")) if p.is_file() and p != file]
    if how == "flip":
        for _ in range(rng.choice((1, 1, 4))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del content[rng.randrange(len(content)) :]
    elif how == "grow":
        content += rng.randbytes(rng.randint(1, 40))
    elif how == "zero":
        at = rng.randrange(len(content))
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif how == "empty":
        content.clear()
    elif how == "exchange" and (other / file.relative_to(bank)).is_file():
        content = bytearray((other / file.relative_to(bank)).read_bytes())
    elif how == "swap":
        content = bytearray(rng.choice(siblings).read_bytes())
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "delete":
        file.write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), how=st.sampled_from(HOWS))
def test_whatever_happens_to_a_file_it_is_one_clear_line_or_the_right_factors(
    banks: tuple[Path, Path], tmp_path: Path, seed: int, how: str
) -> None:
    rng, bank = random.Random(seed), tmp_path / "bank.zarr"
    shutil.rmtree(bank, ignore_errors=True)
    shutil.copytree(banks[0], bank)
    files = [p for p in sorted(bank.rglob("*")) if p.is_file()]
    damage(bank, banks[1], rng.choice(files), how, rng)
    expected, cache = factors(PARTS[0]), str(tmp_path / "cache")

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(bank.rglob("*")) if path.is_file()}

    before = contents()

    def steps() -> None:
        found = FactorBank.open(str(bank), partial=True)
        _ = found.fingerprint
        for problem in verify(found):
            assert "\n" not in problem
        for shard in range(found.shards()):
            try:
                read = found.read_shard(shard)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                rows = found.shard_rows(shard)
                assert same(read, slice(rows.start, rows.stop), expected)
        whole = FactorBank.open(str(bank))
        assert same(viewed(BankView(whole, cache=cache)), slice(None), expected)
        assert len(modality_donors(whole, cache)) in (10, 20)  # a file of styles that is gone is not missed
        whole.decoder()

    try:
        steps()
    except InputError as error:
        assert str(error).startswith("bank.zarr")
        assert "\n" not in str(error)
    assert contents() == before  # whatever was found wrong, reading mended and lost nothing
