"""nnU-Net's transforms by its own package: a function of the seed, image and mask together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.samples.nnunet_transforms import nnunet
from pipeline.samples.preprocess import WorkingSlice
from pipeline.training.config import ArmConfig

MASK = np.zeros((48, 64), np.uint8)
MASK[10:30, 20:40], MASK[14:26, 24:36] = 2, 1
SOURCE = WorkingSlice((MASK / 2 - 0.6).astype(np.float32), MASK, 1.5)


@pytest.fixture
def package() -> None:
    pytest.importorskip("batchgeneratorsv2", reason="pip install 'cardiomix[nnunet]'")


@pytest.mark.usefixtures("package")
def test_the_seed_alone_decides_and_the_global_generators_stay_where_they_were() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    expected = (np.random.random(), torch.rand(1))
    np.random.seed(3)
    torch.manual_seed(3)
    made = [nnunet(SOURCE, seed, mirrors=True) for seed in range(40)]
    assert (np.random.random(), torch.rand(1)) == expected
    again = [nnunet(SOURCE, seed, mirrors=True) for seed in range(40)]
    for one, other in zip(made, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)
        assert one.image.dtype == np.float32 and np.abs(one.image).max() <= 1 and one.mask.dtype == np.uint8
        assert one.mask.shape == MASK.shape and set(np.unique(one.mask)) <= {0, 1, 2}
    assert sum(np.abs(one.image - SOURCE.image).max() > 1e-3 for one in made) > 25
    np.testing.assert_array_equal(SOURCE.mask, MASK)


@pytest.mark.usefixtures("package")
def test_mirrors_are_there_where_they_are_asked_for_and_move_the_mask_along() -> None:
    mirrored = {
        axes
        for seed in range(60)
        for axes in ((), (0,), (1,), (0, 1))
        if np.array_equal(nnunet(SOURCE, seed, mirrors=True).mask, np.flip(MASK, axes))
    }
    assert mirrored == {(), (0,), (1,), (0, 1)}
    unmoved = sum(np.array_equal(nnunet(SOURCE, seed, mirrors=False).mask, MASK) for seed in range(60))
    assert 60 * 0.64 - 15 < unmoved < 60 * 0.64 + 15  # neither turned nor scaled, by a chance of .2 each


def test_what_would_part_the_mask_from_the_anatomy_is_refused() -> None:
    with pytest.raises(ValueError, match="not with factors"):
        ArmConfig(appearance="nnunet", fa=True)
