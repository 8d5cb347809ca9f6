from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.networks.config import SDNetConfig
from pipeline.networks.sdnet import Decoder
from pipeline.samples.synthesis import synthesize, unpack_planes
from storage.bank.anatomy_codec import unpack


def test_planes_are_unpacked_as_the_codec_does() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, 20, 31)).astype(np.uint8)
    for channels in (8, 5):
        np.testing.assert_array_equal(
            unpack_planes(torch.from_numpy(packed), channels).numpy(), unpack(packed, channels)
        )


def decoder(modulation: str = "adain", width: int = 16) -> Decoder:
    torch.manual_seed(0)
    return Decoder(SDNetConfig(decoder_width=width, modulation=modulation)).eval().requires_grad_(False)  # type: ignore[arg-type]


def blobs(n: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Packed anatomies of compact regions, at most one channel a pixel, as a trained encoder gives."""
    coarse = np.random.default_rng(height).integers(-1, 8, (n, -(-height // 7), -(-width // 7)))
    packed = np.where(coarse < 0, 0, 1 << np.maximum(coarse, 0)).astype(np.uint8)
    return np.kron(packed, np.ones((1, 7, 7), np.uint8))[:, :height, :width]


@pytest.mark.parametrize("shape", [(160, 144), (61, 90)])
@pytest.mark.parametrize("modulation", ["adain", "adain_relu", "scalars", "none"])
def test_synthesis_stays_within_1e_5_of_a_float64_decoder(modulation: str, shape: tuple[int, int]) -> None:
    network, packed = decoder(modulation), blobs(2, *shape)
    modality = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    with torch.inference_mode():
        planes = torch.from_numpy(unpack(packed, 8)).double()
        expected = copy.deepcopy(network).double()(planes, torch.from_numpy(modality).double())[:, 0].numpy()
    np.testing.assert_allclose(synthesize(network, 8, packed, modality), expected, rtol=0, atol=1e-5)


def test_any_byte_is_an_anatomy_and_any_width_a_decoder() -> None:
    network = decoder(width=3)
    packed = np.random.default_rng(0).integers(0, 256, (1, 40, 33)).astype(np.uint8)
    modality = np.ones((1, 8), np.float32)
    with torch.inference_mode():
        planes = torch.from_numpy(unpack(packed, 8)).double()
        expected = copy.deepcopy(network).double()(planes, torch.from_numpy(modality).double())[:, 0].numpy()
    np.testing.assert_allclose(synthesize(network, 8, packed, modality), expected, rtol=0, atol=1e-5)


def test_bf16_draws_nearly_the_same_image() -> None:
    network, packed = decoder(), blobs(1, 96, 96)
    modality = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    exact, rough = (synthesize(network, 8, packed, modality, precision) for precision in ("fp32", "bf16"))
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.05


def test_synthesis_leaves_its_inputs_alone_and_takes_read_only_ones() -> None:
    network, packed, modality = decoder(width=4), blobs(1, 48, 48), np.ones((1, 8), np.float32)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    packed.setflags(write=False)
    modality.setflags(write=False)
    first = synthesize(network, 8, packed, modality)
    np.testing.assert_array_equal(synthesize(network, 8, packed, modality), first)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2,), (3, 4), ()])
def test_the_bytes_are_the_same_for_any_grouping(cuts: tuple[int, ...]) -> None:
    network, packed = decoder(), blobs(5, 64, 80)
    modality = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)
    whole = synthesize(network, 8, packed, modality)
    parts = [
        synthesize(network, 8, a, m) for a, m in zip(np.split(packed, cuts), np.split(modality, cuts), strict=True)
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
