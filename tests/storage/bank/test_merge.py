"""Banks of several sites in one: the same factors, centred anew, whatever was killed; never two networks' in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.bank.bank import FactorBank
from storage.bank.merge import merge
from storage.bank.styles import export_styles, import_styles, modality_donors
from storage.bank.verify import verify
from storage.errors import InputError
from tests.storage.banks import digests, factors, made, same

HERE, THERE, FAR = ("s0", "s1"), ("s2", "s3"), ("s4", "s5")


@pytest.fixture
def banks(tmp_path: Path) -> list[str]:
    return [made(tmp_path / f"{k}.zarr", subjects=part).uri for k, part in enumerate((HERE, THERE))]


def test_a_merged_bank_has_the_bytes_of_one_extracted_at_once(banks: list[str], tmp_path: Path) -> None:
    assert verify(merge(banks, str(tmp_path / "both.zarr"))) == []
    made(tmp_path / "once.zarr", subjects=HERE + THERE).seal()
    assert digests(tmp_path / "both.zarr") == digests(tmp_path / "once.zarr")
    assert not (tmp_path / "both.zarr.lock").exists()


def test_on_the_larger_canvas_every_image_stays_centred(banks: list[str], tmp_path: Path) -> None:
    larger = made(tmp_path / "larger.zarr", shards=[], subjects=FAR, canvas=(48, 64))
    from tests.storage.banks import DECODER, DECODER_CONFIG, index, spec, write

    rows = index(FAR, top=9, left=12)
    larger = FactorBank.create(str(tmp_path / "large.zarr"), spec(canvas=(48, 64)), rows, DECODER, DECODER_CONFIG)
    expected = factors(FAR, (48, 64))
    for shard in range(larger.shards()):
        write(larger, shard, expected)
    merged = merge([banks[0], larger.uri], str(tmp_path / "both.zarr"))
    assert merged.spec.canvas == (48, 64)
    assert verify(merged) == []
    assert same(merged.read(range(10, 20)), slice(None), expected)
    found = merged.read(range(10))
    assert np.array_equal(found.anatomy[:, 9:39, 12:52], factors().anatomy[:, 1:31, 4:44])
    assert np.array_equal(found.mask[:, 9:39, 12:52], factors().mask[:, 1:31, 4:44])
    assert set(merged.index["top"].to_pylist()) == {9} and set(merged.index["left"].to_pylist()) == {12}


def test_a_merge_cut_short_goes_on_and_a_finished_one_is_left(banks: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "both.zarr")

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        merge(banks, out, kill)
    assert len(FactorBank.open(out, partial=True).committed()) == 2
    merge(banks, out)
    before = digests(Path(out))
    merge(banks, out)
    assert digests(Path(out)) == before
    assert same(FactorBank.open(out).load(), slice(None), factors(HERE + THERE))


def test_imported_styles_come_along(banks: list[str], tmp_path: Path) -> None:
    export_styles(made(tmp_path / "far.zarr", subjects=FAR), str(tmp_path / "styles.parquet"))
    import_styles(str(tmp_path / "styles.parquet"), FactorBank.open(banks[1]))
    assert len(modality_donors(merge(banks, str(tmp_path / "both.zarr")), str(tmp_path / "cache"))) == 30


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sdnet_fingerprint": "fedcba9876543210"}, "its sdnet_fingerprint is fedcba9876543210"),
        ({"preprocess": {"size": 64}}, "its preprocess is"),
        ({"subjects": ("s1", "s2")}, "s1 is in more than one of the banks"),
        ({"subjects": ("s0", "s1")}, "s0 and 1 more subjects are in more than one"),
        ({"shards": [0]}, "is not complete"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    banks: list[str], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    other = made(tmp_path / "other.zarr", **({"subjects": THERE} | changes)).uri
    with pytest.raises(InputError, match=says):
        merge([banks[0], other], str(tmp_path / "both.zarr"))
    assert not (tmp_path / "both.zarr").exists()


def test_another_bank_or_folder_in_the_place_is_kept(banks: list[str], tmp_path: Path) -> None:
    made(tmp_path / "both.zarr", subjects=FAR)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    before = digests(tmp_path)
    for name, says in (("both.zarr", "holds other slices"), ("folder", "not a factor bank"), ("0.zarr", "slices")):
        with pytest.raises(InputError, match=says):
            merge(banks, str(tmp_path / name))
    assert digests(tmp_path) == before


def test_a_folder_of_masks_is_no_unfinished_bank(banks: list[str], tmp_path: Path) -> None:
    drawn = tmp_path / "out" / "mask" / "p1.nii.gz"
    drawn.parent.mkdir(parents=True)
    drawn.write_bytes(b"a day's work")
    with pytest.raises(InputError, match="out: is there and is not a factor bank"):
        merge(banks, str(tmp_path / "out"))
    assert drawn.read_bytes() == b"a day's work"


def test_one_bank_is_no_merge(banks: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one bank alone"):
        merge(banks[:1], str(tmp_path / "both.zarr"))
