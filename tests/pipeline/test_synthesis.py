from __future__ import annotations

import numpy as np
import torch

from pipeline.networks.sdnet import SDNet, SDNetConfig
from pipeline.synthesis import synthesize, unpack_planes
from storage.anatomy_codec import pack, unpack

CONFIG = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)


def factors(n: int = 5) -> tuple[SDNet, torch.Tensor, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    model = SDNet(CONFIG).eval()
    with torch.inference_mode():
        planes = model.encode_anatomy(torch.rand(n, 1, 32, 48) * 2 - 1)
    return model, planes, pack(planes.bool().numpy()), np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)


def test_planes_are_unpacked_as_the_codec_does() -> None:
    _, planes, packed, _ = factors()
    torch.testing.assert_close(unpack_planes(packed, 8), planes, rtol=0, atol=0)
    np.testing.assert_array_equal(unpack_planes(packed, 8).numpy(), unpack(packed, 8))


def test_synthesis_from_bytes_equals_the_plain_decoder() -> None:
    model, planes, packed, modality = factors()
    with torch.inference_mode():
        expected = model.decode(planes, torch.from_numpy(modality))[:, 0].numpy()
    np.testing.assert_allclose(synthesize(model.decoder, 8, packed, modality), expected, atol=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours_in_a_batch() -> None:
    model, _, packed, modality = factors()
    whole = synthesize(model.decoder, 8, packed, modality)
    alone = synthesize(model.decoder, 8, packed[3:4], modality[3:4])[0]
    np.testing.assert_array_equal(whole[3], alone)
