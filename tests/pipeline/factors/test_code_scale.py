"""Standardised codes have the prior's scale, and nothing that the SDNet draws or segments is another."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from pipeline.factors.code_scale import standardise_codes
from pipeline.networks.config import SDNetConfig
from pipeline.networks.sdnet import SDNet
from tests.pipeline.training.test_channel_revival import images


def sdnet(modulation: Literal["adain", "adain_relu", "scalars", "none"] = "adain") -> SDNet:
    torch.manual_seed(0)
    model = SDNet(
        SDNetConfig(anatomy_width=4, modality_width=2, segmentor_width=2, decoder_width=2, modulation=modulation)
    )
    head = model.modality_encoder[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():  # codes that differ, and by dimension
        head.weight.mul_(torch.logspace(0, 1, 8)[:, None])
        head.bias.copy_(torch.linspace(-3, 3, 8))
    return model


@pytest.mark.parametrize("modulation", ["adain", "adain_relu", "scalars"])
def test_the_codes_change_and_the_images_do_not(modulation: Literal["adain", "adain_relu", "scalars"]) -> None:
    before, image = sdnet(modulation).eval(), images(20)
    after = copy.deepcopy(before).train()
    standardise_codes(after, image, chunk=7)
    assert after.training
    after.eval()
    with torch.inference_mode():
        codes, old = after.encode_modality(image), before.encode_modality(image)
        assert codes.mean(0).abs().max() < 1e-3 and (codes.std(0, unbiased=False) - 1).abs().max() < 1e-3
        assert old.std(0).max() < 0.1
        anatomy = before.encode_anatomy(image)
        for donor in (slice(None), torch.arange(19, -1, -1)):  # own codes, and others'
            assert torch.allclose(after.decode(anatomy, codes[donor]), before.decode(anatomy, old[donor]), atol=1e-4)
        assert torch.equal(after(image), before(image))


@pytest.mark.parametrize("dimensions", [[3], list(range(8))])
def test_a_dimension_next_to_constant_is_not_blown_up(dimensions: list[int]) -> None:
    model = sdnet()
    head = model.modality_encoder[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[dimensions] *= 1e-9
    standardise_codes(model, images(20))
    codes = model.eval().encode_modality(images(20, seed=1))
    assert torch.isfinite(codes).all() and codes[:, dimensions].abs().max() < 0.5


def test_a_decoder_without_modulation_has_no_scale_to_take_up() -> None:
    model = sdnet("none")
    before = copy.deepcopy(model.state_dict())
    standardise_codes(model, images(20))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
