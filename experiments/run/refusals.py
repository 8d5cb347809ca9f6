"""Refuse, before work begins, what no run could use. The errors name the flag and the full path."""

from __future__ import annotations

from collections.abc import Callable

from actors.ray_start import require_places
from experiments.config import Settings
from experiments.run import jobs
from pipeline.networks.description import WEIGHTS, read_config, sdnet_fingerprint
from storage import fs
from storage.bank.bank import FactorBank
from storage.errors import InputError
from storage.identity import identity
from storage.layouts import LAYOUTS
from storage.lock import require_free
from storage.places import require_writable


def require_usable(run: str, settings: Settings) -> None:
    """Raises InputError if layout, data, bank or network are absent or do not fit the settings, if the plan does not
    fit an arm, or if the phantom is the data and cannot be drawn. Reads no study and none of the run's slices, and
    starts nothing."""
    if settings.layout not in ("auto", *LAYOUTS):
        problem = "there is no such layout"
        raise InputError(f"--layout {settings.layout}", problem, f"choose from auto, {', '.join(LAYOUTS)}")
    jobs.require_plan_fits_arms(settings)
    require_local_phantom(run, settings)
    for folder in settings.data:
        if not fs.exists(folder):
            raise InputError(f"--data {fs.redacted(folder)}", "no such folder", "check the path")
    if settings.bank is not None:
        _require_bank(settings.bank, settings)
    if settings.pretrained is not None:
        _require_sdnet(settings.pretrained, settings)


def require_place(run: str, say: Callable[[str], None]) -> None:
    """Raises InputError if Ray or the run has no place that can be written, or if another driver holds the run.

    Leaves nothing behind. `say` shows a line to the user where this waits for the lease of a driver that may be dead.
    """
    require_places()
    require_writable(run, f"--run {fs.redacted(run)}")
    require_free(run, say)


def require_local_phantom(run: str, settings: Settings) -> None:
    """Raises InputError if the data are the phantom and the run is in an object store."""
    if settings.preset == "demo" and not settings.data and not fs.is_local(run):
        place = fs.redacted(run)
        raise InputError(
            f"--run {place}",
            "the demo draws its phantom into the run, for which the run must be a local folder",
            f"draw it first: `cardiomix phantom DIR`, then `cardiomix ablate demo --data DIR --run {place}`",
        )


def _require_bank(bank: str, settings: Settings) -> None:
    flag = f"--bank {fs.redacted(bank)}"
    try:
        spec = FactorBank.open(bank).spec
    except InputError as error:
        part = error.where.removeprefix(fs.base_name(bank)).lstrip(", ")
        raise InputError(flag, f"{part}: {error.problem}" if part else error.problem, error.remedy) from error
    if spec.preprocess != identity(settings.preprocess):
        remedy = f"use --set preprocess… as in the bank: {spec.preprocess}"
        raise InputError(flag, "was made with another preprocessing", remedy)


def _require_sdnet(folder: str, settings: Settings) -> None:
    flag = f"--sdnet {fs.redacted(folder)}"
    try:
        document = read_config(folder)
    except InputError as error:
        raise InputError(flag, error.problem, error.remedy) from error
    if document["kind"] != "sdnet":
        raise InputError(flag, f"is a {document['kind']}, not an SDNet", "give the folder of a pretrained SDNet")
    if settings.bank is not None:
        made_by = FactorBank.open(settings.bank).spec.sdnet_fingerprint.partition("-")[0]
        if sdnet_fingerprint(folder) != made_by:
            problem = f"is not the SDNet that filled --bank {fs.redacted(settings.bank)}"
            raise InputError(flag, problem, f"give the one with fingerprint {made_by}")
    if not fs.exists(fs.join(folder, WEIGHTS)):
        raise InputError(flag, f"has no {WEIGHTS}", "restore it, or pretrain again")
    if document["preprocess"] != identity(settings.preprocess):
        remedy = f"use --set preprocess… as it was: {document['preprocess']}"
        raise InputError(flag, "was trained with another preprocessing", remedy)
    if jobs.starts_from_sdnet(settings) and document["network"] != identity(settings.sdnet):
        problem = "is another SDNet than the arms that are to start from it"
        raise InputError(flag, problem, f"use --set sdnet… as it was trained: {document['network']}")
