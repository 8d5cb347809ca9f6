"""Phantom hearts labelled as Sunnybrook's experts did (no RV, no MYO at ES), from the folder to the scores."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from actors.evaluate_arm import CASES, SLICES, evaluate_job
from actors.export_samples import export
from actors.extraction import bank_index
from actors.ingest import ingest
from actors.train_job import HISTORY, TrainJob, WorkerBudget
from actors.train_slices import taught_structures
from actors.train_worker import first_state, run_epochs
from pipeline.networks.config import UNetConfig
from pipeline.networks.files import read_config, save_model
from pipeline.networks.unet import UNet
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.stream_config import StreamConfig
from pipeline.samples.transforms import slice_sample
from pipeline.scores.tables import read_cases, read_slices, summarise
from pipeline.scores.volumes import cardiac_function
from pipeline.training.config import LossConfig, TrainConfig
from storage import fs
from storage.errors import InputError
from storage.layouts import LayoutOptions, collect, splits
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject
from storage.subjects import ALL_STRUCTURES, MYO, RV
from storage.survey.flags import flags
from storage.survey.survey import survey
from tests.actors.tiny_runs import PREPROCESS

VENDORS = ("B", "D")  # trained on, tested on
SUNNYBROOK = "ED: LV MYO; ES: LV"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A phantom in which vendors B and D are labelled as Sunnybrook is, and the names of these subjects."""
    folder = tmp_path_factory.mktemp("phantom")
    config = PhantomConfig(labelled_a=2, labelled_b=2, unlabelled_c=0, testing=1, frames=2, slices=(6, 6), seed=3)
    write_phantom(folder, config)
    subjects, _ = collect([str(folder)], LayoutOptions())
    names = [s.subject for s in subjects if s.vendor in VENDORS]
    for s in (s for s in subjects if s.vendor in VENDORS):
        path = Path(str(s.frames[0].mask))
        image = nib.load(path)
        mask = np.asarray(image.dataobj).copy()
        mask[mask == RV] = 0
        (es,) = (f.mask_index for f in s.frames if f.phase == "ES")
        mask[..., es][mask[..., es] == MYO] = 0
        nib.save(nib.Nifti1Image(mask, image.affine), path)
    return folder, names


def options(names: list[str]) -> LayoutOptions:
    return LayoutOptions(structures=dict.fromkeys(names, SUNNYBROOK))


@pytest.fixture(scope="module")
def run(data: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The slice store of it, with what is drawn declared."""
    out, chosen = str(tmp_path_factory.mktemp("partial") / "run"), options(data[1])
    subjects = splits.assign(collect([str(data[0])], chosen)[0], chosen)
    finalise(out, {s.subject: write_subject(out, s) for s in subjects}, [], subjects, chosen)
    return out


def training(run: str, out: Path) -> TrainJob:
    config = TrainConfig(batch_size=4, epochs=1, steps_per_epoch=2, precision="fp32")
    stream = StreamConfig(
        run=run, bank=None, preprocess=PreprocessConfig(size=32, field=128), plan=PlanConfig(), seed=0,
        semi_supervised=False, ra=True, fa=False, batch_size=4,
    )  # fmt: skip
    return TrainJob(
        name="tiny", out=str(out), network=UNetConfig(width=4), stream=stream, loss=LossConfig(), train=config,
        workers=1, data_fingerprint="",
    )  # fmt: skip


def test_each_mask_teaches_what_is_drawn_in_it_and_what_nobody_drew_is_background(run: str) -> None:
    store = SliceStore.open(run)
    taught = taught_structures(store)
    assert taught is not None
    train, vendor, phase = (store.column(name) for name in ("split", "vendor", "phase"))
    own = {(v, p): taught[(train == "train") & (vendor == v) & (phase == p)] for v in "AB" for p in ("ED", "ES")}
    assert own["A", "ED"].all() and own["A", "ES"].all() and taught[train != "train"].all()
    assert (own["B", "ED"] == [True, True, False]).all() and (own["B", "ES"] == [True, False, False]).all()
    alone = SliceStore(run, store.table.filter(np.isin(vendor, VENDORS)))  # nobody drew an RV: it is background
    found, phase = taught_structures(alone), alone.column("phase")
    assert found is not None and found[:, 2].all() and found[phase == "ED"].all()
    train = alone.column("split") == "train"
    assert not found[train & (phase == "ES"), 1].any()
    whole = store.table.set_column(store.table.num_columns - 1, "structures", [["LV MYO RV"] * len(store)])
    assert taught_structures(SliceStore(run, whole)) is None


def test_what_is_said_not_to_be_drawn_reaches_the_loss_and_the_validation(
    data: tuple[Path, list[str]], tmp_path: Path
) -> None:
    weights = {}
    for name, chosen in (("said", options(data[1])), ("not said", LayoutOptions())):
        out = str(tmp_path / name / "run")
        subjects = splits.assign(collect([str(data[0])], chosen)[0], chosen)
        finalise(out, {s.subject: write_subject(out, s) for s in subjects}, [], subjects, chosen)
        job, store = training(out, tmp_path / name), SliceStore.open(out)
        state = first_state(job, store, 0)
        budget = WorkerBudget(threads=1, data_actors=0, data_cpus=0.0, stream_mb=64, gpus=0.0)
        run_epochs(job, budget, store, state, 0, 1)
        weights[name] = torch.cat([value.flatten() for value in state.candidate.state_dict().values()])
        (record,) = [json.loads(line) for line in Path(job.out, HISTORY).read_text().splitlines()]
        assert np.isfinite(record["loss/total"])
        drawn = {n for v in store.volumes("validation") for n in v.structures}
        assert {key for key in record if key.startswith("val/dice_")} == {f"val/dice_{n}" for n in drawn}
    assert not torch.equal(weights["said"], weights["not said"])


def test_only_what_is_drawn_is_scored_and_function_needs_both_phases(run: str, tmp_path: Path) -> None:
    config = UNetConfig(width=4)
    torch.manual_seed(0)
    save_model(str(tmp_path), UNet(config.width, 4), config, PREPROCESS.model_dump(), ["terms"])
    assert evaluate_job(run, str(tmp_path), "unet_ra", 0, threads=1, precision="fp32") == 8
    cases = read_cases(fs.join(str(tmp_path), CASES))
    scored: dict[tuple[str, str], list[str]] = {(c["vendor"], c["phase"]): [] for c in cases}
    for case in cases:
        scored[case["vendor"], case["phase"]].append(case["structure"])
        assert case["reference_ml"] > 0  # nothing is called missed that was never drawn
    for v in "ABCD":
        part = v in VENDORS
        assert scored[v, "ED"] == (["LV", "MYO"] if part else list(ALL_STRUCTURES))
        assert scored[v, "ES"] == (["LV"] if part else list(ALL_STRUCTURES))
    rows = {(row["vendor"], row["structure"]) for row in summarise(cases)}
    assert ("D", "RV") not in rows and {("D", "LV"), ("D", "MYO"), ("C", "RV")} <= rows
    assert {(r["vendor"], r["structure"]) for r in read_slices(fs.join(str(tmp_path), SLICES))} == rows
    measures = {row["measure"] for row in cardiac_function(cases) if row["vendor"] == "D"}
    assert measures == {"LV EDV", "LV ESV", "LV EF", "LV mass"}
    lv_at_ed = [c for c in cases if (c["structure"], c["phase"]) == ("LV", "ED")]
    assert {row["measure"] for row in cardiac_function(lv_at_ed)} == {"LV EDV"}
    assert read_config(str(tmp_path))["about"]["metrics"]["test"]


def test_what_is_drawn_goes_with_the_masks_into_banks_and_to_those_who_train_elsewhere(
    run: str, data: tuple[Path, list[str]], tmp_path: Path
) -> None:
    store = SliceStore.open(run)
    ids = np.flatnonzero(store.column("split") == "train")
    index = bank_index(store, ids, (512, 512), PREPROCESS)
    assert index["structures"].to_pylist() == store.column("structures")[ids].tolist()
    full = ids[store.column("vendor")[ids] == "A"]
    assert "structures" not in bank_index(store, full, (512, 512), PREPROCESS).column_names
    partly = next(int(i) for i in ids if store.column("vendor")[i] == "B" and store.column("phase")[i] == "ES")
    assert slice_sample(store, partly, PREPROCESS)["structures"] == "LV"
    with pytest.raises(InputError, match=r"has masks in which some structure is not drawn.* --format slices"):
        export(training(run, tmp_path).stream, str(tmp_path / "Dataset501_Heart"), "nnunet", 4)


def test_inspect_tells_of_labels_that_nobody_drew_and_how_to_say_so(data: tuple[Path, list[str]]) -> None:
    folder, names = data

    def told(chosen: LayoutOptions) -> set[tuple[str, str, str]]:
        found = flags(survey([str(folder)], chosen).subjects, (0.1, 9.0))
        return {(f.subject, f.number, f.check.why) for f in found if f.check.about == "mask"}

    before = told(LayoutOptions())
    assert {(subject, number) for subject, number, _ in before} == {(name, SUNNYBROOK) for name in names}
    assert all("scored as missed" in why and f'": "{SUNNYBROOK}"' in why for _, _, why in before)
    after = told(options(names))
    assert {(subject, number) for subject, number, _ in after} == {(name, SUNNYBROOK) for name in names}
    assert {why for _, _, why in after} == {"the others are neither taught nor scored"}


def test_ingest_tells_of_labels_that_nobody_drew(data: tuple[Path, list[str]], tmp_path: Path, ray_local: None) -> None:
    folder, names = data
    lines = ingest([str(folder)], str(tmp_path / "run")).undrawn
    assert len(lines) >= len(VENDORS) and all("--set 'layouts.structures={" in line for line in lines)
    assert any(line.startswith("D, ") and "RV in no mask at ED or ES, MYO in no mask at ES" in line for line in lines)
    assert ingest([str(folder)], str(tmp_path / "run"), options(names)).undrawn == ()
