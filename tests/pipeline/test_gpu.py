"""What a GPU computes is what a CPU does, and a step does not wait for it. Needs torch and a card, no Ray.

`python -m pytest -m gpu tests/pipeline`
"""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.factors.extract import FrozenSDNet, NetworkView
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.files import build, default_device
from pipeline.networks.sdnet import Decoder, SDNet
from pipeline.samples import canvas
from pipeline.samples.one_ahead import OneAhead
from pipeline.samples.rescale import Axes, Axis, nearest_together, resample_crop, resample_together
from pipeline.samples.synthesis import encode_exactly, synthesize, synthesize_together
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import LAG, Batch, settle, train_step
from pipeline.training.validation import ValidationVolume, volume_scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")
SDNET = SDNetConfig(anatomy_width=8, modality_width=8, segmentor_width=8, decoder_width=8)
UNET = UNetConfig(width=8)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32: in TF32 they have ten bits of mantissa."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def noise(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch(device: torch.device, labelled: int = 4, unlabelled: int = 4) -> Batch:
    """As the stream gives it: what only counts and names stays on the CPU."""
    image, count = noise(labelled + unlabelled), labelled + unlabelled
    mask = (image[:, 0] > 0).long()
    return Batch(image.to(device), mask.to(device), torch.arange(count) < labelled, torch.arange(count))


def test_networks_run_where_the_card_is() -> None:
    assert default_device().type == "cuda"
    assert next(TrainState.create(UNET, TrainConfig(), seed=0).model.parameters()).device.type == "cuda"


@pytest.mark.parametrize("network", [UNET, SDNET])
def test_a_network_s_logits_are_the_cpu_s(network: UNetConfig | SDNetConfig) -> None:
    torch.manual_seed(0)
    model, image = build(network).eval(), noise(3)
    with torch.inference_mode():
        expected = model(image)
        found = copy.deepcopy(model).to(GPU)(image.to(GPU)).cpu()
    # an anatomy pixel near one half may round the other way, and moves its surroundings
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.99


def test_drawn_images_are_the_cpu_s() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SDNET).eval()
    rng = np.random.default_rng(0)
    anatomy = (1 << rng.integers(0, 8, (3, 64, 64))).astype(np.uint8)
    modality = rng.normal(size=(3, 8)).astype(np.float32)
    here, there = (synthesize(decoder.to(device), 8, anatomy, modality) for device in (torch.device("cpu"), GPU))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)


def test_images_of_several_sizes_that_are_drawn_together_are_those_drawn_one_by_one() -> None:
    torch.manual_seed(0)
    decoder, rng = Decoder(SDNET).eval(), np.random.default_rng(0)
    shapes = [(64, 64), (40, 56), (61, 33)]
    anatomies = [(1 << rng.integers(0, 8, shape)).astype(np.uint8) for shape in shapes]
    modality = rng.normal(size=(3, 8)).astype(np.float32)
    expected = [synthesize(decoder, 8, a[None], m[None])[0] for a, m in zip(anatomies, modality, strict=True)]
    on_card = canvas.on_canvases(anatomies, (64, 64), torch.uint8, GPU)
    inside = canvas.inside(shapes, (64, 64), GPU)
    codes = canvas.upload(modality, GPU)
    drawn = synthesize_together(decoder.to(GPU), 8, on_card, codes, inside).cpu().numpy()
    for image, (height, width), one in zip(drawn, shapes, expected, strict=True):
        np.testing.assert_allclose(image[:height, :width], one, rtol=0, atol=1e-5)


def test_slices_that_are_rescaled_together_are_those_rescaled_one_by_one() -> None:
    rng, scales = np.random.default_rng(1), (0.6, 1.0, 1.7)
    flips = [(False, False), (True, False), (True, True)]
    shapes = [(96, 80), (40, 56), (61, 33)]
    images = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    masks = [rng.integers(0, 4, shape).astype(np.uint8) for shape in shapes]
    given = zip(images, masks, scales, flips, strict=True)
    expected = [resample_crop(x, m, s, 64, float(x.min()), f) for x, m, s, f in given]
    image, mask = (
        canvas.on_canvases(images, (96, 80), torch.float32, GPU),
        canvas.on_canvases(masks, (96, 80), torch.uint8, GPU),
    )
    rows, columns = (
        Axes.of([Axis(x[n], 64, s, f[n]) for x, s, f in zip(shapes, scales, flips, strict=True)], GPU) for n in (0, 1)
    )
    fill = canvas.lowest(image, canvas.inside(shapes, (96, 80), GPU))
    made, labels = resample_together(image, rows, columns, fill), nearest_together(mask, rows, columns)
    np.testing.assert_allclose(made.cpu(), np.stack([x for x, _ in expected]), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels.cpu(), np.stack([m for _, m in expected]))


def test_the_modality_encoder_reads_the_same_code_from_an_image() -> None:
    torch.manual_seed(0)
    encoder, image = SDNet(SDNET).modality_encoder.eval(), noise(2)
    with torch.inference_mode():
        expected = encoder(image)
        found = encode_exactly(copy.deepcopy(encoder).to(GPU), image.to(GPU)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_factors_are_the_cpu_s() -> None:
    torch.manual_seed(0)
    model = SDNet(SDNET).eval()
    images = [noise(40)[k, 0, : 64 - 16 * (k % 2)].numpy() for k in range(40)]  # two canvases, more than a batch
    views = [NetworkView(x, np.s_[:48, :64], x[:48, :48], np.zeros((48, 64), np.uint8)) for x in images]
    here, there = (FrozenSDNet(copy.deepcopy(model), device=d).factors(views) for d in ("cpu", GPU))
    for (anatomy, modality), (ours, code) in zip(here, there, strict=True):
        assert (anatomy == ours).mean() > 0.999
        np.testing.assert_allclose(code, modality, rtol=0, atol=1e-4)


@pytest.mark.parametrize("network", [UNET, SDNET])
def test_the_first_step_has_the_cpu_s_losses(
    network: UNetConfig | SDNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, terms = TrainConfig(precision="fp32"), []
    for device in (torch.device("cpu"), GPU):
        monkeypatch.setattr("pipeline.training.state.default_device", lambda device=device: device)
        state = TrainState.create(network, config, seed=0)
        objective = Objective(state.model, LossConfig(latent=0.0), state.latent)
        rows = batch(device, 4, 4 if network is SDNET else 0)
        terms.append({name: float(term) for name, term in train_step(objective, state, rows, config).items()})
    assert terms[1] == pytest.approx(terms[0], abs=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("network", [UNET, SDNET])
def test_no_step_waits_for_the_card(network: UNetConfig | SDNetConfig, compiled: bool) -> None:
    config = TrainConfig(ema=0.9, gradient_clip=1.0)
    state = TrainState.create(network, config, seed=0)
    objective = Objective(state.model, LossConfig(), state.latent)
    if compiled:
        objective.compile_terms()
    rows = batch(GPU, 4, 4 if network is SDNET else 0)
    for _ in range(LAG + 2):
        train_step(objective, state, rows, config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(objective, state, rows, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    settle(state)


@pytest.mark.parametrize("network", [UNET, SDNET])
def test_compiled_steps_are_the_plain_ones_whatever_the_batch_s_size(network: UNetConfig | SDNetConfig) -> None:
    config, kept = TrainConfig(precision="fp32", ema=0.9), []
    for compiled in (False, True):
        state = TrainState.create(network, config, seed=0)
        objective = Objective(state.model, LossConfig(), state.latent)
        by_graph = objective.compile_terms() if compiled else None
        sizes = [(4, 4)] * 5 + [(3, 0)] + [(4, 4)] * 2  # warmed up, recorded, replayed, another graph, replayed
        made = [train_step(objective, state, batch(GPU, *size), config) for size in sizes]
        settle(state)
        kept.append([{name: float(term) for name, term in terms.items()} for terms in made])
        assert by_graph is None or by_graph.works
    for found, expected in zip(kept[1], kept[0], strict=True):
        assert found == pytest.approx(expected, abs=5e-3)


def test_where_bits_must_stay_a_second_training_has_the_first_one_s() -> None:
    program = """
import hashlib, sys
sys.path.insert(0, ".")
from pipeline.training.kernels import same_bits_every_time
same_bits_every_time()
from tests.pipeline.test_gpu import *
state = TrainState.create(SDNET, TrainConfig(), seed=0)
objective = Objective(state.model, LossConfig(), state.latent)
for _ in range(5):
    train_step(objective, state, batch(GPU), TrainConfig())
settle(state)
weights = b"".join(value.cpu().numpy().tobytes() for value in state.model.state_dict().values())
print(hashlib.sha256(weights).hexdigest())
"""
    words = [sys.executable, "-c", program]
    told = [subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert told[0] == told[1]


def test_a_state_that_was_kept_goes_on_with_the_same_losses() -> None:
    config, rows = TrainConfig(precision="fp32"), batch(GPU)
    state = TrainState.create(SDNET, config, seed=0)
    train_step(Objective(state.model, LossConfig(), state.latent), state, rows, config)
    settle(state)
    again = TrainState.create(SDNET, config, seed=0)
    again.restore(state.to_bytes())
    losses = [
        {k: float(v) for k, v in train_step(Objective(s.model, LossConfig(), s.latent), s, rows, config).items()}
        for s in (state, again)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_batches_sent_one_ahead_arrive_whole_through_one_pinned_buffer() -> None:
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.random((4, 1, 64, 64), np.float32)) for _ in range(8)]
    made = (
        {"image": image.clone(), "mask": (image[:, 0] > 0.5).byte(), "slice_id": torch.arange(4)} for image in images
    )
    with OneAhead(made, "cuda") as stream:
        kept = list(stream)  # all of them, so that a buffer used too soon would show
        assert {value.is_pinned() for value in stream._pinned.values()} == {True}
    for image, batch in zip(images, kept, strict=True):
        assert batch["image"].device.type == batch["mask"].device.type == "cuda" and not batch["slice_id"].is_cuda
        assert torch.equal(batch["image"].cpu(), image) and torch.equal(batch["mask"].cpu(), (image[:, 0] > 0.5).byte())


def test_validation_scores_are_the_cpu_s() -> None:
    torch.manual_seed(0)
    model = build(UNET)
    image = noise(5)[:, 0].numpy()
    volumes = [ValidationVolume(image, (image > 0).astype(np.uint8))]
    (here,), (there,) = (volume_scores(copy.deepcopy(model).to(d), volumes, "fp32") for d in (torch.device("cpu"), GPU))
    assert there == pytest.approx(here, abs=1e-2)
