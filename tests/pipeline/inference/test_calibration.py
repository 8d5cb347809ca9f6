"""Class shares as probabilities: the temperature that is found, and the error that is left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.calibration import (
    BINS,
    MARGIN,
    best_temperature,
    calibration_error,
    near_heart,
    tempered,
)
from pipeline.inference.predictor import Predictor, network_input, network_labels
from pipeline.samples.preprocess import PreprocessConfig
from storage.slices.intensities import statistics


def honest(
    pixels: int, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Logits, their shares, and labels that are drawn by those shares."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (pixels, 4)).astype(np.float32)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    labels = (shares.cumsum(1) < rng.random((pixels, 1))).sum(1).clip(max=3).astype(np.uint8)
    return logits, shares, labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_network_too_sure_or_not_sure_enough(factor: float) -> None:
    logits, shares, labels = honest(60_000)
    said = torch.from_numpy(logits * factor).softmax(1).numpy()
    found = best_temperature([(said[:30_000], labels[:30_000]), (said[30_000:], labels[30_000:])])
    assert found == pytest.approx(factor, rel=0.05)
    mended = tempered(said, found)
    np.testing.assert_allclose(mended, shares, atol=0.03)
    assert calibration_error(mended, labels) < 0.01
    if factor != 1.0:
        assert calibration_error(said, labels) > 5 * calibration_error(mended, labels)


def test_a_large_volume_weighs_no_more_than_its_share_of_pixels_and_nothing_gives_no_temperature() -> None:
    _, shares, labels = honest(50_001)
    assert best_temperature([(shares, labels)]) == pytest.approx(1.0, rel=0.05)
    assert best_temperature([]) is None
    assert best_temperature([near_heart(np.ones((2, 4, 5, 5), np.float32), np.zeros((2, 5, 5), np.uint8))]) is None


@given(st.integers(0, 10_000), st.floats(0.3, 6))
def test_temperatures_divide_logits_and_errors_are_those_of_the_definition(seed: int, temperature: float) -> None:
    logits, shares, labels = honest(200, seed)
    expected = torch.from_numpy(logits / np.float32(temperature)).softmax(1).numpy()
    np.testing.assert_allclose(tempered(shares, temperature), expected, atol=2e-3)
    sure, right = shares.max(1), shares.argmax(1) == labels
    gap = 0.0
    for k in range(BINS):
        inside = (sure >= k / BINS) & ((sure < (k + 1) / BINS) | (k == BINS - 1))
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - sure[inside].astype(np.float64).mean())
    assert calibration_error(shares, labels) == pytest.approx(gap, abs=1e-6)


def test_a_predictor_divides_the_logits_by_its_temperature() -> None:
    logits = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return logits[: len(image)] + self.bias

    predictor = Predictor([Fixed()], PreprocessConfig(size=32, field=32), temperature=2.5)
    found = predictor.probabilities(np.zeros((3, 16, 16), np.float32))
    np.testing.assert_allclose(found, (logits / 2.5).softmax(1).numpy(), atol=1e-3)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)


def test_pixels_far_from_the_heart_do_not_count() -> None:
    labels = np.zeros((3, 64, 64), np.uint8)
    labels[0, 30:34, 20:26], labels[2, 0:4, 60:64] = 1, 3
    shares = np.random.default_rng(0).random((3, 4, 64, 64)).astype(np.float32)
    near, own = near_heart(shares, labels)
    sizes = (4 + 2 * MARGIN) * (6 + 2 * MARGIN), (4 + MARGIN) * (4 + MARGIN)
    assert near.shape == (sum(sizes), 4) and own.shape == (sum(sizes),)
    np.testing.assert_array_equal(near[0], shares[0, :, 30 - MARGIN, 20 - MARGIN])
    assert np.isnan(calibration_error(near[:0], own[:0]))


def test_labels_lie_where_the_network_sees_their_pixels() -> None:
    """A mask that is drawn by the image's own grey values is drawn by them on the network's grid, too."""
    mask = np.zeros((2, 71, 90), np.uint8)
    mask[0, 20:50, 30:70] = mask[1, 10:30, 20:60] = 1
    spacing, config = (8.0, 1.5, 1.1), PreprocessConfig(size=64, field=96)
    image = mask.astype(np.float32)
    seen = network_input(image, statistics(image), spacing, config)
    low, high = seen.min(), seen.max()
    np.testing.assert_array_equal(network_labels(mask, spacing, config) == 1, seen > (low + high) / 2)
