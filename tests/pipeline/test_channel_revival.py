"""A dead anatomy channel gets part of a live one's pixels, and nothing else moves."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.channel_revival import revive
from pipeline.networks.sdnet import SDNet, SDNetConfig

CONFIG = SDNetConfig(anatomy_width=4, modality_width=2, segmentor_width=2, decoder_width=2)


@pytest.fixture
def network() -> tuple[SDNet, torch.optim.Optimizer, torch.Tensor]:
    """An SDNet whose channels all fire, each parameter with moments of Adam, and a batch of smooth images."""
    torch.manual_seed(0)
    model = SDNet(CONFIG)
    image = F.interpolate(torch.rand(6, 1, 8, 8) * 2 - 1, size=(64, 64), mode="bilinear")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    drawn = model.decode(model.encode_anatomy(image), model.encode_modality(image))
    (model(image).square().mean() + drawn.mean()).backward()
    optimiser.step()
    head = model.anatomy_encoder.head
    assert head.bias is not None
    with torch.no_grad():
        for _ in range(30):  # batch norm's statistics
            model.anatomy_encoder(image)
        features = model.anatomy_encoder.eval().features(image).movedim(1, -1).reshape(-1, 4)
        centres = features[torch.linspace(0, len(features) - 1, 8).long()]
        # a channel is where the features are nearest to its centre
        head.weight[:, :, 0, 0] = 200 * centres
        head.bias.copy_(-100 * centres.square().sum(dim=1))
    return model, optimiser, image


def kill(model: SDNet, channels: list[int]) -> None:
    """Make channels never fire."""
    with torch.no_grad():
        assert model.anatomy_encoder.head.bias is not None
        model.anatomy_encoder.head.bias[channels] = -1e4


def usage(model: SDNet, image: torch.Tensor) -> torch.Tensor:
    """Share of pixels of each channel."""
    model.eval()
    with torch.no_grad():
        return model.encode_anatomy(image).mean(dim=(0, 2, 3))


def test_a_dead_channel_fires_again_and_only_one_live_channel_gives_way(network) -> None:  # type: ignore[no-untyped-def]
    model, optimiser, image = network
    kill(model, [5])
    before = usage(model, image)
    assert before[5] == 0
    assert revive(model, optimiser, image) == 5
    after = usage(model, image)
    assert after[5] > 0.01
    (divided,) = torch.nonzero((before - after) > 0.5 * after[5]).flatten().tolist()
    assert 0.2 < float(after[5] / before[divided]) < 0.8  # a part of it, not all


def test_the_rest_of_the_network_stays_as_it_is(network) -> None:  # type: ignore[no-untyped-def]
    model, optimiser, image = network
    kill(model, [2])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    revive(model, optimiser, image)
    assert model.training
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"anatomy_encoder.head.weight", "anatomy_encoder.head.bias"}
    rows = (model.anatomy_encoder.head.weight != before["anatomy_encoder.head.weight"]).flatten(1).any(dim=1)
    assert int(rows.sum()) == 2


def test_its_moments_are_forgotten_and_the_others_kept(network) -> None:  # type: ignore[no-untyped-def]
    model, optimiser, image = network
    kill(model, [2])
    moments = optimiser.state[model.anatomy_encoder.head.weight]["exp_avg"]
    before = moments.clone()
    revive(model, optimiser, image)
    forgotten = (moments == 0).flatten(1).all(dim=1)
    assert forgotten[2]
    assert int(forgotten.sum()) == 2
    assert torch.equal(moments[~forgotten], before[~forgotten])


def test_nothing_happens_where_all_channels_live(network) -> None:  # type: ignore[no-untyped-def]
    model, optimiser, image = network
    assert bool((usage(model, image) > 1e-3).all())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert revive(model, optimiser, image) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_anatomy_of_all_zero_is_left_alone(network) -> None:  # type: ignore[no-untyped-def]
    model, optimiser, image = network
    with torch.no_grad():
        model.anatomy_encoder.head.weight.zero_()
        model.anatomy_encoder.head.bias.zero_()  # eight shares of 1/8 all round to 0
    assert revive(model, optimiser, image) is None
