"""The bank verbs of the command line: what they print, and what they refuse in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.cli.main import app
from storage.bank.bank import FactorBank
from storage.errors import InputError
from tests.storage.banks import made


def bank(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bank", *map(str, arguments)])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks")
    made(folder / "one.zarr")
    made(folder / "two.zarr", subjects=("s2", "s3"))
    made(folder / "part.zarr", shards=[0, 2], subjects=("s4", "s5"))
    return folder


@pytest.mark.parametrize("verb", ["info", "verify", "merge", "export-styles", "import-styles"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = bank(verb, "--help")
    assert done.exit_code == 0
    assert "Example:  cardiomix bank " + verb in done.stdout


def test_info_tells_all_that_matters(places: Path) -> None:
    done = bank("info", places / "one.zarr")
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    expected = [
        "10 slices of 2 subjects, complete",
        "A 5 slices, ED, labelled",
        "B 2 slices, ED, not labelled",
        "B 3 slices, ED, labelled",
        "bytes a slice",
        "32 × 48, 8 channels, 8 numbers",
        f"fingerprint {FactorBank.open(str(places / 'one.zarr')).fingerprint}",
        "SDNet 0123456789abcdef",
        "clip_sigma 3.0",
        "terms CC BY 4.0",
    ]
    for line in expected:
        assert line in said
    assert "not complete: 2 of 3 shards" in " ".join(bank("info", places / "part.zarr").stdout.split())


def test_verify_is_clean_or_names_what_is_wrong(places: Path, tmp_path: Path) -> None:
    done = bank("verify", places / "one.zarr")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "clean")
    copy = shutil.copytree(places / "one.zarr", tmp_path / "one.zarr")
    (copy / "mask" / "c" / "1" / "0" / "0").unlink()
    done = bank("verify", copy)
    assert done.exit_code == 1
    assert "one.zarr, shard 1: its mask cannot be read (FileNotFoundError)" in done.stdout


def test_merge_and_styles(places: Path, tmp_path: Path) -> None:
    assert bank("merge", places / "one.zarr", places / "two.zarr", tmp_path / "both.zarr").exit_code == 0
    assert "10 vectors in" in bank("export-styles", places / "two.zarr", tmp_path / "styles.parquet").stdout
    copy = shutil.copytree(places / "one.zarr", tmp_path / "one.zarr")
    assert "10 vectors in" in bank("import-styles", tmp_path / "styles.parquet", copy).stdout
    assert "10 vectors of A, B" in " ".join(bank("info", copy).stdout.split())


def test_styles_of_one_vendor_are_exported_alone(places: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.parquet"
    assert "5 vectors in" in bank("export-styles", places / "two.zarr", out, "--vendor", "B").stdout
    copy = shutil.copytree(places / "one.zarr", tmp_path / "one.zarr")
    assert bank("import-styles", out, copy).exit_code == 0
    assert "5 vectors of B" in " ".join(bank("info", copy).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "absent.zarr"), "absent.zarr: no factor bank here"),
        (("verify", "one.zarr", "--run", "r"), "verify: --run and --sdnet go together"),
        (("merge", "one.zarr", "part.zarr", "new.zarr"), "part.zarr: is not complete"),
        (("merge", "one.zarr", "new.zarr"), "merge: one bank alone"),
        (("export-styles", "part.zarr", "s.parquet"), "part.zarr: is not complete"),
        (
            ("export-styles", "one.zarr", "s.parquet", "--vendor", "Z"),
            "one.zarr: has no slice of vendor Z; choose from",
        ),
        (("import-styles", "absent.parquet", "one.zarr"), "absent.parquet: cannot be read"),
    ],
)
def test_bad_input_is_one_line(places: Path, arguments: tuple[str, ...], message: str) -> None:
    paths = [str(places / a) if a.endswith((".zarr", ".parquet")) else a for a in arguments]
    error = bank(*paths).exception
    assert isinstance(error, InputError)
    assert str(error).startswith(message)
    assert "\n" not in str(error)
