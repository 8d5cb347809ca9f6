from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.description import sdnet_fingerprint
from pipeline.networks.files import count_parameters, decoder_state, load_decoder, load_model, load_sdnet, save_model
from pipeline.networks.sdnet import SDNet, adain
from pipeline.networks.unet import UNet
from storage.errors import InputError

SMALL = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)


@pytest.fixture
def sdnet() -> SDNet:
    torch.manual_seed(0)
    return SDNet(SMALL)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 1, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_parameter_counts_are_the_authors() -> None:
    sdnet = SDNet(SDNetConfig())
    assert count_parameters(UNet(64, 4)) == 17_266_436
    assert count_parameters(sdnet.anatomy_encoder) == 17_266_696
    assert count_parameters(sdnet.modality_encoder) == 661_000
    assert count_parameters(sdnet.segmentor) == 42_116


def test_adain_is_instance_norm_scaled_and_shifted() -> None:
    x, scale, shift = torch.randn(2, 5, 9, 9), torch.randn(2, 5), torch.randn(2, 5)
    expected = F.instance_norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(adain(x, scale, shift), expected)


def test_the_anatomy_is_exactly_binary_and_has_a_gradient(sdnet: SDNet, image: torch.Tensor) -> None:
    anatomy = sdnet.encode_anatomy(image)
    assert set(anatomy.detach().unique().tolist()) <= {0.0, 1.0}
    assert int(anatomy.detach().sum(1).max()) <= 1
    (anatomy * torch.randn_like(anatomy)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in sdnet.anatomy_encoder.parameters())


def test_another_modality_vector_draws_another_image(sdnet: SDNet, image: torch.Tensor) -> None:
    anatomy = sdnet.encode_anatomy(image).detach()
    first, second = (sdnet.decode(anatomy, torch.full((2, 8), v)) for v in (-1.0, 1.0))
    assert (first - second).abs().mean() > 1e-3


@pytest.mark.parametrize("modulation", ["adain", "adain_relu", "scalars", "none"])
def test_only_a_decoder_without_adain_ignores_the_modality(modulation: str, image: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = SDNet(SMALL.model_copy(update={"modulation": modulation}))
    anatomy = model.encode_anatomy(image).detach()
    first, second = (model.decode(anatomy, torch.full((2, 8), v)) for v in (-1.0, 1.0))
    assert first.abs().max() < 1
    assert ((first - second).abs().max() == 0) == (modulation == "none")
    if modulation == "none":
        assert count_parameters(model.decoder.style) == 0


def test_the_modality_encoder_learns_from_the_reconstruction(sdnet: SDNet, image: torch.Tensor) -> None:
    reconstruction = sdnet.decode(sdnet.encode_anatomy(image), sdnet.encode_modality(image))
    assert reconstruction.abs().max() < 1
    F.l1_loss(reconstruction, image).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sdnet.modality_encoder.parameters())


def test_any_size_that_is_a_multiple_of_sixteen_gives_logits_of_that_size(sdnet: SDNet, image: torch.Tensor) -> None:
    assert sdnet(image).shape == (2, 4, 48, 64)
    assert UNet(4, 4)(image).shape == (2, 4, 48, 64)


def test_deep_heads_read_coarser_levels_and_leave_the_segmentation_as_it_is(tmp_path: Path) -> None:
    image = torch.randn(2, 1, 32, 32)
    plain, config = UNet(4, 4).eval(), UNetConfig(width=4, deep=3)
    deep = UNet(4, 4, deep=3).eval()
    assert set(plain.state_dict()) < set(deep.state_dict())
    deep.load_state_dict(plain.state_dict(), strict=False)
    levels = deep.logits_by_level(image)
    assert [tuple(logits.shape[1:]) for logits in levels] == [(4, 32, 32), (4, 16, 16), (4, 8, 8), (4, 4, 4)]
    assert torch.equal(levels[0], plain(image)) and torch.equal(deep(image), plain(image))
    save_model(str(tmp_path), deep, config, {}, [])
    assert torch.equal(load_model(str(tmp_path))[0](image), deep(image))


def test_a_saved_network_is_the_same_when_loaded(tmp_path: Path, sdnet: SDNet, image: torch.Tensor) -> None:
    name = save_model(str(tmp_path), sdnet.eval(), SMALL, {"size": 48}, ["terms"])
    loaded = load_sdnet(str(tmp_path))
    torch.testing.assert_close(loaded(image), sdnet(image), rtol=0, atol=0)
    assert sdnet_fingerprint(str(tmp_path)) == name
    decoder = load_decoder(*decoder_state(sdnet))
    anatomy, codes = sdnet.encode_anatomy(image), sdnet.encode_modality(image)
    torch.testing.assert_close(decoder(anatomy, codes), sdnet.decode(anatomy, codes), rtol=0, atol=0)


def test_damaged_or_absent_weights_are_one_clear_line(tmp_path: Path, sdnet: SDNet) -> None:
    with pytest.raises(InputError, match="no trained network"):
        load_model(str(tmp_path))
    save_model(str(tmp_path), sdnet, SMALL, {}, [])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="not the ones"):
        load_model(str(tmp_path))
    save_model(str(tmp_path), UNet(4, 4), UNetConfig(width=4), {}, [])
    with pytest.raises(InputError, match="U-Net"):
        load_sdnet(str(tmp_path))
