"""Loss terms against what they say, on images small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.config import LossConfig
from pipeline.training.losses import contrast_loss, merged_with_background, segmentation_losses


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


def partly_drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of three images, their labels, and what is drawn: all; LV and MYO; LV."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 4, 6, 6, generator=g), torch.randint(0, 4, (3, 6, 6), generator=g)
    drawn = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    for image, there in zip(labels, drawn, strict=True):
        for label in (1, 2, 3):
            if not there[label - 1]:
                image[image == label] = 0
    return logits, labels, drawn


def test_background_takes_over_the_probability_of_what_nobody_drew() -> None:
    logits, _, drawn = partly_drawn()
    before, after = logits.softmax(1), merged_with_background(logits, drawn).softmax(1)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], torch.stack([before[1, 0] + before[1, 3], *before[1, 1:3], 0 * before[1, 3]]))
    torch.testing.assert_close(after[2, 0], 1 - before[2, 1])
    assert torch.equal(after[2, 2:], torch.zeros(2, 6, 6))
    whole = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(merged_with_background(logits, whole), logits)


@pytest.mark.parametrize("form", ["soft", "generalised"])
def test_a_structure_that_nobody_drew_is_not_taught_as_background(form: str) -> None:
    logits, labels, drawn = partly_drawn()
    losses = segmentation_losses(LossConfig(dice_form=form))  # type: ignore[arg-type]

    def total(given: torch.Tensor) -> torch.Tensor:
        return sum(losses(merged_with_background(given, drawn), labels).values(), torch.zeros(()))

    # where only background and RV can be told apart no more, moving probability between them changes nothing
    swapped = logits.clone()
    swapped[1, 0], swapped[1, 3] = logits[1, 3], logits[1, 0]
    torch.testing.assert_close(total(swapped), total(logits))
    given = logits.clone().requires_grad_()
    total(given).backward()
    assert given.grad is not None and given.grad.isfinite().all()
    shares = torch.stack([given.grad[1, 3], given.grad[1, 0]]) / logits[1, [3, 0]].softmax(0)
    torch.testing.assert_close(shares[0], shares[1])  # both are pushed alike, by their share of the merged class
    assert (given.grad[0] != 0).all()


def test_the_loss_of_a_batch_in_which_nobody_drew_an_rv_is_that_of_three_classes() -> None:
    logits, labels, _ = partly_drawn()
    labels[labels == 3] = 0
    drawn = torch.tensor([[True, True, False]] * 3)
    merged = merged_with_background(logits, drawn)
    three = segmentation_losses(LossConfig())(merged[:, :3], labels)
    four = segmentation_losses(LossConfig())(merged, labels)
    torch.testing.assert_close(four["focal"], three["focal"])
    torch.testing.assert_close(4 * four["dice"], 3 * three["dice"], rtol=1e-4, atol=1e-4)
