"""What a bank's factors keep: contrasts against a decoder that is known, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.factors import quality as module
from pipeline.factors.quality import _kept, _levels, _Slice, _wall
from storage.subjects import STRUCTURES


def ring(radius: int, wall: int) -> np.ndarray:
    """LV inside a ring of MYO, RV beside it."""
    y, x = np.mgrid[-32:32, -32:32]
    far = np.hypot(y, x)
    mask = np.zeros((64, 64), np.uint8)
    mask[far < radius + wall], mask[far < radius] = STRUCTURES["MYO"], STRUCTURES["LV"]
    mask[4:12, 4:20] = STRUCTURES["RV"]
    return mask


def made(wall: int, kept: float) -> _Slice:
    """A slice whose reconstruction has `kept` of the contrasts around the myocardium."""
    mask = ring(12, wall)
    image = np.full(mask.shape, -0.8, np.float32)
    image[mask == STRUCTURES["LV"]], image[mask == STRUCTURES["RV"]], image[mask == STRUCTURES["MYO"]] = 0.6, 0.5, -0.4
    drawn = image.copy()
    for name in ("LV", "RV"):
        there = mask == STRUCTURES[name]
        drawn[there] = -0.4 + kept * (image[there] + 0.4)
    code = np.zeros(8, np.float32)
    return _Slice("A", image, mask, mask, code, drawn)


def test_contrasts_that_are_kept_are_told_apart_for_thin_walls() -> None:
    kept = _kept("A", [made(3, 0.5), made(8, 0.9), made(9, 1.0)])
    assert kept.lv_myo == pytest.approx(0.8) and kept.rv_myo == pytest.approx(0.8)
    assert kept.thin == pytest.approx(0.5)
    assert kept.slices == 3 and kept.error > 0


@pytest.mark.parametrize("wall", [4, 6, 10])
def test_the_wall_is_about_as_thick_as_it_was_drawn(wall: int) -> None:
    mask = ring(12, wall)
    mask[mask == STRUCTURES["RV"]] = 0
    assert _wall(mask) == pytest.approx(wall, rel=0.25)


def test_levels_are_means_of_structures_and_the_rest() -> None:
    one = made(5, 1.0)
    levels = _levels(one.image, one.mask)
    assert levels == pytest.approx({"LV": 0.6, "MYO": -0.4, "RV": 0.5, module.REST: -0.8})


def test_a_run_that_shares_nothing_with_the_bank_is_refused(tmp_path: Path) -> None:
    from storage.errors import InputError
    from tests.actors.tiny_runs import filled_bank

    bank, run = filled_bank(tmp_path, masks=False)
    with pytest.raises(InputError, match="has no labelled slice with LV, MYO and RV"):
        module.quality(run, bank)
    kept, moved = module.quality(*reversed(filled_bank(tmp_path / "with")))
    assert {k.vendor for k in kept} == {"A", "B"} and len(moved) == 2 * 4
