"""Loss terms against what they say, on images small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.losses import contrast_loss


def test_contrast_is_the_mean_distance_of_the_structures_mean_greys() -> None:
    labels = torch.tensor([[[0, 1], [2, 2]], [[0, 0], [3, 0]]])
    image = torch.zeros(2, 1, 2, 2)
    drawn = torch.tensor([[[[9.0, 0.5], [0.1, 0.3]]], [[[9.0, 9.0], [-0.4, 9.0]]]])
    # LV .5, MYO (.1 + .3) / 2, RV .4 in the second; background does not count
    assert contrast_loss(drawn, image, labels).item() == pytest.approx((0.5 + 0.2 + 0.4) / 3)


def test_contrast_is_nothing_where_there_is_no_structure_and_where_only_texture_differs() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert contrast_loss(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), labels).item() == 0
    one = torch.ones(1, 2, 2, dtype=torch.int64)
    texture = torch.tensor([[[[0.2, -0.2], [0.1, -0.1]]]])
    assert contrast_loss(texture, torch.zeros(1, 1, 2, 2), one).item() == pytest.approx(0.0, abs=1e-7)
    assert contrast_loss(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2), one[:0]).item() == 0
