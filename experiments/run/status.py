"""Which parts of a run are done, under way, failed or missing. Reads files and starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments import config
from experiments.arms import ARMS
from experiments.run import jobs
from storage import fs
from storage.bank.bank import FactorBank
from storage.slices.store import TABLE, SliceStore

if TYPE_CHECKING:
    from actors.train_job import TrainJob
    from experiments.config import Settings


def status(run: str) -> list[tuple[str, str]]:
    """(stage or arm, state). A state is done, missing, `epoch k of n`, or failed with its reason.

    Raises InputError if there is no run.
    """
    settings = config.load(run)
    if not fs.exists(fs.join(run, TABLE)):
        return [("ingest", "missing")]
    settings = jobs.with_finished(run, settings)
    lines = [("ingest", f"done: {len(SliceStore.open(run))} slices")]
    if jobs.needs_sdnet(settings):
        lines += _bank_lines(run, settings)
    known = {r.label: r for r in jobs.arm_runs(run, jobs.trainable_settings(run, settings))}
    for label in (f"{arm}/seed{k}" for arm in settings.arms for k in range(settings.seeds)):
        if label not in known:
            lines.append(
                (
                    label,
                    "missing: it needs the " + ("bank" if ARMS[label.split("/")[0]].uses_bank else "pretrained SDNet"),
                )
            )
            continue
        reason = known[label].failure()
        if known[label].evaluated():
            lines.append((label, "done"))
        else:
            lines.append((label, f"failed: {reason}" if reason else _training(known[label].job)))
    lines.append(("report", "done" if fs.exists(fs.join(run, "report", "index.html")) else "missing"))
    return lines


def _bank_lines(run: str, settings: Settings) -> list[tuple[str, str]]:
    if settings.bank and not jobs.borrows_donors(run, settings):
        return [("bank", f"reused: {fs.base_name(settings.bank)}")]
    pretrained = settings.pretrained
    first = f"reused: {fs.base_name(pretrained)}" if pretrained else _training(jobs.pretrain_job(run, settings))
    bank = jobs.bank_uri(run, settings)
    if not jobs.needs_bank(settings):
        return [("pretrain", first)]
    if not fs.exists(bank):
        return [("pretrain", first), ("extract", "missing")]
    opened = FactorBank.open(bank, partial=True)
    shards = f"{len(opened.committed())} of {opened.shards()} shards"
    return [("pretrain", first), ("extract", f"done: {shards}" if opened.is_complete() else shards)]


def _training(job: TrainJob) -> str:
    if job.finished():
        return "done" if job.name not in ARMS else "trained, not evaluated"
    from actors.train_job import read_history

    records = read_history(job)
    return f"epoch {records[-1]['epoch']} of {job.train.epochs}" if records else "missing"
