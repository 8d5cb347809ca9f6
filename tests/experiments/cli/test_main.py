from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VERBS = (
    "inspect",
    "phantom",
    "ingest",
    "pretrain",
    "extract",
    "train",
    "evaluate",
    "report",
    "ablate",
    "status",
    "preview",
    "export",
    "predict",
    "export-model",
)
HEAVY = ("torch", "ray", "mlflow", "monai", "matplotlib", "pandas")


def cardiomix(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = cardiomix(verb, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout


@pytest.mark.parametrize(
    "modules", ["experiments.cli.main", "experiments.config, experiments.run.driver, experiments.run.status"]
)
def test_help_settings_and_plans_import_nothing_heavy(modules: str) -> None:
    code = f"import sys, {modules}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ablate", "fast", "--run", "r"), "there is no such preset"),
        (("ablate", "cpu", "--run", "r"), "needs data"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--set", "train.epoch=1"), "no field train.epoch"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--arms", "unet"), "unknown arms"),
        (("ablate", "absent.yaml", "--run", "r"), "no such run configuration"),
        (("train", "fs_sdnet", "--run", "absent"), "has no slices"),
        (("pretrain", "--run", "absent"), "has no slices"),
        (("status", "--run", "absent"), "no such run"),
        (("predict", "absent", "x.nii.gz", "--out", "o"), "no trained network here"),
        (("bank", "info", "absent"), "absent"),
        (("preview", "--run", "absent"), "no such run"),
        (("preview", "--run", "absent", "--show", "x"), "there is no such picture"),
        (("export", "out", "--run", "absent"), "has no slices"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cardiomix(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "absent").exists()


def test_bad_usage_has_exit_status_2() -> None:
    assert cardiomix("ablate").returncode == 2
    assert cardiomix("no-such-verb").returncode == 2
