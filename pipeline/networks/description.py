"""What `model.json` says of a network: read and written without torch, for whoever only asks."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from storage import fs
from storage.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "model.json"
# Of the description, what the network's fingerprint is taken over; all else may be added to later.
IDENTITY = ("kind", "network", "preprocess", "terms", "trained_on")


def fingerprint(weights: bytes, config_json: str) -> str:
    """Name of a network by its content: first 16 hex digits of SHA-256 over configuration and safetensors bytes."""
    return hashlib.sha256(config_json.encode() + b"\0" + weights).hexdigest()[:16]


def subject_key(subject: str) -> str:
    """Names a subject in a network's description without giving its code away: 12 hex digits of SHA-256."""
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def write_config(folder: str, document: dict[str, Any]) -> None:
    """Write `model.json`."""
    fs.write_text(fs.join(folder, CONFIG), json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False))


def identity_of(document: dict[str, Any]) -> str:
    """The part of the description that the network's fingerprint is taken over, as JSON."""
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


def sdnet_fingerprint(folder: str) -> str:
    """The name of the network by its content, as `model.json` records it."""
    return str(read_config(folder)["fingerprint"])
