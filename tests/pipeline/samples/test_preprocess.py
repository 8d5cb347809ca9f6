from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.inference.predictor import network_input, predict_volume
from pipeline.samples.preprocess import (
    PreprocessConfig,
    centre_crop,
    centre_on,
    normalise,
    volume_statistics,
    working_scales,
    working_shape,
    working_slice,
)
from storage.nifti.write import write_volume
from storage.slices.intensities import statistics
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject
from storage.subjects import FrameSource, Subject

SPACING = (8.0, 1.4, 1.4)


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile", "foreground"])
@given(volume=arrays(np.float32, (2, 5, 6), elements=st.floats(-50, 7000, width=32)))
def test_intensities_lie_in_the_range_of_tanh_whatever_the_scanner_wrote(kind: str, volume: np.ndarray) -> None:
    config = PreprocessConfig(normalisation=kind)  # type: ignore[arg-type]
    out = normalise(volume, volume_statistics(volume, SPACING, config), config)
    assert out.dtype == np.float32
    assert np.all(np.abs(out) <= 1)


def test_zscore_is_the_paper_s_normalisation_divided_by_its_clip() -> None:
    volume = np.random.default_rng(0).normal(300, 40, (4, 32, 32)).astype(np.float32)
    out = normalise(volume, statistics(volume), PreprocessConfig(clip_sigma=3.0))
    expected = np.clip((volume - volume.mean()) / volume.std(), -3, 3) / 3
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile"])
def test_by_its_own_statistics_a_slice_depends_on_no_other_slice(kind: str) -> None:
    volume = np.random.default_rng(0).gamma(2, 100, (3, 32, 32)).astype(np.float32)
    own = PreprocessConfig(normalisation=kind, statistics="slice")  # type: ignore[arg-type]
    whole = normalise(volume, statistics(volume), own)
    for found, image in zip(whole, volume, strict=True):
        by_volume = own.model_copy(update={"statistics": "volume"})
        np.testing.assert_array_equal(found, normalise(image, statistics(image), by_volume))


@given(
    st.integers(0, 20),
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.sampled_from((0, -1024, 255, 32767)),
)
def test_a_network_sees_the_same_bits_of_an_image_that_was_padded(
    seed: int, widths: tuple[int, int], slices: tuple[int, int], value: int
) -> None:
    config = PreprocessConfig(size=32, field=32, normalisation="foreground")
    volume = np.random.default_rng(seed).gamma(2, 100, (3, 24, 40)).astype(np.float32)
    around = [(n, n) for n in widths]  # the network looks at the array's centre, which stays
    whole = np.pad(volume, [slices, *around], constant_values=value)
    first, second = (network_input(v, volume_statistics(v, SPACING, config), SPACING, config) for v in (volume, whole))
    np.testing.assert_array_equal(second[slices[0] : slices[0] + 3], first)
    blank = np.delete(second, range(slices[0], slices[0] + 3), axis=0)
    assert (blank == first.min()).all()


def test_a_background_of_minus_1024_is_as_dark_as_air() -> None:
    config = PreprocessConfig(normalisation="foreground")
    air = np.random.default_rng(0).gamma(2, 5, (3, 144, 144)).astype(np.float32)
    air[:, 12:132, 12:132] += np.random.default_rng(1).gamma(2, 100, (3, 120, 120)).astype(np.float32)
    dark = np.where(air < 12, np.float32(-1024), air)
    first, second = (normalise(v, volume_statistics(v, SPACING, config), config) for v in (air, dark))
    assert np.abs(first - second).max() < 0.02
    plain = PreprocessConfig()
    first, second = (normalise(v, statistics(v), plain) for v in (air, dark))
    assert np.abs(first - second).max() > 0.5


def test_foreground_refuses_other_statistics_and_slices_on_their_own() -> None:
    volume = np.random.default_rng(0).gamma(2, 100, (3, 24, 40)).astype(np.float32)
    with pytest.raises(ValueError, match="volume_statistics"):
        normalise(volume, statistics(volume), PreprocessConfig(normalisation="foreground"))
    with pytest.raises(ValueError, match="leave out statistics=slice"):
        PreprocessConfig(normalisation="foreground", statistics="slice")


def test_scaling_a_scanner_s_intensities_changes_nothing() -> None:
    volume = np.random.default_rng(0).gamma(2, 100, (3, 16, 16)).astype(np.float32)
    config = PreprocessConfig()
    first, second = (normalise(v, statistics(v), config) for v in (volume, volume * 23 + 7))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_the_working_grid_shrinks_by_one_factor_and_makes_pixels_square() -> None:
    config = PreprocessConfig(size=112)
    assert working_scales(1.4, 1.4, config) == pytest.approx((0.5, 0.5))
    scale_y, scale_x = working_scales(2.0, 1.0, config)
    assert scale_y * scale_x == pytest.approx(0.25)
    assert 2.0 / scale_y == pytest.approx(1.0 / scale_x)
    assert working_shape(216, 256, 1.4, 1.4, config) == (108, 128)


@given(st.integers(3, 40), st.integers(3, 40))
def test_what_is_centred_on_a_canvas_is_cropped_back_unchanged(height: int, width: int) -> None:
    image = np.random.default_rng(0).random((height, width), dtype=np.float32)
    canvas, top, left = centre_on(image, (48, 48), -1.0)
    np.testing.assert_array_equal(canvas[top : top + height, left : left + width], image)
    assert canvas.sum() == pytest.approx(image.sum() - (48 * 48 - image.size), rel=1e-4)
    crop = centre_crop(image, 16, -1.0)
    assert crop.shape == (16, 16)


def test_a_network_that_sees_the_answer_predicts_it_on_the_native_grid() -> None:
    """The path to the network's grid and back costs little: a ring of LV and MYO, anisotropic and off centre."""
    import torch

    y, x = np.mgrid[:200, :170]
    r = np.hypot((y - 90) * 1.2, x - 92)
    mask = np.where(r < 18, 1, np.where(r < 28, 2, 0)).astype(np.uint8)[None].repeat(2, 0)

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            labels = ((image[:, 0] - image.min()) / (image.max() - image.min()) * 2).round().long()
            return torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float() * 20

    stats = statistics(mask.astype(np.float32))
    config = PreprocessConfig(size=128, normalisation="minmax")
    found = predict_volume(Oracle(), mask.astype(np.float32), stats, (8.0, 1.2, 1.0), config)  # type: ignore[arg-type]
    assert found.shape == mask.shape
    for label in (1, 2):
        dice = 2 * np.sum((found == label) & (mask == label)) / (np.sum(found == label) + np.sum(mask == label))
        assert dice > 0.9


def test_training_slices_are_centred_on_the_labelled_heart_if_asked_for(tmp_path: Path) -> None:
    z, y, x = np.ogrid[:4, :60, :64]
    far = np.hypot(y - 20, x - 43) + 0 * z  # of a heart 9.5 rows above and 11.5 columns beside the centre
    mask = np.select([far < 6, far < 9, (far < 14) & (x < 36)], [1, 2, 3], 0).astype(np.uint8)
    image = np.random.default_rng(0).integers(1, 200, mask.shape) + 700 * (mask == 1)
    for name, data in (("i", image.astype(np.int16)), ("m", mask)):
        write_volume(str(tmp_path / f"{name}.nii.gz"), data, SPACING, data.dtype)
    paths = str(tmp_path / "i.nii.gz"), str(tmp_path / "m.nii.gz")
    frames = (FrameSource("ED", 0, paths[0], None, paths[1], None), FrameSource("-", 1, paths[0], None, None, None))
    labels = ((1, 1), (2, 2), (3, 3))
    subject = Subject("s", "table", "X", "c", frames, "train", "given", labels, "CC0", trust_label_order=True)
    finalise(str(tmp_path), {"s": write_subject(str(tmp_path), subject)}, [], [subject])
    store = SliceStore.open(str(tmp_path))
    for size in (48, 32):
        usual, centred = (PreprocessConfig(size=size, field=48, centre=centre) for centre in ("image", "mask"))  # type: ignore[arg-type]
        seen = [working_slice(store, i, centred) for i in range(8)]
        found = np.argwhere(np.stack([s.mask for s in seen[:4]]))[:, 1:].mean(0)
        assert np.abs(found - (np.array(seen[0].mask.shape) - 1) / 2).max() < 1
        shift = store.heart(0)
        inputs = network_input(store.volume(range(4))[0], store.statistics(0), SPACING, usual, shift=shift)
        for i in range(4):  # validation and prediction see the same pixels
            crop = centre_crop(seen[i].image, size, 0.0)
            assert np.abs(inputs[i] - crop).mean() < (1e-5 if size == 48 else 0.02)  # resampled edges differ
            assert (crop[centre_crop(seen[i].mask, size, 0) == 1] > 0.2).all()
        for i in range(4, 8):  # no labels
            np.testing.assert_array_equal(seen[i].image, working_slice(store, i, usual).image)


def test_beyond_the_image_the_network_sees_the_slice_s_own_minimum() -> None:
    volume = np.random.default_rng(0).random((2, 60, 60), dtype=np.float32) + 1
    config = PreprocessConfig(size=128)
    out = network_input(volume, statistics(volume), SPACING, config)
    inside = normalise(volume, statistics(volume), config)
    assert out.shape == (2, 128, 128)
    np.testing.assert_allclose(out[:, 0, 0], inside.min((1, 2)))


@pytest.mark.parametrize("shape", [(216, 253), (217, 256), (101, 100)])
@pytest.mark.parametrize("size", [128, 224])
def test_without_rescaling_image_and_mask_share_their_centre_at_any_native_size(
    shape: tuple[int, int], size: int
) -> None:
    """The crop of the working grid neither blurs nor shifts: the image of a mask stays that mask."""
    from pipeline.samples.rescale import resample_crop

    config = PreprocessConfig(size=size, normalisation="minmax")
    extent = working_shape(shape[0], shape[1], 1.4, 1.4, config)
    assert extent[0] % 2 == extent[1] % 2 == 0
    mask = np.zeros(extent, np.uint8)
    mask[extent[0] // 2 - 9 : extent[0] // 2 + 4, extent[1] // 2 - 5 : extent[1] // 2 + 8] = 1
    image, labels = resample_crop(mask.astype(np.float32), mask, 1.0, size, 0.0)
    np.testing.assert_array_equal(image > 0.5, labels == 1)
    np.testing.assert_array_equal(np.unique(image), [0.0, 1.0])
