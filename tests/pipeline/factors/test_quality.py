"""What a bank's factors keep: contrasts against a decoder that is known, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.factors import quality as module
from pipeline.factors.quality import _kept, _levels, _moved, _regions, _Slice, _structures, _wall
from pipeline.samples.drawing import Drawing
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
    levels = _levels(one.image, _structures(one.mask))
    assert levels == pytest.approx({"LV": 0.6, "MYO": -0.4, "RV": 0.5, module.REST: -0.8})


def test_the_rest_is_told_apart_by_anatomy_channel_and_a_swap_of_codes_with_it() -> None:
    class ByChannel(Drawing):
        """Draws channel c with the code's number c."""

        def __init__(self) -> None:
            pass

        def decoded(self, anatomy_HW: np.ndarray, code_M: np.ndarray) -> np.ndarray:
            return np.sum([(anatomy_HW >> c & 1) * code_M[c] for c in range(3)], axis=0, dtype=np.float32)

    def one(vendor: str, code: tuple[float, float, float]) -> _Slice:
        mask, drawing = ring(12, 5), ByChannel()
        anatomy = np.where(mask > 0, 1, np.where(np.arange(64)[:, None] < 16, 2, 0)).astype(np.uint8)
        anatomy[-1, -10:] = 4  # too few pixels to count
        drawn = drawing.decoded(anatomy, np.array(code))
        return _Slice(vendor, drawn + np.float32(0.1 if vendor == "B" else 0), mask, anatomy, np.array(code), drawn)

    a, b = [one("A", (0.1, 0.2, 0.3))] * 2, [one("B", (0.5, -0.4, 0.9))] * 2
    assert list(_regions(a[0], 3)) == ["LV", "MYO", "RV", "rest", *(f"rest, channel {c}" for c in range(3))]
    found = {row.region: row for row in _moved("A", "B", a, b, ByChannel(), 3)}
    assert set(found) == {"LV", "MYO", "RV", "rest", "rest, channel 1"}  # channel 0 is in no rest, 2 has ten pixels
    for name, moved in (("LV", 0.4), ("MYO", 0.4), ("RV", 0.4), ("rest, channel 1", -0.6)):
        assert (found[name].moved, found[name].real) == pytest.approx((moved, moved + 0.1))
    assert -0.6 < found["rest"].moved < 0


def test_a_run_that_shares_nothing_with_the_bank_is_refused(tmp_path: Path) -> None:
    from storage.errors import InputError
    from tests.actors.tiny_runs import filled_bank

    bank, run = filled_bank(tmp_path, masks=False)
    with pytest.raises(InputError, match="has no labelled slice with LV, MYO and RV"):
        module.quality(run, bank)
    kept, moved = module.quality(*reversed(filled_bank(tmp_path / "with")))
    assert {k.vendor for k in kept} == {"A", "B"}
    assert {(m.source, m.region) for m in moved} >= {(v, r) for v in "AB" for r in ("LV", "MYO", "RV", "rest")}
    assert any(m.region.startswith("rest, channel ") for m in moved)
