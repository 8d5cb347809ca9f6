"""The answer of a logged MLflow model: one row per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.tracking.model import VOLUMES

if TYPE_CHECKING:
    from pipeline.inference.study import Outcome


def rows(folder: str, images: Sequence[str], params: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per image, in order, with the columns of `model.signature`; `params` are those of the signature.

    Each image is a study of its own. Volumes that are not known are NaN. Raises InputError if an image is absent, two
    images would give the same file, or the network cannot be used.
    """
    from pipeline.inference.config import InferenceConfig
    from pipeline.inference.find_studies import check_targets, find_studies
    from pipeline.inference.predictor import load_predictor
    from pipeline.inference.study import attempt
    from pipeline.networks.description import read_config

    area = float(params.get("pixel_area") or 0.0)
    config = InferenceConfig(
        pixel_area=area or None, flips=params.get("flips", False), keep_largest=params.get("keep_largest", True)
    )
    out = str(params.get("out") or "predictions")
    studies = [found for image in images for found in find_studies([image], out)[0]]
    check_targets(studies)
    predictor, name = load_predictor([folder], config), str(read_config(folder)["fingerprint"])
    return [_row_of_outcome(attempt(predictor, study, [name])) for study in studies]


def _row_of_outcome(outcome: Outcome) -> dict[str, Any]:
    study, report = outcome.study, outcome.report
    row: dict[str, Any] = {"image": study.images[0], "mask": "", "report": "", "error": outcome.failure}
    values: dict[str, Any] = {}
    if report is not None:
        row |= {"mask": study.mask(study.images[0]), "report": study.report}
        for side in ("lv", "rv"):
            values |= {f"{side}_{name}": value for name, value in (report[side] or {}).items()}
        values["lv_mass_g"] = report["lv_mass_g"]
    return row | {name: math.nan if values.get(name) is None else float(values[name]) for name in VOLUMES}
