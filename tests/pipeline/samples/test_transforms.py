"""Transforms for torch's DataLoader and MONAI's Compose: what a run's own stream would draw, from (seed, index)."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.samples.plan import PlanConfig, generator
from pipeline.samples.regions import region_looks
from pipeline.samples.transforms import FactorAugment, RandPixelArea, RandRegionLooks, bank_preprocess, slice_sample
from storage.bank.bank import FactorBank
from storage.bank.index import slice_keys
from storage.bank.node_cache import BankView
from storage.errors import InputError
from storage.slices.store import SliceStore
from tests.actors.tiny_runs import PREPROCESS, filled_bank, write_sdnet


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, an SDNet and the bank of both."""
    folder = tmp_path_factory.mktemp("transforms")
    filled_bank(folder)
    return folder


def samples(made: Path, **changes: Any) -> list[dict[str, Any]]:
    """Every training slice as the transforms take it."""
    store = SliceStore.open(str(made / "run"))
    train = np.flatnonzero(store.column("split") == "train")
    return [slice_sample(store, int(i), PREPROCESS) | {"index": k} | changes for k, i in enumerate(train)]


def test_half_of_the_images_are_drawn_and_each_is_a_function_of_seed_and_index(made: Path) -> None:
    augment, again = (FactorAugment(str(made / "bank.zarr"), seed=3) for _ in range(2))
    given = samples(made)
    drawn = [augment(sample) for sample in given]
    back = [again(sample) for sample in reversed(given)][::-1]
    other = [FactorAugment(str(made / "bank.zarr"), seed=4)(sample) for sample in given]
    for one, two in zip(drawn, back, strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
    changed = [not np.array_equal(a["image"], b["image"]) for a, b in zip(given, drawn, strict=True)]
    assert 0 < sum(changed) < len(given)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(drawn, other, strict=True))
    for before, after in zip(given, drawn, strict=True):
        np.testing.assert_array_equal(before["mask"], after["mask"])
        assert after["image"].shape == before["image"].shape and after["image"].dtype == np.float32
        assert np.abs(after["image"]).max() <= 1 + 1e-6  # resampling rounds


def test_every_slice_is_drawn_in_some_epoch_and_left_in_another(made: Path) -> None:
    augment, given = FactorAugment(str(made / "bank.zarr")), samples(made)[:4]  # an even number
    epochs = [
        [
            not np.array_equal(augment(s | {"index": e * len(given) + k})["image"], s["image"])
            for k, s in enumerate(given)
        ]
        for e in range(12)
    ]
    assert all(any(of_slice) and not all(of_slice) for of_slice in zip(*epochs, strict=True))


def test_a_slice_that_the_bank_lacks_is_encoded_by_its_sdnet(made: Path) -> None:
    plan = PlanConfig(fa_share=1.0)
    sample = samples(made)[0]
    stranger = {k: v for k, v in sample.items() if k != "subject"}
    augment = FactorAugment(str(made / "bank.zarr"), str(made / "sdnet"), plan)
    np.testing.assert_allclose(augment(stranger)["image"], augment(sample)["image"], rtol=0, atol=1e-4)
    alone = FactorAugment(str(made / "bank.zarr"), plan=plan)
    for lacking in (stranger, sample | {"subject": "nobody"}):
        with pytest.raises(InputError, match="is not in the bank; pass sdnet="):
            alone(lacking)
    namesake = sample | {"image": np.flip(sample["image"], 2).copy(), "pixel_area_mm2": 1.5 * sample["pixel_area_mm2"]}
    encoded = augment({k: v for k, v in namesake.items() if k != "subject"})["image"]
    np.testing.assert_array_equal(augment(namesake)["image"], encoded)  # another patient, with other pixels
    with pytest.raises(InputError, match=r"has pixels of .* mm², in the bank they are of .* mm²; .* pass sdnet="):
        alone(namesake)


def test_region_looks_are_those_of_the_banks_own_anatomy(made: Path) -> None:
    bank = FactorBank.open(str(made / "bank.zarr"))
    looks, view = RandRegionLooks(bank, share=1.0, seed=2), BankView(bank)
    row_of = {key: row for row, key in enumerate(slice_keys(bank.index))}
    for sample in samples(made):
        rng = generator(2, "regions", 0, sample["index"])
        rng.random()  # whether it gets a look
        anatomy = view.anatomy[row_of[sample["subject"], sample["frame"], sample["slice"]]]
        np.testing.assert_array_equal(looks(sample)["image"][0], region_looks(sample["image"][0], anatomy, rng))


def test_region_looks_are_a_function_of_seed_and_index_for_a_share_of_the_images(made: Path) -> None:
    bank, given = str(made / "bank.zarr"), samples(made)
    looks = RandRegionLooks(bank, seed=1)
    first = [looks(sample | {"index": k}) for k in range(40) for sample in given[:1]]
    again = pickle.loads(pickle.dumps(looks))
    changed = [not np.array_equal(one["image"], given[0]["image"]) for one in first]
    assert 8 < sum(changed) < 32
    np.testing.assert_array_equal(again(given[0] | {"index": 7})["image"], first[7]["image"])
    np.testing.assert_array_equal(first[7]["mask"], given[0]["mask"])
    stranger = {name: value for name, value in given[0].items() if name != "subject"}
    encoding = RandRegionLooks(bank, str(made / "sdnet"), seed=1)
    k = changed.index(True)
    np.testing.assert_allclose(encoding(stranger | {"index": k})["image"], first[k]["image"], rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="is not in the bank; pass sdnet="):
        looks(stranger | {"index": k})


def test_what_cannot_be_done_is_one_clear_error(made: Path, tmp_path: Path) -> None:
    bank = str(made / "bank.zarr")
    sample = samples(made)[0]
    augment = FactorAugment(bank, plan=PlanConfig(fa_share=1.0))
    for wrong, message in (
        (sample | {"image": sample["image"][:, 2:]}, "in the bank it is"),
        (sample | {"image": np.zeros((3, 8, 8), np.float32)}, "is no slice; give"),
        ({k: v for k, v in sample.items() if k != "index"}, "has no index; number the samples"),
    ):
        with pytest.raises(InputError, match=message):
            augment(wrong)
    with pytest.raises(InputError, match="has no pixel_area_mm2"):
        RandPixelArea(PREPROCESS)({k: v for k, v in sample.items() if k != "pixel_area_mm2"})
    with pytest.raises(InputError, match="is not the SDNet that filled the bank"):
        FactorAugment(bank, write_sdnet(tmp_path / "other", 1))
    with pytest.raises(InputError, match="needs a run's stream"):
        FactorAugment(bank, plan=PlanConfig(fa_policy="own"))
    with pytest.raises(InputError, match="need a run's stream"):
        FactorAugment(bank, plan=PlanConfig(zoom=(0.9, 1.1)))
    with pytest.raises(InputError, match=r"plan\.fa_guard=reencoding: needs a run's stream"):
        FactorAugment(bank, plan=PlanConfig(fa_policy="gaussian"))
    with pytest.raises(InputError, match="no factor bank here"):
        FactorAugment(str(tmp_path / "absent"))


def test_areas_are_uniform_over_the_range_and_mask_and_image_stay_together(made: Path) -> None:
    low, high = 1.2, 2.4
    rescale, sample = RandPixelArea(PREPROCESS, (low, high), seed=1), samples(made)[0]
    scaled = [rescale(sample | {"index": k}) for k in range(400)]
    native = np.array([s["pixel_area_mm2"] for s in scaled]) * PREPROCESS.factor**2
    assert low <= native.min() and native.max() <= high
    assert abs(native.mean() - (low + high) / 2) < 0.05
    assert scaled[0]["image"].shape == scaled[0]["mask"].shape == (1, PREPROCESS.size, PREPROCESS.size)
    shares = [rescale(sample | {"index": k, "image": sample["mask"] * 0.5 - 0.5}) for k in range(20)]
    for one in shares:  # an image that is the mask stays the mask, but for smoothed edges
        inside = np.abs(2 * (one["image"] + 0.5) - one["mask"]) < 0.5
        assert inside.mean() > 0.9


class Slices(Dataset[dict[str, Any]]):
    """As docs/experiments.md has it."""

    def __init__(self, given: list[dict[str, Any]], transform: Any) -> None:
        self.given, self.transform = given, transform

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(self.transform(self.given[i]))


def test_torchs_worker_processes_and_monais_compose_give_the_same_samples(made: Path) -> None:
    from monai.transforms.compose import Compose

    bank = str(made / "bank.zarr")
    augment = Compose([FactorAugment(bank, seed=1), RandPixelArea(bank_preprocess(bank), seed=1)])
    given = samples(made)
    expected = torch.stack([torch.as_tensor(augment(sample)["image"]) for sample in given])
    for workers in (0, 2):
        loader = DataLoader(Slices(given, augment), batch_size=4, num_workers=workers)
        batches = torch.cat([batch["image"] for batch in loader])
        torch.testing.assert_close(batches, expected, rtol=0, atol=1e-6)
    tensors = augment(given[1] | {"image": torch.from_numpy(given[1]["image"])})
    assert isinstance(tensors["image"], torch.Tensor)
    torch.testing.assert_close(tensors["image"], expected[1], rtol=0, atol=1e-6)


def test_the_lines_of_the_documents_run_with_monai_and_without(made: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "experiments.md").read_text()
    lines = next(block for block in page.split("```python\n")[1:] if "DataLoader(Augmented()" in block).split("```")[0]
    lines = lines.replace('"runs/demo/bank.zarr"', repr(str(made / "bank.zarr")))
    lines = lines.replace('"runs/demo"', repr(str(made / "run")))
    composed = "Compose([RandRegionLooks(bank, seed=1), RandPixelArea(preprocess, seed=1)])"
    assert composed in lines and "runs/" not in lines
    looks, area = "RandRegionLooks(bank, seed=1)", "RandPixelArea(preprocess, seed=1)"
    plain = lines.replace("from monai.transforms import Compose\n", "").replace(
        composed, f"(lambda looks, area: lambda sample: area(looks(sample)))({looks}, {area})"
    )
    batches = []
    with_fa = lines.replace("RandRegionLooks", "FactorAugment")  # as the page says
    for code in (lines, plain, with_fa):
        names: dict[str, Any] = {"__name__": "a script"}
        torch.manual_seed(0)  # of the order of the slices
        exec(compile(code, "docs/experiments.md", "exec"), names)
        batches.append(names["batch"])
        assert len(names["slices"]) > 8
    one, other, drawn = batches
    torch.testing.assert_close(drawn["mask"], one["mask"], rtol=0, atol=0)
    assert isinstance(names["augment"].transforms[0], FactorAugment)
    size = PREPROCESS.size
    assert one["image"].shape[1:] == one["mask"].shape[1:] == (1, size, size)
    assert one["image"].dtype == torch.float32 and one["mask"].dtype == torch.uint8
    torch.testing.assert_close(one["image"], other["image"], rtol=0, atol=1e-6)
    torch.testing.assert_close(one["mask"], other["mask"], rtol=0, atol=0)


def test_neither_ray_nor_mlflow_is_imported(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "bank.zarr", tmp_path / "bank.zarr")
    code = (
        "import sys; from pipeline.samples.transforms import FactorAugment, RandPixelArea\n"
        f"FactorAugment({str(tmp_path / 'bank.zarr')!r})\n"
        "assert not {'ray', 'mlflow', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
