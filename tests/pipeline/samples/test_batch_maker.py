"""A batch that is made at once is the batch that the data actors make; here the CPU stands in for a card."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.samples import canvas
from pipeline.samples.batch_maker import BatchMaker, batches_ahead
from pipeline.samples.maker import MADE_AT, MADE_S, REJECTED, SampleMaker
from pipeline.samples.plan import PlanConfig
from pipeline.samples.stream_config import StreamConfig
from storage.errors import InputError
from storage.node_folder import FOLDER
from tests.actors.tiny_runs import PREPROCESS, filled_bank

STEPS = range(3, 7)
NNUNET = pytest.mark.skipif(find_spec("batchgeneratorsv2") is None, reason="pip install 'cardiomix[nnunet]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of slices of three sizes, an SDNet and the bank of both."""
    folder = tmp_path_factory.mktemp("batches")
    filled_bank(folder)
    return folder


def stream_config(made: Path, **changes: Any) -> StreamConfig:
    values: dict[str, Any] = {
        "run": str(made / "run"),
        "bank": str(made / "bank.zarr"),
        "sdnet": str(made / "sdnet"),
        "preprocess": PREPROCESS,
        "plan": PlanConfig(),
        "seed": 0,
        "semi_supervised": True,
        "ra": True,
        "fa": True,
        "batch_size": 4,
    }
    return StreamConfig(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ra": False, "plan": PlanConfig(flips="both")},
        {"fa": False, "bank": None},
        {"plan": PlanConfig(flips="both", ra_unlabelled=False, fa_anatomy="labelled")},
        {"plan": PlanConfig(fa_order="ra_first")},
        {"plan": PlanConfig(fa_policy="own")},
        {"plan": PlanConfig(fa_policy="interpolate", fa_guard="intensities")},
        {"plan": PlanConfig(fa_policy="extrapolate", fa_reach=3.0)},
        {"plan": PlanConfig(fa_policy="gaussian")},
        {"plan": PlanConfig(fa_render="residual")},
        {"plan": PlanConfig(fa_render="residual", fa_order="ra_first")},
        {"plan": PlanConfig(fa_step=(0.5, 2.0))},
        {"plan": PlanConfig(fa_step=(0.5, 2.0), fa_order="ra_first")},
        {"plan": PlanConfig(fa_render="residual", fa_step=(0.5, 2.0))},
        {"twins": True},
        {"twins": True, "plan": PlanConfig(fa_render="residual")},
        {"appearance": "bigaug"},
        {"appearance": "fourier"},
        {"appearance": "bigaug", "plan": PlanConfig(fa_order="ra_first")},
        {"appearance": "histogram", "fa": False},
        {"appearance": "mixstyle", "fa": False},
        {"appearance": "gin", "fa": False, "bank": None},
        pytest.param({"appearance": "nnunet", "fa": False}, marks=NNUNET),
        {"plan": PlanConfig(turn_degrees=30, zoom=(0.8, 1.2), elastic=0.3)},
        {"twins": True, "plan": PlanConfig(turn_degrees=30, elastic=0.3, fa_render="residual")},
        {"plan": PlanConfig(fa_regions="anatomy")},
        {"plan": PlanConfig(fa_regions="anatomy"), "fa": False, "twins": True},
        {"appearance": "bigaug", "fa": False, "bank": None, "twins": True},
        {"plan": PlanConfig(fa_regions="labels"), "fa": False, "bank": None},
        {"plan": PlanConfig(fa_regions="grey"), "fa": False, "appearance": "bigaug"},
    ],
    ids=lambda changes: "-".join(
        str(value)
        for name, field in changes.items()
        for value in ([name] if name != "plan" else field.model_dump(exclude_defaults=True).values())
    ),
)
def test_a_batch_made_at_once_is_the_actors_batch(made: Path, changes: dict[str, Any]) -> None:
    config = stream_config(made, **changes)
    expected = SampleMaker(config)({"step": np.array(STEPS)})
    maker = BatchMaker(config)
    batches = [maker(step) for step in STEPS]
    found = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}
    assert set(found) == set(expected)
    for name in set(found) & {"image", "twin"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
    for name in ("mask", "labelled", "slice_id"):
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype
    assert found[REJECTED].mean() == pytest.approx(expected[REJECTED].mean())
    assert found[MADE_S].shape == found[MADE_AT].shape == expected[MADE_S].shape and (found[MADE_S] > 0).all()


def test_the_papers_samples_are_drawn_as_they_were_recorded(made: Path) -> None:
    """Recorded by commit fe846f6, before there were residual images; every second sample of a stream is drawn."""
    images = SampleMaker(stream_config(made))({"step": np.arange(3)})["image"][:8].reshape(8, -1)
    means = [-0.0043, 0.1278, -0.0022, 0.1216, -0.2632, -0.5531, -0.2114, -0.6062]
    spreads = [0.2827, 0.1389, 0.2231, 0.0699, 0.2471, 0.5733, 0.288, 0.5086]
    np.testing.assert_allclose(images.mean(axis=1), means, rtol=0, atol=1e-4)
    np.testing.assert_allclose(images.std(axis=1), spreads, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["fa_first", "ra_first"])
def test_residual_images_with_their_own_codes_are_the_real_ones(made: Path, order: Any) -> None:
    plan = PlanConfig(fa_policy="own", fa_render="residual", fa_order=order, fa_share=1.0)
    drawn, real = (BatchMaker(stream_config(made, plan=plan, fa=fa))(3)["image"] for fa in (True, False))
    torch.testing.assert_close(drawn, real, rtol=0, atol=1e-6)


def test_the_guard_turns_down_some_images_of_those_plans_that_are_to_show_it(made: Path) -> None:
    for plan in (
        PlanConfig(fa_step=(0.5, 2.0), fa_order="ra_first"),
        PlanConfig(fa_step=(0.5, 2.0), fa_render="residual"),
    ):
        maker = BatchMaker(stream_config(made, plan=plan))
        assert 0 < np.mean([maker(step)[REJECTED].mean() for step in range(6)]) < 0.5


@pytest.mark.parametrize("most", [1, 4000])
def test_how_samples_are_grouped_on_canvases_does_not_matter(
    made: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stream_config(made, twins=True, plan=PlanConfig(fa_render="residual"))
    together = BatchMaker(config)(5)
    monkeypatch.setattr(canvas, "MOST_PIXELS", most)
    apart = BatchMaker(config)(5)
    for name in ("image", "twin"):
        torch.testing.assert_close(apart[name], together[name], rtol=0, atol=1e-5)
    assert torch.equal(apart["mask"], together["mask"])


def test_groups_hold_every_image_once_and_are_not_mostly_padding() -> None:
    shapes = [(40, 34), (512, 512), (26, 26), (34, 40), (40, 34), (500, 300)]
    groups = canvas.alike(shapes)
    assert sorted(k for group in groups for k in group) == list(range(6))
    assert [5, 1] in groups and len(groups) == 2
    assert len(canvas.alike([(2000, 2000)] * 3)) == 3


def test_the_batches_ahead_are_those_of_the_plan_wherever_they_start_and_of_each_worker(made: Path) -> None:
    config = stream_config(made)
    whole = list(batches_ahead(config, range(8)))
    later = list(batches_ahead(config, range(5, 8)))
    for batch, again in zip(whole[5:], later, strict=True):
        assert torch.equal(batch["image"], again["image"]) and torch.equal(batch["mask"], again["mask"])
    shares = [list(batches_ahead(config, range(2), rank=rank, world=2)) for rank in range(2)]
    for step in range(2):
        ids = np.concatenate([share[step]["slice_id"] for share in shares])
        assert sorted(ids) == sorted(whole[step]["slice_id"].tolist())
    with pytest.raises(InputError, match="5 workers cannot share 4 labelled"):
        next(batches_ahead(stream_config(made, semi_supervised=False), range(4), rank=0, world=5))


def test_a_stream_that_is_left_ends_its_thread_and_what_fails_in_it_is_raised(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    before = threading.active_count()
    stream = batches_ahead(stream_config(made), range(100))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    bank = shutil.copytree(made / "bank.zarr", tmp_path / "bank.zarr")
    shard = next(path for path in (bank / "anatomy").rglob("*") if path.is_file() and path.name != "zarr.json")
    shard.write_bytes(shard.read_bytes()[:-9])
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))  # where the undamaged bank is not
    with pytest.raises(InputError, match="anatomy"):
        next(batches_ahead(stream_config(made, bank=str(bank)), range(4)))


def test_a_network_can_be_trained_on_what_was_made(made: Path) -> None:
    batch = next(batches_ahead(stream_config(made), range(1)))
    layer = torch.nn.Conv2d(1, 2, 3)
    layer(batch["image"]).sum().backward()
    assert layer.weight.grad is not None
