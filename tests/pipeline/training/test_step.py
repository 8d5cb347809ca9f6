from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import monai.losses
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.sdnet import adain, adain_at_once
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.errors import NonFiniteLossError, OutOfMemoryError
from pipeline.training.losses import VendorAlignment, channel_balance, segmentation_losses
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import LAG, Batch, settle, train_step
from pipeline.training.validation import ValidationVolume, mean_scores, volume_scores

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


def test_coarser_levels_are_taught_every_so_many_pixels_of_the_mask_with_halved_weights() -> None:
    state, objective = fresh(UNetConfig(width=4, deep=2))
    b, weights = batch(), (4 / 7, 2 / 7, 1 / 7)
    terms = objective(b.image, b.mask, int(b.labelled.sum()))
    count, losses = int(b.labelled.sum()), segmentation_losses(LossConfig())
    levels = state.model.logits_by_level(b.image[:count])
    by_level = [losses(logits, b.mask[:count, :: 2**k, :: 2**k]) for k, logits in enumerate(levels)]
    for name in ("dice", "focal"):
        expected = sum(w * level[name] for w, level in zip(weights, by_level, strict=True))
        torch.testing.assert_close(terms[name], expected)
    train_step(objective, state, b, FP32)
    assert all(head.weight.grad is not None and head.weight.grad.any() for head in state.model.deep_heads)


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
@pytest.mark.parametrize(
    "config", [FP32, FP32.model_copy(update={"ema": 0.9, "gradient_clip": 1.0, "schedule": "cosine"})]
)
def test_a_restored_state_goes_on_bit_for_bit(network: SDNetConfig | UNetConfig, config: TrainConfig) -> None:
    state, objective = fresh(network, config)
    checkpoint = b""
    for k in range(6):
        if k == 3:
            state.end_epoch(0.5)
            checkpoint = state.to_bytes()
        train_step(objective, state, batch(seed=k), config)
    again, objective = fresh(network, config)
    again.restore(checkpoint)
    assert (again.step, again.epoch, again.best_dice) == (3, 1, 0.5)
    for k in range(3, 6):
        train_step(objective, again, batch(seed=k), config)
    for ours, theirs in ((again.model, state.model), (again.candidate, state.candidate)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    for s in (again, state):  # the best stay those of the first epoch
        s.end_epoch(0.4)
    assert again.best_dice == 0.5
    assert all(torch.equal(again.best_weights[name], value) for name, value in state.best_weights.items())


def test_a_checkpoint_is_tensors_and_plain_values_alone() -> None:
    state, objective = fresh()
    train_step(objective, state, batch(), FP32)
    state.end_epoch(0.5)
    document = torch.load(io.BytesIO(state.to_bytes()), weights_only=True)
    assert {"model", "best", "optimiser", "scheduler", "step", "epoch"} <= set(document)
    assert len(document["optimiser"]["state"]) == len(list(state.model.parameters()))


def test_a_restored_state_sums_with_the_threads_it_was_trained_with() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        checkpoint = fresh()[0].to_bytes()
        torch.set_num_threads(2)
        fresh()[0].restore(checkpoint)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2), ("polynomial", lambda t: (1 - t) ** 0.9)],
)
def test_the_rate_falls_over_all_epochs_whatever_the_validation_says(
    schedule: str, share: Callable[[float], float]
) -> None:
    config = FP32.model_copy(update={"schedule": schedule, "epochs": 8})
    state, objective = fresh(config=config)
    rates = []
    for epoch in range(8):
        train_step(objective, state, batch(), config)
        rates.append(state.optimiser.param_groups[0]["lr"])
        state.end_epoch(0.1 * epoch)
        if epoch == 3:  # a restart goes on from there
            checkpoint = state.to_bytes()
            state, objective = fresh(config=config)
            state.restore(checkpoint)
    assert rates == pytest.approx([config.learning_rate * share(epoch / 8) for epoch in range(8)])


def test_the_rate_falls_at_the_second_epoch_without_improvement() -> None:
    state, _ = fresh()
    rates = []
    for dice in (0.5, 0.4, 0.45, 0.6):
        state.end_epoch(dice)
        rates.append(state.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert state.best_dice == 0.6


@pytest.mark.parametrize("config", [FP32, FP32.model_copy(update={"update": "separate"})])
def test_a_non_finite_loss_names_step_and_slices_a_few_steps_later_and_touches_no_weight(config: TrainConfig) -> None:
    state, objective = fresh()
    train_step(objective, state, batch(), FP32)
    b = batch()
    image = b.image.clone()
    image[1] = float("nan")
    before = {k: v.clone() for k, v in state.model.named_parameters()}
    moments = {k: v["exp_avg"].clone() for k, v in state.optimiser.state.items()}
    torn = Batch(image, b.mask, b.labelled, b.slice_id)
    labelled = torch.ones(2, dtype=torch.bool)
    if config.update == "separate":  # one update alone, so that another one does not change the weights
        torn = Batch(image[:2], b.mask[:2], labelled, b.slice_id[:2])
    train_step(objective, state, torn, config)
    assert all(torch.equal(before[k], v) for k, v in state.model.named_parameters())
    assert all(torch.equal(moments[k], v["exp_avg"]) for k, v in state.optimiser.state.items())
    with pytest.raises(NonFiniteLossError, match=r"^step 1: loss is nan, terms .*slices \[0, 1"):
        for k in range(LAG):
            train_step(objective, state, batch(seed=k), FP32)
    assert state.step <= 2 + LAG


def test_what_is_not_finite_is_found_before_anything_is_kept() -> None:
    state, objective = fresh()
    b = batch()
    train_step(objective, state, Batch(b.image * float("inf"), b.mask, b.labelled, b.slice_id), FP32)
    with pytest.raises(NonFiniteLossError, match="step 0"):
        settle(state)
    settle(state)  # told once


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched() -> None:
    state, objective = fresh(UNetConfig(width=4))
    with torch.no_grad():
        state.model.get_parameter("head.weight")[0] = 1e30  # a finite loss, but whose gradient is past all bounds
    before = {k: v.clone() for k, v in state.model.named_parameters()}
    train_step(objective, state, batch(), FP32)
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is inf.*slices \[0, 1, 2, 3\]"):
        settle(state)
    assert all(torch.equal(before[k], v) for k, v in state.model.named_parameters())


QUESTIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2")


def around(event: Any) -> set[str]:
    """Names of what an event of the profiler happened in."""
    names, parent = set(), event.cpu_parent
    while parent is not None:
        names.add(parent.name)
        parent = parent.cpu_parent
    return names


@pytest.mark.parametrize("network", [SDNET, UNetConfig(width=4), UNetConfig(width=4, deep=2)])
def test_no_step_asks_the_device_for_a_number(network: SDNetConfig | UNetConfig) -> None:
    """Each such question would wait until a GPU has done all that it was given."""
    config = FP32.model_copy(update={"ema": 0.9, "gradient_clip": 1.0})
    loss = LossConfig(kl=0.1, balance=0.1, align=0.1, contrast=0.1)
    state = TrainState.create(network, config, seed=0, vendors=2)
    objective = Objective(state.model, loss, state.latent, state.alignment)
    b = batch()
    ready = Batch(b.image, b.mask, b.labelled, b.slice_id, torch.tensor([0, 1, 1, 0]))
    for _ in range(LAG + 2):
        train_step(objective, state, ready, config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(objective, state, ready, config)
    asked = [around(event) for event in profile.events() if event.name in QUESTIONS]
    # Adam's fused kernel and one_hot ask on a CPU alone
    ours = [names for names in asked if not {"aten::_fused_adam_", "aten::one_hot"} & names]
    assert len(ours) == 1  # `labelled.sum()`, of a tensor that lies on the CPU


@pytest.mark.parametrize(("network", "most"), [(SDNET, 1000), (UNetConfig(width=4), 450)])
def test_a_step_dispatches_few_operators_whatever_its_batch(
    network: SDNetConfig | UNetConfig, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs a GPU's host some microseconds, which a small batch does not hide."""
    monkeypatch.setattr("pipeline.networks.sdnet.adain", adain_at_once)  # as on a GPU
    state, objective = fresh(network)
    counts = []
    for b in (batch(), batch(6, 6)):
        train_step(objective, state, b, FP32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_step(objective, state, b, FP32)
        operators = [e for e in profile.events() if e.name.startswith("aten::")]
        counts.append(sum(not any(name.startswith("aten::") for name in around(e)) for e in operators))
    assert counts[0] == counts[1] <= most


def test_adain_of_all_images_at_once_equals_that_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    x, scale, shift = torch.randn(3, 5, 9, 7, generator=g) * 4 + 2, torch.randn(3, 5, generator=g), torch.randn(3, 5)
    torch.testing.assert_close(adain_at_once(x, scale, shift), adain(x, scale, shift), rtol=1e-5, atol=1e-5)
    one = (scale[:, :1], shift[:, :1])
    torch.testing.assert_close(adain_at_once(x, *one), adain(x, *one), rtol=1e-5, atol=1e-5)
    assert adain_at_once(x.bfloat16(), scale, shift).dtype == torch.bfloat16


def test_a_batch_too_large_for_the_memory_says_how_large_and_what_to_try() -> None:
    state, objective = fresh(UNetConfig(width=4))
    n, size = 2**22, 2**12  # one number, seen as so many images
    image = torch.zeros(1).expand(n, 1, size, size)
    huge = Batch(image, torch.zeros(1, dtype=torch.int64).expand(n, size, size), torch.ones(n) > 0, torch.arange(1))
    with pytest.raises(OutOfMemoryError, match=r"4194304 samples of 4096 × 4096.*train.batch_size=4.*lower"):
        train_step(objective, state, huge, FP32)


def test_clipping_bounds_the_norm_of_the_gradient_and_keeps_its_direction() -> None:
    gradients = []
    for clip in (None, 0.01):
        config = FP32.model_copy(update={"gradient_clip": clip})
        state, objective = fresh(config=config)
        train_step(objective, state, batch(), config)
        gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]))
    whole, clipped = gradients
    assert whole.norm() > 0.1
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.01), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(F.cosine_similarity(whole, clipped, dim=0), torch.tensor(1.0))


def test_the_average_of_the_weights_is_what_is_kept_and_follows_its_formula() -> None:
    config = FP32.model_copy(update={"ema": 0.5})
    state, objective = fresh(config=config)
    name = "anatomy_encoder.head.weight"
    expected = state.model.state_dict()[name].clone()
    for k in range(12):
        train_step(objective, state, batch(seed=k), config)
        decay = min(0.5, (2 + k) / (11 + k))
        expected = decay * expected + (1 - decay) * state.model.state_dict()[name]
    state.end_epoch(0.5)
    torch.testing.assert_close(state.candidate.state_dict()[name], expected)
    assert torch.equal(state.best_weights[name], state.candidate.state_dict()[name])
    assert not torch.equal(state.best_weights[name], state.model.state_dict()[name])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_of_the_average_lies_between_0_and_1(decay: float) -> None:
    with pytest.raises(ValueError, match="ema"):
        TrainConfig(ema=decay)


@pytest.mark.parametrize("network", [SDNET, UNetConfig(width=4)])
def test_the_memory_layout_changes_neither_terms_nor_gradients(network: SDNetConfig | UNetConfig) -> None:
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        state, objective = fresh(network)
        state.model.to(memory_format=layout)  # type: ignore[call-overload]
        b = batch(labelled=3, unlabelled=0)
        state.latent.manual_seed(0)
        terms = objective(b.image, b.mask, int(b.labelled.sum()))
        torch.stack(list(terms.values())).sum().backward()
        results.append((terms, [p.grad for p in state.model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


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
    scores = mean_scores(volume_scores(Perfect(), [ValidationVolume(mask.astype(np.float32), mask)], "fp32"))  # type: ignore[arg-type]
    assert scores["dice_LV"] == scores["dice_MYO"] == 1.0
    scores = mean_scores(volume_scores(Perfect(), [ValidationVolume(wrong.astype(np.float32), mask)], "fp32"))  # type: ignore[arg-type]
    assert scores["dice_LV"] == 0.0


def test_channel_balance_is_least_for_certain_pixels_and_channels_used_alike() -> None:
    index = torch.arange(64).reshape(1, 8, 8) % 8
    alike = F.one_hot(index, 8).permute(0, 3, 1, 2).float()
    one = F.one_hot(torch.zeros_like(index), 8).permute(0, 3, 1, 2).float()
    assert float(channel_balance(alike)) == pytest.approx(0.0, abs=1e-4)
    assert float(channel_balance(one)) == pytest.approx(math.log(8), abs=1e-4)
    assert float(channel_balance(torch.full((1, 8, 4, 4), 1 / 8))) == pytest.approx(math.log(8), abs=1e-4)


def test_balance_and_kl_enter_the_loss_only_when_asked_for() -> None:
    state, _ = fresh()
    objective = Objective(state.model, LossConfig(balance=0.1, kl=0.1), state.latent)
    assert {"balance", "kl"} <= set(train_step(objective, state, batch(), FP32))


def test_separate_updates_are_those_of_the_labelled_and_then_of_the_unlabelled_samples_alone() -> None:
    both = batch()
    separate = FP32.model_copy(update={"update": "separate"})
    still = LossConfig(latent=0)  # nothing random, so that the updates can be made one by one
    state, by_turns = fresh(config=separate)[0], fresh()[0]
    objective, turns = (Objective(s.model, still, s.latent) for s in (state, by_turns))
    train_step(objective, state, both, separate)
    first, second = both.parts()
    assert first.labelled.all() and not second.labelled.any() and len(first.image) + len(second.image) == 4
    train_step(turns, by_turns, first, FP32)
    train_step(turns, by_turns, second, FP32)
    assert state.step == 1
    ours, theirs = state.model.state_dict(), by_turns.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def shares_of_two_vendors(difference: float, slices: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Anatomies (N, 2, 8, 8) whose first channel covers a share that differs between vendors 0 and 1."""
    g = torch.Generator().manual_seed(0)
    vendor = torch.arange(slices) % 2
    level = 0.4 + difference * vendor
    first = torch.rand(slices, 8, 8, generator=g) < level[:, None, None]
    return torch.stack([first, ~first], dim=1).float(), vendor


def test_alignment_is_nothing_between_like_vendors_and_grows_with_their_difference() -> None:
    values = []
    for difference in (0.0, 0.1, 0.3):
        alignment = VendorAlignment(2, 2)
        anatomy, vendor = shares_of_two_vendors(difference)
        for i in range(0, len(vendor), 4):
            value = alignment(anatomy[i : i + 4], vendor[i : i + 4])
        values.append(float(value))
    assert values[0] < 0.2 < values[1] < values[2]


def test_the_gradient_of_alignment_moves_each_vendors_shares_towards_the_others() -> None:
    alignment = VendorAlignment(2, 2)
    anatomy, vendor = shares_of_two_vendors(0.2)
    for i in range(0, 396, 4):
        alignment(anatomy[i : i + 4], vendor[i : i + 4])
    last = anatomy[396:].clone().requires_grad_()
    alignment(last, vendor[396:]).backward()
    assert last.grad is not None
    slope = last.grad.mean(dim=(2, 3))  # descent lowers channel 0 where the vendor has more of it than the mean
    assert (slope[vendor[396:] == 1, 0] > 0).all() and (slope[vendor[396:] == 0, 0] < 0).all()


def test_alignment_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    config = LossConfig(align=0.1)
    batches = [replace(batch(seed=s), vendor=torch.tensor([0, 1, 0, 1])) for s in range(4)]

    def train(state: TrainState, some: list[Batch]) -> TrainState:
        objective = Objective(state.model, config, state.latent, state.alignment)
        for one in some:
            assert "align" in train_step(objective, state, one, FP32)
        return state

    whole = train(TrainState.create(SDNET, FP32, seed=0, vendors=2), batches)
    half = train(TrainState.create(SDNET, FP32, seed=0, vendors=2), batches[:2])
    resumed = TrainState.create(SDNET, FP32, seed=0, vendors=2)
    resumed.restore(half.to_bytes())
    train(resumed, batches[2:])
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_twins_are_held_alike_only_where_there_are_twins_and_the_weight_rises() -> None:
    from pipeline.training.losses import consistency_loss, ramp

    torch.manual_seed(0)
    network = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
    state = TrainState.create(network, TrainConfig(precision="fp32"), seed=0)
    objective = Objective(state.model, LossConfig(consistency_ramp=10), state.latent)
    image, mask = torch.rand(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32))
    labelled = torch.tensor([True, True, False, False])
    assert "consistency" not in objective(image, mask, int(labelled.sum()))
    assert float(consistency_loss(image, image)) == 0
    other = torch.cat([image[:2], image[2:].flip(-1)])
    terms = [objective(image, mask, int(labelled.sum()), twin=other, step=s)["consistency"] for s in (0, 10)]
    early, late = (float(term.detach()) for term in terms)
    assert early == pytest.approx(ramp(0, 10) * late) and late > 0
    assert "consistency" not in objective(image[:2], mask[:2], int(labelled[:2].sum()), twin=image[:2])
    term = objective(image, mask, int(labelled.sum()), twin=other, step=10)["consistency"]
    term.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in state.model.anatomy_encoder.parameters())


def test_a_teacher_is_followed_and_not_trained() -> None:
    """The running average segments the twin, and what it finds draws the network towards itself alone."""
    config = LossConfig(consistency_ramp=1, consistency_by="teacher")
    state = TrainState.create(UNetConfig(width=4), TrainConfig(precision="fp32", ema=0.9), seed=0)
    assert state.average is not None
    with torch.no_grad():
        for parameter in state.average.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    objective = Objective(state.model, config, state.latent, teacher=state.average)
    before = {name: value.clone() for name, value in state.average.state_dict().items()}
    assert set(dict(objective.named_parameters())) == {f"model.{name}" for name, _ in state.model.named_parameters()}
    image, mask = torch.rand(4, 1, 32, 32), torch.zeros((4, 32, 32), dtype=torch.long)
    labelled, twin = torch.tensor([True, False, False, False]), torch.rand(4, 1, 32, 32)
    term = objective(image, mask, int(labelled.sum()), twin=twin, step=1)["consistency"]
    state.model.train()
    with torch.no_grad():
        ours = state.model(image)[1:].softmax(1)[:, 1:]
        theirs = state.average(twin[1:]).softmax(1)[:, 1:]
    sums = [v.sum((0, 2, 3)) for v in (ours * theirs, ours * ours, theirs * theirs)]
    assert float(term.detach()) == pytest.approx(1 - float((2 * sums[0] / (sums[1] + sums[2])).mean()), rel=1e-4)
    term.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in state.model.parameters())
    for name, value in state.average.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="running average"):
        Objective(state.model, config, state.latent)
