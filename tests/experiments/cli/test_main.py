"""The command line: what every verb answers, the first screen, and what is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from experiments.cli.main import app, main
from storage.bank.spec import code_version

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
    "transfer",
    "status",
    "preview",
    "export",
    "compare",
    "predict",
    "export-model",
)
FIRST = ("phantom", "ablate", "status", "report", "predict")
HEAVY = ("torch", "ray", "mlflow", "monai", "matplotlib", "pandas", "numpy", "pydantic")


class Answer(NamedTuple):
    status: int
    out: str
    err: str


def cardiomix(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """What the console script answers, without an interpreter of its own."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["cardiomix", *arguments])
        main()
    assert isinstance(end.value.code, int)
    return Answer(end.value.code, *capsys.readouterr())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_verb_has_help_with_an_example(verb: str, option: str) -> None:
    done = CliRunner().invoke(app, [verb, option])
    assert done.exit_code == 0
    assert f"Example:  cardiomix {verb}" in done.stdout


def test_short_and_long_help_are_the_same() -> None:
    for words in ([], ["bank"], ["bank", "info"]):
        short, long = (CliRunner().invoke(app, [*words, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0 and short.stdout == long.stdout and "Usage: cardiomix" in long.stdout


def test_without_a_verb_it_shows_the_commands_to_start_with() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0
    shown = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  cardiomix ")]
    assert tuple(shown) == FIRST
    assert "All commands: cardiomix --help" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cardiomix(capsys, "--version") == (0, f"cardiomix {code_version()}\n", "")


def test_a_shell_completes_verbs_and_options() -> None:
    for words, expected in (("cardiomix pre", "pretrain"), ("cardiomix ablate --dry", "--dry-run")):
        count = str(len(words.split()) - 1)
        environment = {"_CARDIOMIX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
        done = CliRunner().invoke(app, [], env=environment)
        assert expected in done.stdout.split()


@pytest.mark.parametrize(
    ("modules", "light"),
    [
        ("experiments.cli.main", ()),
        ("experiments.config, experiments.run.driver, experiments.run.status", ("numpy", "pydantic")),
    ],
)
def test_help_settings_and_plans_import_nothing_heavy(modules: str, light: tuple[str, ...]) -> None:
    heavy = [name for name in HEAVY if name not in light]
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ablate", "fast", "--run", "r"), "there is no such preset"),
        (("ablate", "cpu", "--run", "r"), "needs data"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--set", "train.epoch=1"), "no field train.epoch"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--arms", "unet"), "--arms unet: unknown arms: unet; choose"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--arms", ","), "--arms ,: names no arm; choose from unet_ra"),
        (("ablate", "cpu", "--run", "r", "--data", "x", "--set", "arms=[unet]"), "--set arms=[unet]: arms: unknown"),
        (
            ("transfer", "cpu", "--data", "x", "--vendors", "A", "--out", "o", "--arms", "unet_ra,unet"),
            "--arms unet_ra,unet: unknown arms: unet; choose from",
        ),
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
def test_bad_input_is_one_line_and_exit_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cardiomix(capsys, *arguments)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "absent").exists()


def test_bad_usage_has_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cardiomix(capsys, "ablate").status == 2
    assert cardiomix(capsys, "no-such-verb").status == 2
    for verb in (("ablate", "demo"), ("train", "unet_ra")):
        done = cardiomix(capsys, *verb, "--run", "absent", "--seeds", "0")
        assert done.status == 2 and "--seeds" in done.err and "Traceback" not in done.err


def test_the_module_is_the_console_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "status", "--run", "absent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
