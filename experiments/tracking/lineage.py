"""What a network was trained from, for MLflow: parameters, tags, data set and bank. No value names a folder or URI."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.config import Settings, shareable
from storage.identity import identity
from storage.parquet import different_texts, text_array
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

    from actors.train_job import TrainJob

SLICES, BANK = "slices", "factor bank"
PROTOCOL = (
    *("protocol", "protocol_vendor", "protocol_test_fraction", "label_fraction", "split_seed"),
    *("labelled_subjects", "adapt_fraction", "test_half"),
)
_CONTEXT = "mlflow.data.context"


def job_params(arm: str, seed: int, job: TrainJob) -> dict[str, str]:
    """Every setting that makes this network, under its name in `config.yaml`, and what the arm switches on.

    Each name has one value, so that it can be an axis of a parallel coordinates plot; a pair becomes `name.0` and
    `name.1`. Fields that are None are left out. `seed` is the number of the replicate, as in the tag.
    """
    stream = job.stream
    layouts = SliceStore.open(stream.run).layouts
    network = "sdnet" if hasattr(job.network, "anatomy_width") else "unet"
    train, loss = ("pretrain", "pretrain_loss") if job.name == "pretrain" else ("train", "loss")
    split_by = identity(layouts) if layouts is not None else {}
    tree: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "base_seed": stream.seed - seed,
        "network": network,
        "semi_supervised": stream.semi_supervised,
        "ra": stream.ra,
        "fa": stream.fa,
        network: job.network.model_dump(mode="json"),
        "layouts": {name: split_by.get(name) for name in PROTOCOL},
        "preprocess": stream.preprocess.model_dump(mode="json"),
        "plan": stream.plan.model_dump(mode="json"),
        loss: job.loss.model_dump(mode="json"),
        train: job.train.model_dump(mode="json"),
        "train_workers": job.workers,
    }
    return dict(_flat(tree))


def run_params(settings: Settings) -> dict[str, str]:
    """The run's configuration, for the parent run, under the names of its fields.

    Places are left out. So are arms and seeds, because another command may add some, and MLflow refuses to change a
    parameter.
    """
    tree = shareable(settings).model_dump(mode="json", exclude={"arms", "seeds"})
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def job_tags(job: TrainJob) -> dict[str, str]:
    """Fingerprints of the data, the bank and the SDNet that the network was trained from. MLflow can filter by them."""
    tags = {"data_fingerprint": job.data_fingerprint}
    if job.bank_fingerprint:
        tags |= {"bank_fingerprint": job.bank_fingerprint}
    if job.start_fingerprint:
        tags |= {"start_fingerprint": job.start_fingerprint}
    if job.stream.bank:
        tags |= {"sdnet_fingerprint": _bank(job.stream.bank)["sdnet_fingerprint"]}
    return tags


def job_inputs(job: TrainJob) -> list[DatasetInput]:
    """The slices, and the bank if there is one, as inputs of the MLflow run. Their digests are our fingerprints."""
    inputs = [_input(SLICES, job.data_fingerprint, "training", _slices(job.stream.run))]
    if job.stream.bank and job.bank_fingerprint:
        inputs.append(_input(BANK, job.bank_fingerprint, "augmentation", _bank(job.stream.bank)))
    return inputs


def _input(name: str, digest: str, context: str, profile: Mapping[str, Any]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow requires a source. A place would say where patients' data lie, and means nothing on another machine.
    source = json.dumps({"fingerprint": digest})
    dataset = Dataset(name, digest, "cardiomix", source, profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag(_CONTEXT, context)])


def _slices(run: str) -> dict[str, Any]:
    """The number of slices, the number of subjects by vendor and split, and the terms of the data."""
    store = SliceStore.open(run)
    vendor, split, subject = (store.column(name).tolist() for name in ("vendor", "split", "subject"))
    subjects = Counter(f"{v} {s}" for v, s, _ in set(zip(vendor, split, subject, strict=True)))
    return {"num_rows": len(store), "subjects": dict(sorted(subjects.items())), "terms": _data_terms(store.table)}


def _bank(bank: str) -> dict[str, Any]:
    from storage.bank.bank import FactorBank

    opened = FactorBank.open(bank, partial=True)
    vendors = Counter(text_array(opened.index["vendor"]).tolist())
    return {
        "num_rows": len(opened),
        "slices": dict(sorted(vendors.items())),
        "sdnet_fingerprint": opened.spec.sdnet_fingerprint,
        "channels": opened.spec.channels,
        "modality_size": opened.spec.modality_size,
        "terms": list(opened.spec.terms),
    }


def _data_terms(table: Any) -> list[str]:
    return different_texts(table["terms"])
