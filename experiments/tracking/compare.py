"""Compare runs by what MLflow holds of them: Dice by arm, vendor and structure, and settings that differ."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.tracking.own_database import prepare
from experiments.tracking.store import (
    FINGERPRINTS,
    PARENT_TAG,
    RUN_TAG,
    is_own,
    is_server,
    newest_trainings,
    open_store,
    redacted,
    run_key,
    search,
    sqlite_file,
    tracking_uri_of,
)
from pipeline.scores.compare_arms import FEWEST_SEEDS, trainings
from storage import fs
from storage.errors import InputError
from storage.subjects import STRUCTURES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from rich.table import Table

Key = tuple[str, str, str]  # arm, vendor, structure

FIELDS = ("run", "arm", "vendor", "structure", "seeds", "dice_mean", "dice_sd", "difference", "best")
_TAGS = (*FINGERPRINTS, "git_commit")
_NOT_COMPARED = ("arm", "seed")


@dataclass(frozen=True)
class Compared:
    """A run as MLflow holds it.

    dice: {(arm, vendor, structure): mean Dice of each seed, 0 to 1}. made: {arm: parameters and fingerprints of its
    networks}.
    """

    name: str
    dice: Mapping[Key, tuple[float, ...]]
    made: Mapping[str, Mapping[str, str]]


class NotLoggedError(InputError):
    """MLflow does not know a run folder, or knows no scores of it."""


def find(
    runs: Sequence[str], tracking_uri: str | None = None, log: Callable[[str], None] | None = None
) -> list[Compared]:
    """The runs as MLflow holds them. Each of `runs` is a run folder, the name of an experiment, or a parent run's id.

    `tracking_uri` and `MLFLOW_TRACKING_URI` work as in `store.tracking_uri_of`; an experiment or an id needs one of
    them. If MLflow does not know a run folder, `log` is called to log it there, and the folder is looked up again.
    Raises InputError if MLflow does not know a run, or has no scores of it.
    """
    found, names = [], list(map(fs.base_name, runs))
    for number, run in enumerate(runs):
        twins = names[:number].count(names[number])
        name = names[number] + (f" ({twins + 1})" if twins else "")
        try:
            found.append(_compared(run, tracking_uri, name))
        except NotLoggedError:
            if log is None:
                raise
            log(fs.absolute(run))
            found.append(_compared(run, tracking_uri, name))
    return found


def _compared(run: str, tracking_uri: str | None, name: str) -> Compared:
    folder, place = fs.is_folder(run), tracking_uri_of(fs.absolute(run), tracking_uri)
    if folder and is_own(fs.absolute(run), place):
        prepare(fs.absolute(run))
    file = sqlite_file(place)
    if file is not None and not file.is_file():  # opening it would create it
        if folder:
            raise NotLoggedError(name, "MLflow knows nothing of it", "train it first, or pass --tracking-uri")
        problem = "is no run folder, and no tracking server is named"
        raise InputError(name, problem, "train it first, or pass --tracking-uri")
    client = open_store(fs.absolute(run), place)
    parent = _parent_of_folder(client, fs.absolute(run), place, name) if folder else _parent(client, run, place)
    children = search(client, parent.info.experiment_id, {PARENT_TAG: parent.info.run_id})
    newest = newest_trainings(c for c in children if any(key.startswith("dice/") for key in c.data.metrics))
    if not newest:
        kind = NotLoggedError if folder else InputError
        raise kind(name, "has no scored arm in MLflow", "run `cardiomix report --run RUN`, or train it first")
    return _collected(name, newest)


def _parent_of_folder(client: MlflowClient, run: str, place: str, name: str) -> Run:
    experiment = client.get_experiment_by_name(fs.base_name(run))
    found = search(client, experiment.experiment_id, {RUN_TAG: run_key(run, place)}) if experiment else []
    if not found:
        where = "its own database" if is_own(run, place) else f"MLflow at {redacted(place)}"
        raise NotLoggedError(
            name, f"{where} does not know it", "run `cardiomix report --run RUN`, or name its experiment"
        )
    return found[0]


def _parent(client: MlflowClient, run: str, place: str) -> Run:
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run)
        except MlflowException as error:
            raise InputError(
                run, f"MLflow at {redacted(place)} does not know it", "look up the parent run's id"
            ) from error
    experiment = client.get_experiment_by_name(run)
    if experiment is None:
        where = redacted(place) if is_server(place) else "this database"
        raise InputError(run, f"is no run folder, and no experiment of {where}", "check the name")
    parents = [each for each in search(client, experiment.experiment_id, {}) if RUN_TAG in each.data.tags]
    if len(parents) != 1:
        ids = ", ".join(each.info.run_id for each in parents)
        remedy = f"give the folder, or one of the ids {ids}" if ids else "give another name"
        raise InputError(run, f"the experiment holds {len(parents)} runs of cardiomix", remedy)
    return parents[0]


def _collected(name: str, children: Mapping[tuple[str, str], Run]) -> Compared:
    dice: dict[Key, tuple[float, ...]] = {}
    made: dict[str, dict[str, str]] = {}
    for (arm, _), child in sorted(children.items()):
        for metric, value in child.data.metrics.items():
            kind, _, rest = metric.partition("/")
            vendor, _, structure = rest.rpartition("/")
            if kind == "dice" and vendor and structure in STRUCTURES:
                dice[arm, vendor, structure] = (*dice.get((arm, vendor, structure), ()), float(value))
        facts = {key: value for key, value in child.data.params.items() if key not in _NOT_COMPARED}
        facts |= {key: child.data.tags[key][:16] for key in _TAGS if key in child.data.tags}
        made.setdefault(arm, facts)  # those of the first seed; other seeds differ in nothing else
    return Compared(name, dice, made)


def rows(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """One row, with the columns of `FIELDS`, for each arm, vendor and structure and each run that has them.

    `dice_mean` and `dice_sd` are over seeds; the latter is None for one seed. `difference` is to the mean of the first
    run; it is None in the first run, and if the first run has no mean. `best` says that no other run's mean is higher
    and at least one is lower.
    """
    order = {name: i for i, name in enumerate(STRUCTURES)}
    keys = sorted({key for run in compared for key in run.dice}, key=lambda k: (k[0], k[1], order.get(k[2], 9), k[2]))
    table = []
    for key in keys:
        means = {i: statistics.fmean(run.dice[key]) for i, run in enumerate(compared) if key in run.dice}
        for i, mean in means.items():
            values = compared[i].dice[key]
            numbers = {
                "seeds": len(values),
                "dice_mean": mean,
                "dice_sd": statistics.stdev(values) if len(values) > 1 else None,
                "difference": mean - means[0] if i and 0 in means else None,
                "best": mean == max(means.values()) > min(means.values()),
            }
            table.append({"run": compared[i].name, **dict(zip(FIELDS[1:4], key, strict=True)), **numbers})
    return table


def differences(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Parameters and fingerprints in which an arm differs between runs.

    Keys of a row: field, arms (all arms that differ in the same way), values ({run: value}; None if the field is not
    set there or the run lacks the arm).
    """
    grouped: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for arm in sorted({arm for run in compared for arm in run.made}):
        having = [run.made[arm] for run in compared if arm in run.made]
        for field in sorted({field for facts in having for field in facts}):
            if len({facts.get(field) for facts in having}) > 1:
                values = tuple(run.made.get(arm, {}).get(field) for run in compared)
                grouped.setdefault((field, values), []).append(arm)
    return [
        {"field": field, "arms": arms, "values": dict(zip([run.name for run in compared], values, strict=True))}
        for (field, values), arms in sorted(grouped.items(), key=lambda item: item[0][0])
    ]


def dice_table(compared: Sequence[Compared]) -> Table:
    """`rows` for a terminal: one column per run, the best in bold."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    for name in ("arm", "vendor", "structure"):
        table.add_column(name, no_wrap=True)
    for run in compared:
        seeds = "–".join(map(str, sorted({len(values) for values in run.dice.values()})))
        heading = f"{escape(run.name)}\n{seeds} seed{'' if seeds == '1' else 's'}"
        table.add_column(heading, justify="right", no_wrap=True)
    cells: dict[Key, dict[str, str]] = {}
    for row in rows(compared):
        cells.setdefault((row["arm"], row["vendor"], row["structure"]), {})[row["run"]] = _cell(row)
    before: Key = ("", "", "")
    for key, by_run in cells.items():
        arm, vendor = key[0] if key[0] != before[0] else "", key[1] if key[:2] != before[:2] else ""
        table.add_row(arm, escape(vendor), key[2], *(by_run.get(run.name, "–") for run in compared))
        before = key
    return table


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{row['dice_mean']:.3f}"
    if row["dice_sd"] is not None:
        text += f" ± {row['dice_sd']:.3f}"
    if row["difference"] is not None:
        text += f" ({round(row['difference'], 3) + 0.0:+.3f})"  # never -0.000
    return f"[bold]{text}[/bold]" if row["best"] else text


def weight(compared: Sequence[Compared]) -> str:
    """A line on what these numbers can prove. MLflow has no Dice of single subjects, so nothing is tested here."""
    few = trainings(min((len(values) for run in compared for values in run.dice.values()), default=FEWEST_SEEDS))
    remedy = "verdicts, paired by subject, are in the report of each run"
    return f"{few}; a verdict needs {FEWEST_SEEDS} seeds" if few else f"means over seeds, not tested: {remedy}"


def difference_table(compared: Sequence[Compared]) -> Table:
    """`differences` for a terminal: one column per run."""
    from rich.markup import escape
    from rich.table import Table

    everywhere = sorted({arm for run in compared for arm in run.made})
    table = Table(box=None)
    for name in ("field", "arms", *(run.name for run in compared)):
        table.add_column(escape(name), overflow="fold")
    for row in differences(compared):
        arms = "all" if row["arms"] == everywhere else ", ".join(row["arms"])
        table.add_row(row["field"], arms, *(escape(value or "–") for value in row["values"].values()))
    return table
