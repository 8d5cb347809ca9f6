"""Read from a run folder what a report needs. The run may be complete or under way, or have failed arms."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from actors.train_job import HISTORY, read_records
from experiments.report.paper_table import arm_label, arm_order
from pipeline.scores.tables import read_cases, read_slices, read_trust
from storage import fs

if TYPE_CHECKING:
    from pipeline.scores.examples import Example


@dataclass
class RunFiles:
    """What was read from a run. Rows are dictionaries; arms come in the paper's order, keys are (arm, seed)."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    slices: list[dict[str, Any]] = field(default_factory=list)
    trust: list[dict[str, Any]] = field(default_factory=list)
    examples: dict[tuple[str, int], dict[str, Example]] = field(default_factory=dict)
    histories: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)
    networks: dict[tuple[str, int], str] = field(default_factory=dict)  # fingerprints
    evaluated: dict[str, list[int]] = field(default_factory=dict)  # {arm: seeds that have cases}
    subjects: list[dict[str, Any]] = field(default_factory=list)  # subject, vendor, split, labelled, pixel_area_mm2
    skipped: list[dict[str, str]] = field(default_factory=list)
    splits: list[dict[str, str]] = field(default_factory=list)
    configuration: str = ""


def collect(run_uri: str, only: Collection[tuple[str, int]] | None) -> RunFiles:
    """Read a run folder. `only` are the (arm, seed) whose files count; None for all.

    The configuration is read from `report/config.yaml`, because the run's own may name the places of data.
    """
    run = RunFiles()
    arms = fs.join(run_uri, "arms")
    for arm in sorted(_names(arms), key=arm_order):
        for name in _names(fs.join(arms, arm)):
            if name.startswith("seed") and name[4:].isdigit() and (only is None or (arm, int(name[4:])) in only):
                _collect_arm(run, fs.join(arms, arm, name), arm, int(name[4:]))
    run.skipped, run.splits = (_read_csv(fs.join(run_uri, name)) for name in ("skipped.csv", "splits.csv"))
    run.subjects = _subjects(fs.join(run_uri, "slices.parquet"))
    shareable = fs.join(run_uri, "report", "config.yaml")
    run.configuration = fs.read_text(shareable) if fs.exists(shareable) else ""
    return run


def _collect_arm(run: RunFiles, folder: str, arm: str, seed: int) -> None:
    from pipeline.scores.examples import unpack

    here = set(fs.list_names(folder))
    if "history.jsonl" in here:
        run.histories[arm, seed] = read_records(fs.join(folder, HISTORY))
    if "cases.csv" not in here:
        return
    run.cases += read_cases(fs.join(folder, "cases.csv"))
    run.evaluated.setdefault(arm, []).append(seed)
    if "slices.csv" in here:
        run.slices += read_slices(fs.join(folder, "slices.csv"))
    if "trust.csv" in here:  # an earlier version did not write it
        run.trust += read_trust(fs.join(folder, "trust.csv"))
    if "examples.npz" in here:
        run.examples[arm, seed] = unpack(fs.read_bytes(fs.join(folder, "examples.npz")))
    if "model.json" in here:
        run.networks[arm, seed] = json.loads(fs.read_text(fs.join(folder, "model.json")))["fingerprint"]


def arm_states(run: RunFiles, arms: Sequence[str], problems: Mapping[str, str]) -> list[dict[str, str]]:
    """How far each arm came (label, state, words), for `arms` and all others that have files."""
    states = []
    for arm in sorted({*arms, *run.evaluated, *(arm for arm, _ in run.histories)}, key=arm_order):
        seeds = run.evaluated.get(arm, [])
        started = [seed for name, seed in run.histories if name == arm and seed not in seeds]
        parts = [f"evaluated (seed {', '.join(map(str, seeds))})"] if seeds else []
        parts += [f"trained, not evaluated (seed {', '.join(map(str, started))})"] if started else []
        state = "failed" if arm in problems else "done" if seeds and not started else "partial" if parts else "missing"
        words = problems.get(arm) or "; ".join(parts) or "not run"
        states.append({"label": arm_label(arm), "state": state, "words": words})
    return states


def split_counts(splits: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """{vendor: {split: number of subjects}}."""
    counts: dict[str, dict[str, int]] = {}
    for row in splits:
        vendor = counts.setdefault(row["vendor"], dict.fromkeys(("train", "validation", "test", "excluded"), 0))
        vendor[row["split"]] = vendor.get(row["split"], 0) + 1
    return dict(sorted(counts.items()))


def failures(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Structures that were missed or invented. The same failure of several arms is one row.

    Keys: subject, vendor, phase, structure, kind (missed or invented), ml (the volume that was missed, or that was
    invented on average), volumes, runs, arms. Rows with the most runs come first.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in cases:
        if case["missed"]:
            kind = "missed" if case["predicted_ml"] == 0 else "invented"
            whose = {key: case[key] for key in ("subject", "vendor", "phase", "structure")} | {"kind": kind}
            row = found.setdefault(tuple(whose.values()), whose | {"volumes": [], "runs": []})
            row["volumes"].append(max(case["reference_ml"], case["predicted_ml"]))
            row["runs"].append((case["arm"], case["seed"]))
    rows = [
        row | {"ml": sum(row["volumes"]) / len(row["volumes"]), "arms": _arms_and_seeds(row["runs"])}
        for row in found.values()
    ]
    return sorted(rows, key=lambda row: (-len(row["runs"]), row["vendor"], row["subject"], row["phase"]))


def cut_off(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reference structures that lie partly outside the network's field of view, the worst first.

    Keys: subject, vendor, phase, structure, outside (the share outside, 0 to 1; the largest of all arms).
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in cases:
        if case["outside"] > 0:
            whose = {key: case[key] for key in ("subject", "vendor", "phase", "structure")}
            row = found.setdefault(tuple(whose.values()), whose | {"outside": 0.0})
            row["outside"] = max(row["outside"], case["outside"])
    return sorted(found.values(), key=lambda row: -row["outside"])


def _arms_and_seeds(runs: Sequence[tuple[str, int]]) -> str:
    """The labels of arms, with the number of seeds if several seeds of an arm failed alike."""
    counts: dict[str, int] = {}
    for arm, _ in sorted(runs, key=lambda run: arm_order(run[0])):
        counts[arm] = counts.get(arm, 0) + 1
    return ", ".join(arm_label(arm) + (f" ({n} seeds)" if n > 1 else "") for arm, n in counts.items())


def _names(folder: str) -> list[str]:
    return sorted(PurePosixPath(name).name for name in fs.list_names(folder)) if fs.exists(folder) else []


def _read_csv(source: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(fs.read_text(source)))) if fs.exists(source) else []


def _subjects(source: str) -> list[dict[str, Any]]:
    """One row per subject from the slices' index: vendor, split, pixel area (mm²), and whether a slice is labelled."""
    if not fs.exists(source):
        return []
    from storage.parquet import read_parquet

    table = read_parquet(fs.read_bytes(source), ["subject", "vendor", "split", "labelled", "pixel_area_mm2"])
    subjects: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        seen = subjects.setdefault(row["subject"], row)
        seen["labelled"] = seen["labelled"] or row["labelled"]
    return list(subjects.values())
