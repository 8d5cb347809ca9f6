"""Turns and bends: image and mask move together, and a heart stays a heart."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, distance_transform_edt, label

from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples.geometry import displacement, moved, sources
from pipeline.samples.plan import PlanConfig, Sample, Stream, StreamSpec
from pipeline.samples.preprocess import WorkingSlice

RNG = np.random.default_rng(0)


def sample(turn: float = 0.0, bend: int = 0) -> Sample:
    return Sample(0, None, None, turn=turn, bend=bend)


def a_slice(mask: np.ndarray) -> WorkingSlice:
    noise = 0.2 * RNG.standard_normal(mask.shape)
    return WorkingSlice((0.4 * mask - 0.6 + noise).clip(-1, 1).astype(np.float32), mask.astype(np.uint8), 1.25**2)


def heart(size: int = 96, wall: float = 4.0) -> np.ndarray:
    """LV (1) in a wall of MYO (2), and RV (3) beside it."""
    y, x = np.mgrid[:size, :size] - size / 2
    mask = np.where(np.hypot(y, x + 20) < 14, 3, 0)
    mask[np.hypot(y, x) < 12 + wall] = 2
    mask[np.hypot(y, x) < 12] = 1
    return mask


def test_a_sample_that_is_not_moved_is_the_same_object() -> None:
    source = a_slice(heart())
    assert moved(source, sample(), 0.0) is source


def test_a_quarter_turn_is_that_of_numpy_for_image_and_mask() -> None:
    source = a_slice(heart())
    turned = moved(source, sample(turn=90.0), 0.0)
    np.testing.assert_array_equal(turned.mask, np.rot90(source.mask, -1))
    np.testing.assert_allclose(turned.image, np.rot90(source.image, -1), atol=1e-5)


def test_what_moves_stays_in_its_range_and_depends_on_the_seed_alone() -> None:
    source = a_slice(heart())
    one, again, other = (moved(source, sample(20.0, bend), 0.3) for bend in (7, 7, 8))
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.mask, again.mask)
    assert one.image.dtype == np.float32 and one.mask.dtype == np.uint8
    assert np.abs(one.image).max() <= 1 and set(np.unique(one.mask)) <= {0, 1, 2, 3}
    assert (one.mask != other.mask).any()


def test_image_and_mask_move_together() -> None:
    mask = heart()
    bent = moved(WorkingSlice((mask / 3 - 0.5).astype(np.float32), mask.astype(np.uint8), 1.0), sample(25.0, 3), 0.3)
    inside = ~binary_dilation(np.abs(np.stack(np.gradient(bent.mask.astype(float)))).max(0) > 0)
    np.testing.assert_allclose(bent.image[inside], bent.mask[inside] / 3 - 0.5, atol=1e-6)


@pytest.mark.parametrize("elastic", [0.1, 0.5])
def test_no_length_changes_by_more_than_the_strain(elastic: float) -> None:
    largest = []
    for seed in range(20):
        field = displacement((80, 100), elastic, 30.0, seed)
        down, across = np.gradient(field, axis=(1, 2))
        norms = np.linalg.norm(np.stack([down, across], axis=-1).transpose(1, 2, 0, 3), ord=2, axis=(2, 3))
        largest.append(norms.max())
        assert abs(field.mean()) < 1e-9
    assert max(largest) <= elastic and max(largest) > 0.5 * elastic


def wall(mask: np.ndarray) -> float:
    """How far the LV is from what is neither LV nor myocardium, in pixels; 0 where there is no LV."""
    cavity = mask == 1
    others = (mask != 1) & (mask != 2)
    return float(distance_transform_edt(~others)[cavity].min()) if cavity.any() else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_cavity_of_a_bent_phantom_stays_within_its_wall(phantom_masks: list[np.ndarray], seed: int) -> None:
    """A strain of .5 leaves neighbours at most 1.5 pixels apart, and the nearest pixel is .71 away from each."""
    closed = [mask for mask in phantom_masks if wall(mask) >= 3.0]
    assert len(closed) >= 10
    for k, mask in enumerate(closed):
        bent = moved(a_slice(mask), sample(34.0 * (-1) ** k, 100 * seed + k), 0.5).mask
        assert wall(bent) > 1.0  # not beside it
        for structure in (1, 2):  # in one piece, but for a pixel at a jagged edge
            parts, _ = label(bent == structure, np.ones((3, 3)))
            assert np.bincount(parts[parts > 0]).max() >= 0.98 * (parts > 0).sum()


@pytest.fixture(scope="module")
def phantom_masks(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Slices of a few patients at end-diastole and end-systole, (H, W) each, of the working grid's 1.2 to 1.5 mm."""
    config = PhantomConfig(
        labelled_a=3, labelled_b=0, unlabelled_c=0, testing=0, frames=2, slices=(6, 6), field_scale=0.55, seed=7
    )
    out = tmp_path_factory.mktemp("phantom")
    write_phantom(out, config)
    volumes = (np.asarray(nib.load(path).dataobj) for path in sorted(out.rglob("*_gt.nii.gz")))
    return [volume[:, :, z, t] for volume in volumes for z in range(volume.shape[2]) for t in range(volume.shape[3])]


def test_a_stream_spreads_its_moves_over_the_range_and_leaves_the_rest_as_it_was() -> None:
    pool = np.arange(5)
    plain = Stream(StreamSpec(3, "labelled", pool, ra_range=(1.0, 2.0), seeded=True))
    spec = StreamSpec(
        3, "labelled", pool, ra_range=(1.0, 2.0), seeded=True, turn_degrees=30.0, zoom=(0.8, 1.25), bends=True
    )
    made = [Stream(spec)(i) for i in range(300)]
    assert [replace(s, turn=0.0, zoom=1.0, bend=0) for s in made] == [plain(i) for i in range(300)]
    turns, zooms = np.array([s.turn for s in made]), np.array([s.zoom for s in made])
    assert -30 <= turns.min() < -25 and 25 < turns.max() <= 30 and abs(turns.mean()) < 3
    assert 0.8 <= zooms.min() < 0.83 and 1.2 < zooms.max() <= 1.25 and abs(np.log(zooms).mean()) < 0.03
    assert len({s.bend for s in made}) == 300
    assert (made[7].twin().turn, made[7].twin().zoom, made[7].twin().bend) == (made[7].turn, made[7].zoom, made[7].bend)


def test_moves_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="zoom must be 0 < low <= high"):
        PlanConfig(zoom=(1.2, 0.9))
    with pytest.raises(ValueError, match="leave fa_order at fa_first"):
        PlanConfig(turn_degrees=10, fa_order="ra_first")
    assert sources((8, 8), sample(), 0.0, 1.0) is None
