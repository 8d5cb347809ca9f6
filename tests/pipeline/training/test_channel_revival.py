"""A dead anatomy channel gets part of a live one's pixels, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.sdnet import SDNet
from pipeline.training.channel_revival import revive
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, train_step

CONFIG = SDNetConfig(anatomy_width=4, modality_width=2, segmentor_width=2, decoder_width=2)
TRAIN = TrainConfig(precision="fp32", ema=0.9, revive_every=4)


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, size=(64, 64), mode="bilinear")


def network_of(state: TrainState) -> SDNet:
    assert isinstance(state.model, SDNet)
    return state.model


def lively(vendors: int = 2) -> TrainState:
    """An SDNet whose channels all fire on `images()`, each parameter with moments of Adam."""
    state = TrainState.create(CONFIG, TRAIN, seed=0, vendors=vendors)
    model, image = network_of(state), images()
    drawn = model.decode(model.encode_anatomy(image), model.encode_modality(image))
    (model(image).square().mean() + drawn.mean()).backward()
    state.optimiser.step()
    with torch.no_grad():
        for _ in range(30):  # batch norm's statistics
            model.anatomy_encoder(image)
        features = model.anatomy_encoder.eval().features(image).movedim(1, -1).reshape(-1, 4)
        centres = features[torch.linspace(0, len(features) - 1, 8).long()]
        head = model.anatomy_encoder.head
        assert head.bias is not None
        # a channel is where the features are nearest to its centre
        head.weight[:, :, 0, 0] = 200 * centres
        head.bias.copy_(-100 * centres.square().sum(dim=1))
    assert state.average is not None
    state.average.load_state_dict(model.state_dict())
    return state


def kill(state: TrainState, channel: int) -> None:
    """Make a channel never fire."""
    for network in (state.model, state.average):
        assert isinstance(network, SDNet)
        assert network.anatomy_encoder.head.bias is not None
        with torch.no_grad():
            network.anatomy_encoder.head.bias[channel] = -1e4


def usage(model: object, image: torch.Tensor) -> torch.Tensor:
    """Share of pixels of each channel."""
    assert isinstance(model, SDNet)
    model.eval()
    with torch.no_grad():
        return model.encode_anatomy(image).mean(dim=(0, 2, 3))


def test_a_dead_channel_fires_again_in_part_of_one_live_channel_s_pixels() -> None:
    state, image = lively(), images()
    kill(state, 5)
    before = usage(state.model, image)
    assert before[5] == 0
    assert revive(state, image) == 5
    assert state.revived == 1
    after = usage(state.model, image)
    assert after[5] > 0.01
    (divided,) = torch.nonzero((before - after) > 0.5 * after[5]).flatten().tolist()
    assert 0.2 < float(after[5] / before[divided]) < 0.8
    torch.testing.assert_close(usage(state.average, image), after)  # the running average is what is validated


def test_the_rest_of_the_network_stays_as_it_is() -> None:
    state = lively()
    kill(state, 2)
    state.model.train()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    revive(state, images())
    assert state.model.training
    moved = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"anatomy_encoder.head.weight", "anatomy_encoder.head.bias"}
    rows = (network_of(state).anatomy_encoder.head.weight != before["anatomy_encoder.head.weight"]).flatten(1).any(1)
    assert int(rows.sum()) == 2


def test_the_next_steps_are_no_longer_than_others() -> None:
    """Adam's steps with a steady gradient are of the learning rate; a second moment set to 0 makes them longer."""
    state = lively()
    head = network_of(state).anatomy_encoder.head
    generator = torch.Generator().manual_seed(1)
    gradient = (torch.rand(head.weight[:1].shape, generator=generator) + 0.5).expand_as(head.weight)

    def step() -> torch.Tensor:
        before = head.weight.detach().clone()
        state.optimiser.zero_grad(set_to_none=True)
        head.weight.grad = gradient.clone()
        state.optimiser.step()
        return (head.weight.detach() - before).abs()

    for _ in range(3000):
        step()
    kill(state, 2)
    assert revive(state, images()) == 2
    assert max(float(step().max()) for _ in range(100)) < 1.5e-3  # the learning rate is 1e-3


def test_alignment_remembers_half_of_the_divided_channel_s_share_for_each() -> None:
    state = lively()
    assert state.alignment is not None
    state.alignment.mean.copy_(torch.rand(2, 8) + 0.1)
    state.alignment.mean[:, 3] = 0
    means = state.alignment.mean.clone()
    kill(state, 3)
    assert revive(state, images()) == 3
    (divided,) = [k for k in range(8) if k != 3 and not torch.equal(state.alignment.mean[:, k], means[:, k])]
    for channel in (3, divided):
        torch.testing.assert_close(state.alignment.mean[:, channel], means[:, divided] / 2)


def test_nothing_happens_where_all_channels_live_or_all_are_dead() -> None:
    state = lively()
    assert bool((usage(state.model, images()) > 1e-3).all())
    for _ in range(2):
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        assert revive(state, images()) is None
        assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
        with torch.no_grad():
            for parameter in network_of(state).anatomy_encoder.head.parameters():
                parameter.zero_()  # eight shares of 1/8 all round to 0
    assert state.revived == 0


def test_training_looks_between_the_ends_of_epochs_and_goes_on_bit_for_bit_after_a_restart() -> None:
    def trained(state: TrainState, steps: range) -> None:
        objective = Objective(state.model, LossConfig(), state.latent, None)
        for step in steps:
            image = images(4, seed=step)
            train_step(
                objective, state, Batch(image, (image[:, 0] > 0).long(), torch.ones(4) > 0, torch.arange(4)), TRAIN
            )

    state, again = lively(), lively()
    kill(state, 5)
    trained(state, range(1))
    assert state.revived == 0
    checkpoint = state.to_bytes()
    trained(state, range(1, 5))
    assert state.revived >= 1  # looked after step 2
    again.restore(checkpoint)
    trained(again, range(1, 5))
    assert again.revived == state.revived
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in state.model.state_dict().items())


def test_a_u_net_has_no_channels_to_revive() -> None:
    state = TrainState.create(UNetConfig(width=4), TRAIN, seed=0)
    objective = Objective(state.model, LossConfig(), state.latent, None)
    image = images(2)
    for _ in range(3):
        train_step(objective, state, Batch(image, (image[:, 0] > 0).long(), torch.ones(2) > 0, torch.arange(2)), TRAIN)
    assert state.revived == 0


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state = lively()
    kill(state, 5)
    found = revive(state, images(seed=rank))
    weights = {**state.model.state_dict(), "revived": torch.tensor(-1 if found is None else found)}
    torch.save([weights, state.optimiser.state_dict()["state"]], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_with_other_images_stay_equal(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    (ours, moments), (theirs, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert int(ours["revived"]) == 5
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for parameter, values in moments.items():
        assert all(torch.equal(value, others[parameter][name]) for name, value in values.items())
