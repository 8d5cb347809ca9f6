"""What a run's slices were split by: stages that would train on other splits are refused, reports say what was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from experiments import config
from experiments.cli.main import app
from experiments.run import jobs
from experiments.run.workload import workload
from experiments.tracking.lineage import job_params
from pipeline.networks.config import UNetConfig
from pipeline.networks.files import save_model
from pipeline.networks.unet import UNet
from storage.errors import InputError
from storage.identity import identity
from storage.layouts import LayoutOptions
from storage.slices.store import SliceStore
from storage.slices.writer import LAYOUTS_KEY
from tests.actors.tiny_runs import PREPROCESS, filled_bank
from tests.experiments.logged_runs import make_run

LEFT_OUT = {"protocol": "leave_one_vendor_out", "protocol_vendor": "D"}


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def split_by(run: str, **options: Any) -> None:
    """Have the run's index say that these options split it."""
    table = SliceStore.open(run).table
    about = {**table.schema.metadata, LAYOUTS_KEY: LayoutOptions(**options).model_dump_json()}
    pq.write_table(table.replace_schema_metadata(about), Path(run) / "slices.parquet")


def cardiomix(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    "command",
    [("pretrain",), ("extract",), ("train", "unet_ra"), ("export", "out")],
    ids=lambda command: str(command[0]),
)
def test_a_stage_that_would_train_on_other_splits_is_refused_and_changes_nothing(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    run, settings, _ = make_run(tmp_path)
    split_by(run)
    said = cardiomix(*command, "--run", run, "--set", "layouts.label_fraction=0.05")
    line = "run: its slices were split by layouts.label_fraction=1.0, not 0.05; run `cardiomix ingest` again"
    assert isinstance(said.exception, InputError) and str(said.exception).startswith(line)
    assert config.load(run) == settings


def test_scores_of_other_splits_than_the_configuration_s_are_not_made_but_reported_as_what_they_are(
    tmp_path: Path,
) -> None:
    run, settings, _ = make_run(tmp_path)
    split_by(run, **LEFT_OUT)
    said = cardiomix("evaluate", "--run", run)
    line = "layouts.protocol=leave_one_vendor_out, not paper and layouts.protocol_vendor=D, not None"
    assert isinstance(said.exception, InputError) and line in str(said.exception)
    assert cardiomix("report", "--run", run).exit_code == 0
    report = Path(run) / "report"
    for name in ("table.md", "index.html"):
        assert "leave_one_vendor_out D" in (report / name).read_text()
    assert config.load(str(report)).layouts == LayoutOptions(**LEFT_OUT)
    assert config.load(run) == settings


def test_slices_that_do_not_say_what_split_them_are_used_as_they_are(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    assert SliceStore.open(run).layouts is None
    fewer = config.override(settings, ["layouts.label_fraction=0.5"])
    jobs.require_split_by(run, fewer)
    assert jobs.split_options_of(run, fewer) == fewer.layouts
    table = SliceStore.open(run).table
    later = {**table.schema.metadata, LAYOUTS_KEY: b'{"a_later_option": 1}'}
    pq.write_table(table.replace_schema_metadata(later), Path(run) / "slices.parquet")
    assert SliceStore.open(run).layouts is None


def test_what_split_the_slices_is_no_part_of_their_fingerprint_but_of_what_mlflow_compares(tmp_path: Path) -> None:
    run, _, (first, _) = make_run(tmp_path)
    assert not any(name.startswith("layouts") for name in job_params("unet_ra", 0, first.job))
    split_by(run, **LEFT_OUT, label_fraction=0.05)
    assert SliceStore.open(run).fingerprint == first.job.data_fingerprint
    params = job_params("unet_ra", 0, first.job)
    assert {name: value for name, value in params.items() if name.startswith("layouts")} == {
        "layouts.protocol": "leave_one_vendor_out",
        "layouts.protocol_vendor": "D",
        "layouts.protocol_test_fraction": "0.3",
        "layouts.label_fraction": "0.05",
        "layouts.split_seed": "0",
    }


def test_a_dry_run_counts_slices_as_known_only_if_these_options_split_them(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    assert workload(run, settings).contents.known
    split_by(run, **LEFT_OUT)
    assert not workload(run, settings).contents.known
    assert workload(run, settings.model_copy(update={"layouts": LayoutOptions(**LEFT_OUT)})).contents.known


def test_masks_that_an_sdnet_saw_and_the_run_has_not_are_refused(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    store = SliceStore.open(run)
    train, labelled = store.column("split") == "train", store.column("labelled").astype(bool)
    with_masks = set(store.column("subject")[train & labelled].tolist())
    without = sorted(set(store.column("subject")[train].tolist()) - with_masks)
    assert without
    small, preprocess = UNetConfig(width=4), identity(PREPROCESS)
    for name, masks_of in (("same", with_masks), ("more", {*with_masks, without[0]})):
        save_model(str(tmp_path / name), UNet(4, small.classes), small, preprocess, [], masks_of=masks_of)
    jobs.check_pretrained(run, settings.model_copy(update={"pretrained": str(tmp_path / "same")}))
    with pytest.raises(InputError, match=rf"learned from masks of 1 subjects .* such as {without[0]}; its anatomy"):
        jobs.check_pretrained(run, settings.model_copy(update={"pretrained": str(tmp_path / "more")}))
    given = settings.model_copy(update={"pretrained": str(tmp_path / "more")})
    with pytest.raises(InputError, match=r"learned from masks of 1 subjects"):
        jobs.require_trainable(run, given.model_copy(update={"arms": ("ss_sdnet_ra_fa",)}))
    jobs.require_trainable(run, given.model_copy(update={"arms": ("unet_ra",)}))  # which does not use it


def test_a_bank_with_masks_that_the_run_has_not_is_refused(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    bank, _ = filled_bank(tmp_path / "lender")  # of the same subjects, with the same masks
    jobs.require_bank_without_other_masks(run, settings.model_copy(update={"bank": bank.uri}))
    table = SliceStore.open(run).table
    subjects, labelled = table["subject"].to_pylist(), table["labelled"].to_pylist()
    split = table["split"].to_pylist()
    hidden = next(who for who, has, of in zip(subjects, labelled, split, strict=True) if has and of == "train")
    fewer = pa.array([has and who != hidden for who, has in zip(subjects, labelled, strict=True)])
    column = table.column_names.index("labelled")
    table = table.set_column(column, table.schema.field(column), fewer)
    pq.write_table(table, Path(run) / "slices.parquet")
    with pytest.raises(InputError, match=rf"bank.zarr: learned from masks of 1 subjects .* such as {hidden}; its"):
        jobs.require_bank_without_other_masks(run, settings.model_copy(update={"bank": bank.uri}))


def test_a_pretrained_network_that_saw_a_vendor_which_is_left_out_is_refused(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    small = UNetConfig(width=4)
    for vendor in ("B", "Canon"):
        about: dict[str, Any] = {"data": {"train": {"A": {}}, "validation": {vendor: {}}}}
        save_model(str(tmp_path / vendor), UNet(4, small.classes), small, identity(PREPROCESS), [], (), about)
    split_by(run, **LEFT_OUT)
    jobs.check_pretrained(run, settings.model_copy(update={"pretrained": str(tmp_path / "B")}))
    line = "Canon: was trained on vendor Canon, which may not train under leave_one_vendor_out D; pretrain without"
    with pytest.raises(InputError, match=line):
        jobs.check_pretrained(run, settings.model_copy(update={"pretrained": str(tmp_path / "Canon")}))
