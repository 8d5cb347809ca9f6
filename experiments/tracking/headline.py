"""What MLflow shows at a glance: mean Dice by vendor and overall, the worst vendor, the best arm; and a view of them.

MLflow's list of runs shows no metric until the user chooses one, and it keeps the choice in the browser. But it reads
saved views from the store, as tags of the experiment. Our view opens the list with Dice in its first columns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.scores.tables import subject_dice
from storage.subjects import STRUCTURES

MEAN, WORST = "dice/mean", "dice/worst"
VIEW, VIEW_TAG = "dice", "mlflow.sharedViewState.dice"
_WIDTH_OF_A_LETTER, _MARGIN, _METRIC_WIDTH = 8, 60, 110  # pixels of MLflow 3.17's list


def mean_dice(cases: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{vendor: mean Dice} of one arm's rows of `cases.csv`; the key `""` has the mean over the subjects of all vendors.

    A vendor's Dice is the mean over its subjects; a subject's Dice is the mean over its structures. Structures without
    a score are left out. Empty if nothing is scored.
    """
    own: dict[tuple[str, str], list[float]] = {}
    scored = [case for case in cases if case["dice"] == case["dice"]]
    for vendor in sorted({case["vendor"] for case in scored}):
        for structure in STRUCTURES:
            rows = [case for case in scored if (case["vendor"], case["structure"]) == (vendor, structure)]
            for subject, dice in subject_dice(rows).items():
                own.setdefault((vendor, subject), []).append(dice)
    by_vendor: dict[str, list[float]] = {}
    for (vendor, _), values in own.items():
        by_vendor.setdefault(vendor, []).append(statistics.fmean(values))
    means = {vendor: statistics.fmean(values) for vendor, values in by_vendor.items()}
    everyone = [value for values in by_vendor.values() for value in values]
    return {"": statistics.fmean(everyone), **means} if everyone else {}


def standing(children: Sequence[tuple[str, Mapping[str, float]]]) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics, tags) of the parent run, from the (arm, metrics) of its children. Empty if no child is scored.

    `dice_by_arm/<arm>/mean`, `…/worst` and `…/<vendor>/mean` are means over the arm's seeds. `dice/…` are those of the
    arm with the highest mean. The tag `best_arm` names this arm, the tag `worst_vendor` its worst vendor.
    """
    by_arm: dict[str, list[Mapping[str, float]]] = {}
    for arm, metrics in children:
        if MEAN in metrics:
            by_arm.setdefault(arm, []).append(metrics)
    means = {arm: _over_seeds(seeds) for arm, seeds in by_arm.items()}
    if not means:
        return {}, {}
    best = max(means, key=lambda arm: means[arm][MEAN])
    worst = min(vendor_means(means[best]).items(), key=lambda item: item[1])[0]
    metrics = {**means[best]}
    for arm, own in sorted(means.items()):
        metrics |= {f"dice_by_arm/{arm}/{key.removeprefix('dice/')}": value for key, value in own.items()}
    return metrics, {"best_arm": best, "worst_vendor": worst}


def _over_seeds(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = [MEAN, *(key for key in seeds[-1] if _vendor(key))]
    means = {key: statistics.fmean(seed[key] for seed in seeds if key in seed) for key in keys}
    return {MEAN: means[MEAN], WORST: min(vendor_means(means).values()), **means}


def vendor_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """{vendor: mean Dice} from a run's metrics."""
    return {vendor: value for key, value in metrics.items() if (vendor := _vendor(key))}


def _vendor(key: str) -> str:
    kind, _, rest = key.partition("/")
    vendor, _, what = rest.rpartition("/")
    return vendor if kind == "dice" and what == "mean" else ""


def view(names: Iterable[str], vendors: Iterable[str], made_ms: int) -> str:
    """The value of the experiment tag `VIEW_TAG`: a view named Dice. It lists the arms by falling mean Dice, with full
    run names and the columns mean, worst and each vendor.

    `names` are the names of the runs; `made_ms` is in milliseconds since 1970.
    """
    columns = [f"metrics.`{key}`" for key in (MEAN, WORST, *(f"dice/{vendor}/mean" for vendor in sorted(vendors)))]
    run_name = "attributes.`Run Name`"
    state = {
        "searchFilter": 'tags.arm != "pretrain"',  # leaves out the parent too, which has no such tag
        "orderByKey": columns[0],
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": [run_name, *columns],
        "columnWidths": {
            run_name: _MARGIN + _WIDTH_OF_A_LETTER * max(map(len, names), default=0),
            **dict.fromkeys(columns, _METRIC_WIDTH),
        },
        "runsHiddenMode": "SHOW_ALL",
    }
    return json.dumps({"name": "Dice", "createdAt": made_ms, "state": json.dumps(state)})
