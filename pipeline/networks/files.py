"""Networks on disk: `model.safetensors` and `model.json` in one folder, local or on fsspec. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import nn

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.description import (
    CONFIG,
    WEIGHTS,
    fingerprint,
    identity_of,
    read_config,
    subject_key,
    write_config,
)
from pipeline.networks.sdnet import Decoder, SDNet
from pipeline.networks.unet import UNet
from storage import fs
from storage.errors import InputError
from storage.identity import identity


def build(config: UNetConfig | SDNetConfig) -> UNet | SDNet:
    """Make an untrained network of this configuration."""
    return SDNet(config) if isinstance(config, SDNetConfig) else UNet(config.width, config.classes, config.deep)


def weights_of(model: nn.Module) -> bytes:
    """The model's state as safetensors bytes. Entries are sorted by name, so that equal weights give equal bytes."""
    return save({k: v.detach().cpu().contiguous() for k, v in sorted(model.state_dict().items())})


def save_model(
    folder: str,
    model: nn.Module,
    config: UNetConfig | SDNetConfig,
    preprocess: dict[str, Any],
    terms: list[str],
    trained_on: Iterable[str] = (),
    about: dict[str, Any] | None = None,
    masks_of: Iterable[str] = (),
    start: Mapping[str, Any] | None = None,
) -> str:
    """Write weights and description, and return the fingerprint. `model.json` comes last and marks completeness.

    `trained_on` names the training and validation subjects, `masks_of` those whose masks were used. Only their keys
    (`subject_key`) are stored. With them a later run can refuse to test on such a subject, or to use a network that has
    seen masks which the run withholds. `start` is the `model.json` of the network that training started from; its keys
    are kept too. `terms` are the terms of the data. `about` describes the network to its users
    (see `pipeline.inference.model_card`).
    """
    weights = weights_of(model)
    kind = "sdnet" if isinstance(config, SDNetConfig) else "unet"
    document = {
        "kind": kind,
        "network": identity(config),
        "preprocess": preprocess,
        "terms": terms,
        "trained_on": _keys(trained_on, start, "trained_on"),
    }
    name = fingerprint(weights, identity_of(document))
    fs.write_bytes(fs.join(folder, WEIGHTS), weights)
    labelled = _keys(masks_of, start, "masks_of")
    write_config(folder, {**document, "about": about or {}, "masks_of": labelled, "fingerprint": name})
    return name


def _keys(subjects: Iterable[str], start: Mapping[str, Any] | None, field: str) -> list[str]:
    """The keys of the subjects and those that an earlier description has in a field, sorted."""
    return sorted({*map(subject_key, subjects), *(start or {}).get(field, ())})


def load_model(folder: str) -> tuple[UNet | SDNet, dict[str, Any]]:
    """Load a network, on the CPU and in eval mode, and its `model.json`.

    Raises InputError if a file is absent, `model.json` is no description of a network, or the weights do not have the
    fingerprint that it records.
    """
    document, path = read_config(folder), fs.join(folder, WEIGHTS)
    try:
        config = (SDNetConfig if document["kind"] == "sdnet" else UNetConfig)(**document["network"])
    except ValidationError as error:
        problem = f"describes no network of this version ({error.errors()[0]['msg']})"
        raise InputError(fs.join(folder, CONFIG), problem, "restore the file or train again") from error
    model = build(config)
    try:
        weights = fs.read_bytes(path)
        if fingerprint(weights, identity_of(document)) != document["fingerprint"]:
            raise InputError(
                path, "weights are not the ones model.json names", "restore both files from the same training"
            )
        model.load_state_dict(load(weights))
    except FileNotFoundError as error:
        raise InputError(path, "weights are missing", "restore the file or train again") from error
    return model.eval(), document


def load_sdnet(folder: str) -> SDNet:
    """Load a trained SDNet in eval mode. Raises InputError as `load_model` does, or if the folder holds a U-Net."""
    model, _ = load_model(folder)
    if not isinstance(model, SDNet):
        raise InputError(folder, "holds a U-Net, not an SDNet", "give the folder of a pretrained SDNet")
    return model


def decoder_state(model: SDNet) -> tuple[bytes, dict[str, Any]]:
    """The decoder's weights as safetensors bytes, and the SDNet's configuration: all that FA needs besides factors."""
    return weights_of(model.decoder), identity(model.config)


def load_decoder(weights: bytes, config: dict[str, Any]) -> Decoder:
    """Load the decoder from what `decoder_state` returned, in eval mode and without gradients."""
    decoder = Decoder(SDNetConfig(**config))
    decoder.load_state_dict(load(weights))
    return decoder.eval().requires_grad_(False)


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
