from __future__ import annotations

from pathlib import Path

import monai.losses
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.losses import LossConfig, segmentation_losses
from pipeline.networks.sdnet import SDNetConfig
from pipeline.networks.unet import UNetConfig
from pipeline.training import (
    Batch,
    NonFiniteLossError,
    Objective,
    TrainConfig,
    TrainState,
    ValidationVolume,
    train_step,
    validate,
)

SDNET = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
FP32 = TrainConfig(precision="fp32")


def batch(labelled: int = 2, unlabelled: int = 2, seed: int = 0, size: int = 32) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n = labelled + unlabelled
    return Batch(
        torch.rand(n, 1, size, size, generator=g) * 2 - 1,
        torch.randint(0, 4, (n, size, size), generator=g),
        torch.arange(n) < labelled,
        torch.arange(n),
    )


def fresh(network: SDNetConfig | UNetConfig = SDNET, config: TrainConfig = FP32) -> tuple[TrainState, Objective]:
    state = TrainState.create(network, config, seed=0)
    return state, Objective(state.model, LossConfig(), state.latent)


def test_focal_loss_at_gamma_zero_is_the_cross_entropy() -> None:
    logits, labels = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    terms = segmentation_losses(LossConfig(focal_gamma=0.0))(logits, labels)
    torch.testing.assert_close(terms["focal"], F.cross_entropy(logits, labels))


def test_dice_losses_are_monais() -> None:
    logits, labels = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    for form, loss in (("soft", monai.losses.DiceLoss), ("generalised", monai.losses.GeneralizedDiceLoss)):
        ours = segmentation_losses(LossConfig(dice_form=form))(logits, labels)["dice"]  # type: ignore[arg-type]
        torch.testing.assert_close(ours, loss(softmax=True, to_onehot_y=True, batch=True)(logits, labels[:, None]))


@pytest.mark.parametrize("network", [SDNET, UNetConfig(width=4)])
def test_the_segmentation_loss_falls_on_a_batch_seen_again_and_again(network: SDNetConfig | UNetConfig) -> None:
    state, objective = fresh(network)
    random = batch()
    learnable = Batch(random.image, (random.image[:, 0] > 0).long(), random.labelled, random.slice_id)
    terms = [train_step(objective, state, learnable, FP32) for _ in range(40)]
    first, last = (sum(t["dice"] + t["focal"] for t in some) for some in (terms[:5], terms[-5:]))
    assert last < 0.97 * first


def test_unlabelled_batches_leave_the_segmentor_untouched() -> None:
    state, objective = fresh()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    terms = train_step(objective, state, batch(labelled=0, unlabelled=4), FP32)
    assert set(terms) == {"reconstruction", "latent", "total"}
    after = state.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("segmentor"))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("anatomy_encoder"))


def test_masks_of_unlabelled_samples_are_never_read() -> None:
    results = []
    for fill in (0, 3):
        state, objective = fresh()
        b = batch()
        mask = b.mask.clone()
        mask[2:] = fill
        train_step(objective, state, Batch(b.image, mask, b.labelled, b.slice_id), FP32)
        results.append(state.model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("network", [SDNET, UNetConfig(width=4)])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path, network: SDNetConfig | UNetConfig) -> None:
    state, objective = fresh(network)
    for k in range(6):
        if k == 3:
            state.end_epoch(0.5)
            state.save(tmp_path)
        train_step(objective, state, batch(seed=k), FP32)
    again, objective = fresh(network)
    again.restore(tmp_path)
    assert (again.step, again.epoch, again.best_dice) == (3, 1, 0.5)
    for k in range(3, 6):
        train_step(objective, again, batch(seed=k), FP32)
    ours, theirs = again.model.state_dict(), state.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_rate_falls_at_the_second_epoch_without_improvement() -> None:
    state, _ = fresh()
    rates = []
    for dice in (0.5, 0.4, 0.45, 0.6):
        state.end_epoch(dice)
        rates.append(state.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert state.best_dice == 0.6


def test_a_non_finite_loss_names_the_slices_and_leaves_the_weights() -> None:
    state, objective = fresh()
    b = batch()
    image = b.image.clone()
    image[1] = float("nan")
    before = {k: v.clone() for k, v in state.model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"slices \[0, 1, 2, 3\]"):
        train_step(objective, state, Batch(image, b.mask, b.labelled, b.slice_id), FP32)
    assert all(torch.equal(before[k], v) for k, v in state.model.named_parameters())


def test_validation_dice_is_by_volume_and_leaves_out_what_is_absent_from_both() -> None:
    class Perfect(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return F.one_hot(image[:, 0].long(), 4).permute(0, 3, 1, 2).float()

    mask = np.zeros((3, 32, 32), np.uint8)
    mask[1, 4:9, 4:9] = 1
    mask[2, 4:9, 4:9] = 2
    wrong = mask.copy()
    wrong[1] = 0
    scores = validate(Perfect(), [ValidationVolume(mask.astype(np.float32), mask)], "fp32")  # type: ignore[arg-type]
    assert scores["dice_LV"] == scores["dice_MYO"] == 1.0
    scores = validate(Perfect(), [ValidationVolume(wrong.astype(np.float32), mask)], "fp32")  # type: ignore[arg-type]
    assert scores["dice_LV"] == 0.0
