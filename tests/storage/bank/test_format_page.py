"""The bank's format, read by the reader that its page prints: nothing of ours is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zarr

from pipeline.networks.files import load_decoder
from pipeline.samples.synthesis import synthesize
from storage.bank.bank import FactorBank

ROOT = Path(__file__).parents[3]
OURS = ("storage", "pipeline", "actors", "experiments")


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """Reader, example and what the example prints."""
    section = (ROOT / "docs" / "bank-format.md").read_text(encoding="utf-8").split("\n## A reader\n")[1]
    return [part.split("\n", 1)[1] for part in section.split("```")[1::2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made_by_0_1_0")
    with tarfile.open(ROOT / "tests" / "data" / "run_0_1_0.tar.xz") as archive:
        archive.extractall(out, filter="data")
    return out


def test_the_pages_example_prints_what_the_page_says_and_imports_nothing_of_ours(
    blocks: list[str], folder: Path
) -> None:
    reader, example, printed = blocks
    check = f"import sys\nassert not {set(OURS)} & {{name.split('.')[0] for name in sys.modules}}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", reader + example + check], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_that_reader_and_ours_read_and_draw_the_same(blocks: list[str], folder: Path) -> None:
    page = ModuleType("page")
    exec(blocks[0], page.__dict__)
    theirs: Any = page.__dict__["Bank"](folder / "bank.zarr")
    ours = FactorBank.open(str(folder / "bank.zarr"))
    weights, config = ours.decoder()
    decoder = load_decoder(weights, config)
    rng, held = np.random.default_rng(0), ours.load()
    for row in range(len(ours)):
        packed, mask, code = (array[row] for array in (held.anatomy, held.mask, held.modality))
        about = ours.index.slice(row, 1).to_pylist()[0]
        extent = np.s_[about["top"] : about["top"] + about["height"], about["left"] : about["left"] + about["width"]]
        np.testing.assert_array_equal(
            np.packbits(theirs.anatomy(row) > 0, axis=0, bitorder="little")[0], packed[extent]
        )
        np.testing.assert_array_equal(theirs.mask(row), mask[extent])
        np.testing.assert_array_equal(theirs.modality(row), code)
    anatomy = 1 << rng.integers(0, 8, (1, 20, 24)).astype(np.uint8)
    bits = (anatomy >> np.arange(8, dtype=np.uint8)[:, None, None]) & 1
    for scale in (1.0, 30.0, 1000.0):
        drawn = synthesize(decoder, 8, anatomy, scale * code[None], "fp32")[0]
        np.testing.assert_allclose(theirs.draw(bits.astype(np.float32), scale * code), drawn, atol=1e-5)


def test_that_reader_refuses_a_value_that_is_not_the_shards(blocks: list[str], folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bank.zarr"
    shutil.copytree(folder / "bank.zarr", damaged)
    array: Any = zarr.open_group(damaged, mode="r+")["mask"]
    array[3, 10, 10] = 7
    page = ModuleType("page")
    exec(blocks[0], page.__dict__)
    with pytest.raises(AssertionError):
        page.__dict__["Bank"](damaged)
