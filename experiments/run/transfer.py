"""Vendor to vendor: train the same arms on one vendor's subjects and test them on the others', in every direction.

Each direction is an ablation in a folder of its own, so that it continues where it stopped. `layouts.test_half` says
which half of the test subjects is scored: arms, strengths and schedules are chosen on one half, with one seed, and the
choice is confirmed on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actors.evaluate_arm import CASES
from experiments import config
from experiments.run import jobs
from pipeline.networks.description import CONFIG as MODEL
from pipeline.scores.compare_arms import trainings
from pipeline.scores.statistics import crossed_interval
from storage import fs
from storage.csv_table import csv_text
from storage.errors import InputError

if TYPE_CHECKING:
    from experiments.config import Settings

FIELDS = ("arm", "direction", "seeds", "subjects", "dice", "baseline", "difference", "low", "high")
TABLE, MARKDOWN = "transfer.csv", "transfer.md"
BOTH = "mean of all"

Scores = dict[str, npt.NDArray[np.float64]]  # {arm: mean Dice of the structures (seeds, subjects), 0 to 1}


def direction_run(out: str, vendor: str) -> str:
    """The run folder of the direction that trains on `vendor`."""
    return fs.join(out, f"from-{vendor.replace('/', '_')}")


def direction_settings(settings: Settings, vendor: str, sdnets: str | None) -> Settings:
    """The settings of the direction that trains on `vendor`.

    `sdnets` is the folder of an earlier transfer. If it has an SDNet for this direction, that SDNet is reused.
    """
    document = settings.model_dump()
    document["layouts"] |= {"protocol": "source_only", "protocol_vendor": vendor}
    sdnet = jobs.sdnet_uri(direction_run(sdnets, vendor), settings) if sdnets is not None else None
    if sdnet is not None and fs.exists(fs.join(sdnet, MODEL)):
        document["pretrained"] = sdnet
    return config.validated(document, f"from {vendor}")


def direction_scores(run: str, settings: Settings, vendor: str) -> Scores:
    """The Dice of every test subject of the *other* vendors, for the arms whose seeds are all scored.

    A subject's value is the mean over its phases and over LV, MYO and RV. A structure without a Dice in any seed,
    because neither the mask nor a prediction has it, is left out. If it has one in some seeds, see
    `compare_arms.filled`.
    """
    from pipeline.scores.tables import read_cases

    found: Scores = {}
    runs = jobs.arm_runs(run, jobs.trainable_settings(run, settings))
    for arm in settings.arms:
        own = [r for r in runs if r.arm == arm]
        if not own or not all(r.evaluated() for r in own):
            continue
        by_seed = []
        for r in own:
            cases = [c for c in read_cases(fs.join(r.job.out, CASES)) if c["vendor"] != vendor]
            by_seed.append({(c["subject"], c["phase"], c["structure"]): float(c["dice"]) for c in cases})
        found[arm] = subject_means(by_seed)
    return found


def subject_means(by_seed: Sequence[Mapping[tuple[str, str, str], float]]) -> npt.NDArray[np.float64]:
    """The mean Dice (seeds, subjects) of each subject, in the order of their names.

    `by_seed` has, for each seed, {(subject, phase, structure): Dice or NaN}.
    """
    from pipeline.scores.compare_arms import filled

    keys = sorted(set().union(*by_seed))
    dice = filled(np.array([[scored.get(key, np.nan) for key in keys] for scored in by_seed]))
    there = ~np.isnan(dice[0])  # the same for every seed, now that missing ones are filled
    subjects = np.array([key[0] for key in keys])
    means = [dice[:, there & (subjects == name)].mean(axis=1) for name in np.unique(subjects[there])]
    return np.array(means).reshape(len(means), len(by_seed)).T


def rows(scores: dict[str, Scores], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """A row with the columns of `FIELDS` for each arm, direction and baseline, then for the mean of all directions.

    `dice` is the mean over seeds and subjects. `difference` is the arm's Dice minus the baseline's, paired by seed and
    subject; `low` and `high` are its interval (`statistics.crossed_interval`). If the arm is the baseline itself, or no
    baseline is scored (then `baseline` is empty), the three are NaN.
    """
    table = []
    arms = list(dict.fromkeys(arm for of in scores.values() for arm in of))
    for arm in arms:
        there = {direction: of[arm] for direction, of in scores.items() if arm in of}
        groups = {direction: [direction] for direction in there}
        if len(there) == len(scores) > 1:
            groups[BOTH] = list(there)
        for label, directions in groups.items():
            dice = float(np.mean([there[d].mean() for d in directions]))
            about = {"arm": arm, "direction": label, "seeds": min(len(there[d]) for d in directions)}
            about |= {"subjects": sum(there[d].shape[1] for d in directions), "dice": dice}
            for baseline in [b for b in baselines if all(b in scores[d] for d in directions)] or [""]:
                values = (np.nan, np.nan, np.nan)
                if baseline not in ("", arm):
                    pairs = [(there[d], scores[d][baseline]) for d in directions]
                    found = crossed_interval([a[: len(b)] - b[: len(a)] for a, b in pairs])
                    values = (float(found.mean), float(found.low), float(found.high))
                table.append(about | {"baseline": baseline} | dict(zip(FIELDS[-3:], values, strict=True)))
    return table


def markdown(table: Sequence[dict[str, Any]], note: str) -> str:
    """The rows as a Markdown table: one line per arm, with Dice and differences by direction; then the note."""
    directions = list(dict.fromkeys(row["direction"] for row in table))
    baselines = [name for name in dict.fromkeys(row["baseline"] for row in table) if name]
    cells = {(row["arm"], row["direction"], row["baseline"]): row for row in table}
    heads = [part for d in directions for part in (d, *(f"less {b}" for b in baselines))]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for arm in dict.fromkeys(row["arm"] for row in table):
        shown = []
        for direction in directions:
            own = [cells.get((arm, direction, baseline)) for baseline in ("", *baselines)]
            first = next((row for row in own if row), None)
            shown.append(f"{first['dice']:.3f}" if first else "–")
            shown += [_difference(row) for row in own[1:]]
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", note]) + "\n"


def _difference(row: dict[str, Any] | None) -> str:
    if row is None or np.isnan(row["difference"]):
        return "–"
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['difference']:+.3f}{interval}"


def write_table(out: str, settings: Settings, vendors: Sequence[str], baselines: Sequence[str]) -> str:
    """Write `transfer.csv` and `transfer.md` to `out`, with what is scored so far. Returns the Markdown.

    Raises InputError if no arm is scored in any direction.
    """
    scores = {}
    for vendor in vendors:
        run = direction_run(out, vendor)
        if fs.exists(fs.join(run, config.CONFIG_FILE)):
            own = config.load(run).model_copy(update={"arms": settings.arms, "seeds": settings.seeds})
            if own.layouts.test_half == settings.layouts.test_half:
                scores[f"{vendor} → others"] = direction_scores(run, own, vendor)
    table = rows(scores, baselines)
    if not table:
        raise InputError(fs.base_name(out), "has no scored arm", "see `cardiomix status`")
    seeds = settings.seeds
    over = "seeds and subjects" if seeds > 1 else "subjects alone"
    what = f"{trainings(seeds) or f'{seeds} seeds an arm'}, intervals are over {over}"
    sizes = ", ".join(f"{d}: {next(iter(of.values())).shape[1]}" for d, of in scores.items() if of)
    note = f"Mean volume Dice of LV, MYO and RV on vendors not trained on; {what}. Subjects: {sizes}."
    note += f" Test half: {settings.layouts.test_half}."
    text = markdown(table, note)
    fs.write_text(fs.join(out, TABLE), csv_text(FIELDS, table))
    fs.write_text(fs.join(out, MARKDOWN), text)
    return text
