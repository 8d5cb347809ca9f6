from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.inference import onnx as onnx_export
from pipeline.inference.model_card import add_test_scores, describe_training
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.description import read_config
from pipeline.networks.files import load_model, save_model
from pipeline.networks.sdnet import SDNet
from storage.errors import InputError, StageError
from storage.slices.store import SliceStore
from tests.actors.tiny_runs import write_run, write_sdnet
from tests.tiny_networks import PREPROCESS, tiny_unet, write_unet


@pytest.mark.parametrize("kind", ["unet", "sdnet"])
def test_onnx_computes_what_torch_does_at_any_batch_size(tmp_path: Path, kind: str) -> None:
    folder = (write_unet if kind == "unet" else write_sdnet)(tmp_path / "net", seed=3)
    target = tmp_path / "net.onnx"
    check = onnx_export.export_onnx(folder, str(target))
    assert check.largest_difference <= 1e-4
    model, document = load_model(folder)
    session = onnxruntime.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        image = torch.rand(batch, 1, 32, 32, generator=torch.Generator().manual_seed(batch)) * 2 - 1
        found = session.run(None, {"image": image.numpy()})
        with torch.inference_mode():
            if isinstance(model, SDNet):
                anatomy = model.encode_anatomy(image)
                assert 0 < anatomy.mean() < 1
                np.testing.assert_array_equal(found[1], anatomy.numpy())
            np.testing.assert_allclose(found[0], model(image).numpy(), atol=1e-4)
    (entry,) = onnx.load(target).metadata_props
    assert json.loads(entry.value) == document


def test_a_pixel_that_rounds_the_other_way_is_counted_and_only_its_surroundings_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SDNet(SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)).eval()
    images = (np.random.default_rng(0).random((2, 1, 32, 32)) * 2 - 1).astype(np.float32)
    data = onnx_export._exported(onnx_export._Path(onnx_export.folded(model)), 32, True, {})

    class Turned(torch.nn.Module):
        """Says that one anatomy pixel was another, and answers otherwise around it alone."""

        def __init__(self, reach: int) -> None:
            super().__init__()
            self.inner, self.reach = onnx_export._Path(model), reach

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, anatomy = (part.clone() for part in self.inner(image))
            anatomy[0, 0, 10, 10] = 1 - anatomy[0, 0, 10, 10]
            logits[0, :, 10 - self.reach : 11 + self.reach, 10 - self.reach : 11 + self.reach] += 1.0
            return logits, anatomy

    with pytest.raises(StageError, match="1 of 2048"):  # of so few pixels none may turn
        onnx_export.compare(data, Turned(2), images)
    many = np.concatenate([images] * 8)
    check = onnx_export.compare(data, Turned(2), many)
    assert check.turned == 1 and check.largest_difference <= 1e-4
    with pytest.raises(StageError, match="disagree"):
        onnx_export.compare(data, Turned(3), many)


def test_what_is_said_about_a_network_can_be_added_to_without_another_name(tmp_path: Path) -> None:
    store = SliceStore.open(write_run(tmp_path / "data"))
    facts = describe_training(
        store,
        arm="ss_sdnet_ra",
        semi_supervised=True,
        training={"steps": 7, "flips": "none"},
        validation={"dice": 0.8125},
    )
    vendors = facts["data"]["train"]
    assert {name: counts["subjects"] for name, counts in vendors.items()} == {"A": 1, "B": 1, "C": 1}
    assert (vendors["C"]["slices"], vendors["C"]["labelled_slices"]) == (4, 0)
    assert facts["data"]["validation"]["A"]["subjects"] == 1
    supervised = describe_training(store, arm="unet_ra", semi_supervised=False, training={}, validation={})
    assert set(supervised["data"]["train"]) == {"A", "B"}

    folder = str(tmp_path / "net")
    name = save_model(folder, *_unet(), PREPROCESS.model_dump(mode="json"), ["terms of A | B"], ["a1"], facts)
    before, weights = read_config(folder), (tmp_path / "net" / "model.safetensors").read_bytes()
    scores = {"n": 3, "dice_mean": 0.9, "dice_low": 0.8, "dice_high": 0.95, "hd95_median_mm": float("inf"), "missed": 2}
    add_test_scores(folder, [{"vendor": "D", "structure": "LV", "extra": 1, **scores}])
    after = load_model(folder)[1]
    assert after["fingerprint"] == name == before["fingerprint"]
    assert after["about"]["metrics"]["test"][0]["hd95_median_mm"] is None
    assert after["about"]["metrics"]["validation"] == {"dice": 0.8125}
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == weights
    text = (tmp_path / "net" / "model_card.md").read_text()
    for part in (
        "ss_sdnet_ra",
        "0.812",
        "| D | LV | 3 | 0.900 (0.800 to 0.950) | – | 2 |",
        "Not a medical device",
        name,
    ):
        assert part in text
    assert "a1" not in text and "a1" not in json.dumps(after)


def test_a_description_from_before_there_was_anything_about_it_still_loads(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "net")
    path = tmp_path / "net" / "model.json"
    document = json.loads(path.read_text())
    del document["about"]
    path.write_text(json.dumps(document))
    assert load_model(folder)[1]["fingerprint"] == document["fingerprint"]
    document["terms"] = ["none"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="not the ones"):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("network"), "not a cardiomix model description"),
        (lambda d: d.pop("fingerprint"), "not a cardiomix model description"),
        (lambda d: d["network"].update(width="wide"), "describes no network of this version"),
        (lambda d: d["network"].update(colour=3), "describes no network of this version"),
    ],
)
def test_a_damaged_description_is_one_line(tmp_path: Path, damage: Callable[[Any], Any], message: str) -> None:
    folder = write_unet(tmp_path / "net")
    path = tmp_path / "net" / "model.json"
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def _unet() -> tuple[torch.nn.Module, UNetConfig]:
    return tiny_unet(3), UNetConfig(width=4)
