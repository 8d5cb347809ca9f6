"""What a trained network is for and how good it is: the part `about` of `model.json`, and a page made from it.

The page is a model card (Mitchell et al., "Model Cards for Model Reporting", FAT* 2019). It names no subject.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pipeline.networks.description import read_config, write_config
from pipeline.networks.files import count_parameters, load_model
from storage import fs
from storage.bank.spec import code_version
from storage.slices.store import SliceStore
from storage.subjects import STRUCTURES

CARD = "model_card.md"
SCORES = ("vendor", "structure", "n", "dice_mean", "dice_low", "dice_high", "hd95_median_mm", "missed")
INTENDED_USE = (
    "Research on short-axis cine MR: segments LV cavity, LV myocardium and RV cavity, slice by slice. Not a medical "
    "device; nothing that it draws may decide about a patient."
)
LIMITS = (
    "Trained and scored on ED and ES alone unless the data say otherwise; other frames of a cine are untested.",
    "Only the centre of an image is seen (`preprocess.field` of its pixels a side): what lies beyond is background.",
    "Images must lie as the training data did; an image is turned if its header says how it lies.",
    "Scanners, diseases and pixel areas that the training data lack may fail without a sign: look at the overlays.",
)


def describe_training(
    store: SliceStore,
    *,
    arm: str,
    semi_supervised: bool,
    training: Mapping[str, Any],
    validation: Mapping[str, float],
    start: Iterable[str] = (),
) -> dict[str, Any]:
    """The part `about` of `model.json` for a network that was trained on `store`.

    training: further facts, such as steps, augmentation and fingerprints. validation: the Dice (0 to 1) of the kept
    epoch, on the network's grid. start: the vendors of the network that training started from.
    """
    areas = store.column("pixel_area_mm2")[_of(store, "train", semi_supervised)]
    return {
        "version": f"cardiomix {code_version()}",
        "labels": {"background": 0, **_taught(store)},
        "training": {"arm": arm, "semi_supervised": semi_supervised, **training},
        "data": {
            "train": _vendors(store, _of(store, "train", semi_supervised)),
            "validation": _vendors(store, _of(store, "validation", False)),
            **({"start": list(start)} if start else {}),
            "pixel_area_mm2": [round(float(areas.min()), 4), round(float(areas.max()), 4)],
        },
        "metrics": {"validation": dict(validation), "test": []},
        "intended_use": INTENDED_USE,
        "limits": list(LIMITS),
    }


def _taught(store: SliceStore) -> dict[str, int]:
    """The labels that are drawn in some training mask. The network predicts no other label."""
    drawn = store.drawn[_of(store, "train", False)].any(axis=0)
    return {name: label for (name, label), there in zip(STRUCTURES.items(), drawn, strict=True) if there}


def _of(store: SliceStore, split: str, unlabelled: bool) -> Any:
    inside = store.column("split") == split
    return inside if unlabelled else inside & store.column("labelled").astype(bool)


def _vendors(store: SliceStore, chosen: Any) -> dict[str, dict[str, int]]:
    """Subjects, slices and labelled slices by vendor."""
    vendors, subjects = store.column("vendor"), store.column("subject")
    counts = {}
    for vendor in np.unique(vendors[chosen]):
        own = chosen & (vendors == vendor)
        labelled = int(store.column("labelled")[own].sum())
        counts[str(vendor)] = {
            "subjects": len(np.unique(subjects[own])),
            "slices": int(own.sum()),
            "labelled_slices": labelled,
        }
    return counts


def add_test_scores(
    folder: str,
    summary: Iterable[Mapping[str, Any]],
    trust: Mapping[str, float] | None = None,
    temperature: float | None = None,
) -> None:
    """Put test scores and calibration into a network's `model.json`, and write its card again.

    summary: rows of `pipeline.scores.tables.summarise`. trust: the result of `trust.calibrated`; if it is None, trust
    and temperature stay as they are. temperature: the result of `calibration.best_temperature`. Infinity (a structure
    missed in half of the volumes) and NaN become null.
    """
    document = read_config(folder)
    facts = document.setdefault("about", {})
    facts.setdefault("metrics", {})["test"] = [{name: _plain(row[name]) for name in SCORES} for row in summary]
    if trust is not None:
        facts |= {"trust": dict(trust), "temperature": temperature}
    write_config(folder, document)
    write_card(folder)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def write_card(folder: str) -> None:
    """Write `model_card.md` beside a network, from its `model.json`. Raises InputError as `load_model` does."""
    model, document = load_model(folder)
    fs.write_text(fs.join(folder, CARD), card(document, count_parameters(model)))


def card(document: Mapping[str, Any], parameters: int) -> str:
    """The card as Markdown, from `model.json` and the number of parameters."""
    facts = document.get("about") or {}
    training, preprocess = facts.get("training", {}), document["preprocess"]
    kind = {"sdnet": "SDNet", "unet": "U-Net"}[document["kind"]]
    size = preprocess.get("size")
    coding = sorted(facts.get("labels", STRUCTURES).items(), key=lambda item: item[1])
    labels = ", ".join(f"{name} {label}" for name, label in coding)
    parts = [
        f"# {kind}, {training.get('arm', 'arm unknown')}",
        facts.get("intended_use", INTENDED_USE),
        _table(
            ("", ""),
            [
                ("network", f"{kind}, {parameters:,} parameters: {_facts_in_words(document['network'])}"),
                ("input", f"slices {size} × {size} in [-1, 1]: {_facts_in_words(preprocess)}"),
                ("output", f"labels: {labels}"),
                ("training", _facts_in_words(training)),
                ("fingerprint", document["fingerprint"]),
                ("made by", facts.get("version", "unknown")),
            ],
        ),
        "## Data",
        _data(facts.get("data", {})),
        "Terms: " + ("; ".join(document["terms"]) or "none recorded") + ".",
        "## How good",
        _scores(facts.get("metrics", {})),
        "## Limits",
        "\n".join(f"- {limit}" for limit in facts.get("limits", LIMITS)),
        "```bash\ncardiomix predict MODEL_FOLDER study.nii.gz --out masks\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(data: Mapping[str, Any]) -> str:
    rows = [
        (split, vendor, *(str(counts[name]) for name in ("subjects", "slices", "labelled_slices")))
        for split in ("train", "validation")
        for vendor, counts in data.get(split, {}).items()
    ]
    if not rows:
        return "Not recorded."
    low, high = data["pixel_area_mm2"]
    table = _table(("split", "vendor", "subjects", "slices", "of them labelled"), rows)
    return f"{table}\n\nPixel areas in training: {low:g} to {high:g} mm², before any rescaling."


def _scores(metrics: Mapping[str, Any]) -> str:
    """Validation scores as a sentence, test scores as a table."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in metrics.get("validation", {}).items())
    lines = [f"Held-out subjects, on the network's grid, at the epoch that was kept: {found}."] if found else []
    rows = [
        (
            row["vendor"],
            row["structure"],
            str(row["n"]),
            f"{_shown(row['dice_mean'])} ({_shown(row['dice_low'])} to {_shown(row['dice_high'])})",
            _shown(row["hd95_median_mm"], 1),
            str(row["missed"]),
        )
        for row in metrics.get("test", [])
    ]
    if rows:
        lines.append("Test subjects, per volume on their own grid; 95 % bootstrap over subjects; nothing cleaned up:")
        head = ("vendor", "structure", "subjects", "Dice", "HD95 (median, mm)", "missed or invented")
        lines.append(_table(head, rows))
    else:
        lines.append("Not yet scored on test subjects.")
    return "\n\n".join(lines)


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [[_cell(text) for text in line] for line in (head, ("---",) * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _facts_in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
