"""A run made by version 0.1.0 (commit 832a501): this version finds every stage done, reports it and predicts with it.

`tests/data/run_0_1_0.tar.xz` holds a small run of the demo preset on the phantom, without pixels, MLflow's database and
checkpoints: two arms, one epoch each. `expected/` are tables of that version's report.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from experiments import config
from experiments.run import jobs
from experiments.run.status import status
from pipeline.networks.sdnet import SDNet
from storage.bank.bank import FactorBank
from storage.bank.verify import verify
from storage.errors import InputError
from tests.tiny_networks import write_cine

MADE = Path(__file__).parents[2] / "data" / "run_0_1_0.tar.xz"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("earlier") / "run"
    with tarfile.open(MADE) as archive:
        archive.extractall(place, filter="data")
    return place


def test_every_stage_is_finished(run: Path) -> None:
    settings = config.load(str(run))
    assert jobs.pretrain_job(str(run), settings).finished()
    assert not jobs.stale_bank(str(run), settings) and jobs.bank_is_complete(str(run), settings)
    arms = jobs.arm_runs(str(run), settings)
    assert [arm.arm for arm in arms] == ["unet_ra", "ss_sdnet_ra_fa"]
    assert all(arm.job.finished() and arm.evaluated() for arm in arms)
    stages = dict(status(str(run)))
    assert stages.pop("report") == "missing"
    assert all(state.startswith("done") for state in stages.values()), stages


def test_arms_that_the_run_holds_stay_in_its_report_when_others_are_trained(run: Path) -> None:
    """`--arms` and `train ARM` change the settings' arms, not what was trained."""
    settings = config.load(str(run))
    one = settings.model_copy(update={"arms": ("ss_sdnet_ra_fa",)})
    assert jobs.with_finished(str(run), one).arms == ("ss_sdnet_ra_fa", "unet_ra")
    other = config.override(one, ["train.epochs=2"])
    assert jobs.with_finished(str(run), other).arms == ("ss_sdnet_ra_fa",)


def test_what_a_changed_setting_makes_anew_is_known_before_it_is_made(run: Path) -> None:
    settings = config.load(str(run))
    longer = config.override(settings, ["train.epochs=2"])
    assert not any(arm.job.replaces_a_result() for arm in jobs.arm_runs(str(run), settings))
    assert all(arm.job.replaces_a_result() for arm in jobs.arm_runs(str(run), longer))
    assert not jobs.pretrain_job(str(run), longer).replaces_a_result()


def test_train_workers_that_cannot_share_the_pretraining_s_steps_are_refused(run: Path) -> None:
    settings = config.override(config.load(str(run)), ["resources.train_workers=2", "train.batch_size=4"])
    jobs.require_trainable(str(run), config.override(settings, ["pretrain.batch_size=4"]))
    with pytest.raises(InputError, match=r"2 workers cannot share 3 labelled .*pretrain\.batch_size"):
        jobs.require_trainable(str(run), config.override(settings, ["pretrain.batch_size=3"]))


def test_its_bank_is_whole_and_draws(run: Path) -> None:
    from pipeline.networks.files import load_decoder, load_sdnet

    bank = FactorBank.open(str(run / "bank.zarr"))
    assert verify(bank) == []
    weights, decoder_config = bank.decoder()
    assert load_decoder(weights, decoder_config) is not None
    assert isinstance(load_sdnet(str(run / "sdnet")), SDNet)


def test_report_gives_the_same_tables(run: Path) -> None:
    done = cardiomix("report", "--run", str(run))
    assert done.returncode == 0, done.stderr
    for name in ("table.csv", "cases.csv"):
        assert (run / "report" / name).read_bytes() == (run / "expected" / name).read_bytes(), name


def test_its_network_predicts(run: Path, tmp_path: Path) -> None:
    study = write_cine(tmp_path / "in" / "cine.nii.gz", 0)
    done = cardiomix("predict", str(run / "arms" / "unet_ra"), str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, (done.stderr, study)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def cardiomix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)
