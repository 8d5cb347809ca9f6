"""Networks on disk: `model.safetensors` and `model.json` in one folder, local or fsspec; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from pipeline.networks.sdnet import Decoder, SDNet, SDNetConfig, fingerprint
from pipeline.networks.unet import UNet, UNetConfig
from storage import fs
from storage.errors import InputError
from storage.identity import identity

WEIGHTS, CONFIG = "model.safetensors", "model.json"
# Of the description, what the network's fingerprint is taken over; all else may be added to later.
IDENTITY = ("kind", "network", "preprocess", "terms", "trained_on")


def build(config: UNetConfig | SDNetConfig) -> UNet | SDNet:
    """An untrained network of this configuration."""
    return SDNet(config) if isinstance(config, SDNetConfig) else UNet(config.width, config.classes)


def weights_of(model: nn.Module) -> bytes:
    """The model's state as safetensors bytes, contiguous, on the CPU, in a stable order."""
    return save({k: v.detach().cpu().contiguous() for k, v in sorted(model.state_dict().items())})


def subject_key(subject: str) -> str:
    """Names a subject in a network's description without giving its code away: 12 hex digits of SHA-256."""
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def save_model(
    folder: str,
    model: nn.Module,
    config: UNetConfig | SDNetConfig,
    preprocess: dict[str, Any],
    terms: list[str],
    trained_on: Iterable[str] = (),
    about: dict[str, Any] | None = None,
    masks_of: Iterable[str] = (),
) -> str:
    """Write weights and configuration; returns the fingerprint. The configuration goes last: it marks completeness.

    `trained_on` names the training and validation subjects that made the weights, `masks_of` those whose masks it
    learned from; their keys are kept, so that a run can tell that it would test on one of them, or trains without a
    mask that the network has seen. `about` is for who uses the network (see `pipeline.inference.model_card`).
    """
    weights = weights_of(model)
    kind = "sdnet" if isinstance(config, SDNetConfig) else "unet"
    document = {
        "kind": kind,
        "network": identity(config),
        "preprocess": preprocess,
        "terms": terms,
        "trained_on": sorted(map(subject_key, set(trained_on))),
    }
    name = fingerprint(weights, _identity(document))
    fs.write_bytes(fs.join(folder, WEIGHTS), weights)
    labelled = sorted(map(subject_key, set(masks_of)))
    write_config(folder, {**document, "about": about or {}, "masks_of": labelled, "fingerprint": name})
    return name


def write_config(folder: str, document: dict[str, Any]) -> None:
    """Write `model.json`."""
    fs.write_text(fs.join(folder, CONFIG), json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False))


def _identity(document: dict[str, Any]) -> str:
    return json.dumps({key: document[key] for key in IDENTITY if key in document}, sort_keys=True)


def read_config(folder: str) -> dict[str, Any]:
    """The document `model.json`. Raises InputError if absent or not ours."""
    path = fs.join(folder, CONFIG)
    if not fs.exists(path):
        raise InputError(path, "no trained network here", "train it first, or give the folder that holds model.json")
    try:
        document = json.loads(fs.read_text(path))
        if document["kind"] not in ("sdnet", "unet"):
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "not a cardiomix model description", "train again or restore the file") from error
    return dict(document)


def load_model(folder: str) -> tuple[UNet | SDNet, dict[str, Any]]:
    """Network in eval mode and its document. Raises InputError on absent, damaged or mismatched files."""
    document, path = read_config(folder), fs.join(folder, WEIGHTS)
    config = (SDNetConfig if document["kind"] == "sdnet" else UNetConfig)(**document["network"])
    model = build(config)
    try:
        weights = fs.read_bytes(path)
        if fingerprint(weights, _identity(document)) != document["fingerprint"]:
            raise InputError(
                path, "weights are not the ones model.json names", "restore both files from the same training"
            )
        model.load_state_dict(load(weights))
    except FileNotFoundError as error:
        raise InputError(path, "weights are missing", "restore the file or train again") from error
    return model.eval(), document


def load_sdnet(folder: str) -> SDNet:
    """A trained SDNet in eval mode. Raises InputError if the folder holds another network."""
    model, _ = load_model(folder)
    if not isinstance(model, SDNet):
        raise InputError(folder, "holds a U-Net, not an SDNet", "give the folder of a pretrained SDNet")
    return model


def sdnet_fingerprint(folder: str) -> str:
    """The name of the network by its content, as `model.json` records it."""
    return str(read_config(folder)["fingerprint"])


def decoder_state(model: SDNet) -> tuple[bytes, dict[str, Any]]:
    """The decoder alone: safetensors bytes and its configuration; all that FA needs besides factors."""
    return weights_of(model.decoder), identity(model.config)


def load_decoder(weights: bytes, config: dict[str, Any]) -> Decoder:
    """The inverse of `decoder_state`, in eval mode."""
    decoder = Decoder(SDNetConfig(**config))
    decoder.load_state_dict(load(weights))
    return decoder.eval().requires_grad_(False)


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def default_device() -> torch.device:
    """A GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
