from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.factors.extract import FrozenSDNet, NetworkView, bank_rows, view
from pipeline.factors.names import factors_name, precision_of
from pipeline.networks.config import SDNetConfig
from pipeline.networks.files import load_sdnet
from pipeline.networks.folding import folded
from pipeline.networks.sdnet import SDNet
from storage.bank.anatomy_codec import unpack
from storage.slices.store import SliceStore
from tests.actors.tiny_runs import PREPROCESS, write_run, write_sdnet


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> list[NetworkView]:
    store = SliceStore.open(write_run(tmp_path_factory.mktemp("data")))
    return [view(store, i, PREPROCESS) for i in range(len(store))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SDNet:
    return load_sdnet(write_sdnet(tmp_path_factory.mktemp("network"), seed=1))


def with_statistics(network: nn.Module, seed: int) -> nn.Module:
    """A copy in eval mode whose batch-norms are anything but what they start as."""
    generator, network = torch.Generator().manual_seed(seed), copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -2.0, 2.0),
                (module.running_var, 0.01, 4.0),
                (module.weight, -2.0, 2.0),
                (module.bias, -1.0, 1.0),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return network


@given(seed=st.integers(0, 2**32), width=st.integers(1, 6), size=st.sampled_from([16, 32, 48]))
@settings(max_examples=15)
def test_folded_network_equals_the_unfolded_one(seed: int, width: int, size: int) -> None:
    torch.manual_seed(seed % 1000)
    network = with_statistics(SDNet(SDNetConfig(anatomy_width=width, modality_width=1)).anatomy_encoder, seed)
    image = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.inference_mode():
        expected, found = network(image), folded(network)(image)
        exact = network.double()(image.double())
    # as close to the exact result as the unfolded network is, but for a few roundings
    error = (expected - exact).abs().max()
    assert (found - exact).abs().max() <= 8 * error + 1e-5 * exact.abs().max()


def test_folding_leaves_no_batch_norm_and_the_network_as_it_was() -> None:
    network = SDNet(SDNetConfig(anatomy_width=2, modality_width=2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded(network).modules())
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_convolution_without_bias_and_a_norm_without_scale_fold_too() -> None:
    network = with_statistics(nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)), 3)
    plain = nn.Sequential(network[0], nn.BatchNorm2d(3, affine=False).eval())  # type: ignore[index]
    image = torch.rand(1, 1, 8, 8)
    with torch.inference_mode():
        assert torch.allclose(network(image), folded(network)(image), atol=1e-5)
        assert torch.allclose(plain(image), folded(plain)(image), atol=1e-5)


def test_a_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be folded"):
        folded(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False)))


def test_factors_are_the_plain_networks(views: list[NetworkView], model: SDNet) -> None:
    frozen = FrozenSDNet(model)
    same = []
    for seen, (anatomy, modality) in zip(views, frozen.factors(views), strict=True):
        with torch.inference_mode():
            expected = model.encode_anatomy(torch.from_numpy(seen.canvas)[None, None])[0].numpy()
            assert np.allclose(modality, model.encode_modality(torch.from_numpy(seen.crop)[None, None])[0], atol=1e-5)
        same.append((unpack(anatomy, 8) == expected[(slice(None), *seen.extent)]).mean())
    assert np.mean(same) > 0.9999


def test_a_slices_factors_depend_on_no_other_slice_and_on_no_canvas(views: list[NetworkView], model: SDNet) -> None:
    frozen, (height, width) = FrozenSDNet(model), (96, 96)
    rows = bank_rows(frozen, views, (height, width))
    for k in reversed(range(len(views))):
        ((anatomy, modality),) = frozen.factors([views[k]])
        h, w = anatomy.shape
        top, left = (height - h) // 2, (width - w) // 2
        assert np.array_equal(rows.anatomy[k, top : top + h, left : left + w], anatomy)
        assert np.array_equal(rows.mask[k, top : top + h, left : left + w], views[k].mask)
        assert np.array_equal(rows.modality[k], modality)
        assert np.count_nonzero(rows.anatomy[k]) == np.count_nonzero(anatomy)
        assert rows.mask[k].sum() == views[k].mask.sum()


def test_batches_of_one_canvas_give_the_slices_own_factors_in_their_order(
    views: list[NetworkView], model: SDNet
) -> None:
    h, w = views[0].canvas.shape
    wider = NetworkView(np.full((h, w + 16), -1.0, np.float32), np.s_[:h, :w], views[0].crop, views[0].mask)
    wider.canvas[:, :w] = views[0].canvas
    mixed = [views[0], wider, *views[1:], replace(wider, crop=views[1].crop)]
    alone, together = FrozenSDNet(model).factors(mixed), FrozenSDNet(model, batch=3).factors(mixed)
    bits = [(unpack(a, 8) == unpack(b, 8)).mean() for (a, _), (b, _) in zip(alone, together, strict=True)]
    assert np.mean(bits) > 0.9999
    for (_, expected), (_, found) in zip(alone, together, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_bf16_flips_few_bits_and_has_a_name_of_its_own(views: list[NetworkView], model: SDNet) -> None:
    fp32, bf16 = (bank_rows(FrozenSDNet(model, p), views, (96, 96)) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert 0.95 < (unpack(fp32.anatomy, 8) == unpack(bf16.anatomy, 8)).mean() < 1
    assert np.allclose(fp32.modality, bf16.modality, atol=0.05)
    names = [factors_name("0123456789abcdef", p) for p in ("fp32", "bf16")]  # type: ignore[arg-type]
    assert [precision_of(name, "0123456789abcdef") for name in names] == ["fp32", "bf16"]
    assert precision_of(names[1], "another") is None


def test_a_view_is_of_the_slice_alone(tmp_path: Path, views: list[NetworkView]) -> None:
    store = SliceStore.open(write_run(tmp_path, unseen_seed=7))
    for i in np.flatnonzero(store.column("split") == "train"):
        seen = view(store, int(i), PREPROCESS)
        assert np.array_equal(seen.canvas, views[i].canvas) and np.array_equal(seen.crop, views[i].crop)
        assert all(n % 16 == 0 and n >= PREPROCESS.size for n in seen.canvas.shape)
