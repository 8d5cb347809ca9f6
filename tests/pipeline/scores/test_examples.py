"""Which cases are shown, and that they come back from their file as they were."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scores.examples import choose, example, pack, unpack


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.5, 0.9, 0.7, np.nan, 0.8, 0.1], {"best": 1, "median": 2, "worst": 5}),
        ([0.5, 0.9], {"best": 1, "worst": 0}),
        ([0.5], {"best": 0}),
        ([np.nan], {}),
    ],
)
def test_best_median_and_worst_are_told_once_each(dice: list[float], expected: dict[str, int]) -> None:
    assert choose(dice) == expected


def test_an_example_holds_a_slice_of_each_third_cut_to_the_heart_even_at_the_edge() -> None:
    mask = np.zeros((9, 50, 40), dtype=np.uint8)
    mask[1:8, 0:12, 28:40] = 1  # in a corner
    image = np.random.default_rng(0).uniform(0, 900, mask.shape).astype(np.float32)
    found = mask.copy()
    found[:, 10:14, 24:28] = 3
    one = example("A0", "A", "ED", (8.0, 1.5, 1.25), image, mask, found)
    assert one.slices == (2, 4, 7) and one.pixel_mm == (1.5, 1.25)
    assert one.image.shape == one.reference.shape == one.prediction.shape == (3, 24, 24)
    assert (one.reference == 1).sum() == 3 * 144 and (one.prediction == 3).sum() == 3 * 16
    back = unpack(pack({"best": one}))
    assert set(back) == {"best"} and back["best"].slices == one.slices and back["best"].subject == "A0"
    np.testing.assert_array_equal(back["best"].prediction, one.prediction)
    assert pack({"best": one}) == pack(back)


def test_a_volume_without_any_heart_still_has_a_picture() -> None:
    empty = np.zeros((3, 20, 30), dtype=np.uint8)
    one = example("A0", "A", "ED", (8.0, 1.5, 1.5), np.ones(empty.shape, dtype=np.float32), empty, empty)
    assert one.slices == (1,) and one.image.shape == (1, 30, 30)
