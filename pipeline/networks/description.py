"""`model.json`, the description of a network: read and written without torch, so that queries start quickly."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from storage import fs
from storage.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "model.json"
# The fingerprint covers these fields of the description. All other fields may change later.
IDENTITY = ("kind", "network", "preprocess", "terms", "trained_on")


def fingerprint(weights: bytes, config_json: str) -> str:
    """A network's name, derived from its content: the first 16 hex digits of SHA-256 over configuration and weights.

    `weights` are safetensors bytes, `config_json` is what `identity_of` returns.
    """
    return hashlib.sha256(config_json.encode() + b"\0" + weights).hexdigest()[:16]


def subject_key(subject: str) -> str:
    """A name for a subject that hides its code in a network's description: the first 12 hex digits of SHA-256."""
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def write_config(folder: str, document: dict[str, Any]) -> None:
    """Write `document` as `model.json` into `folder`."""
    fs.write_text(fs.join(folder, CONFIG), json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False))


def identity_of(document: dict[str, Any]) -> str:
    """The fields of the description that the network's fingerprint covers (`IDENTITY`), as JSON with sorted keys."""
    return json.dumps({key: document[key] for key in IDENTITY if key in document}, sort_keys=True)


def read_config(folder: str) -> dict[str, Any]:
    """Read `model.json`. Raises InputError if the file is absent, is no JSON, or describes neither an SDNet nor a
    U-Net."""
    path = fs.join(folder, CONFIG)
    if not fs.exists(path):
        raise InputError(path, "no trained network here", "train it first, or give the folder that holds model.json")
    try:
        document = json.loads(fs.read_text(path))
        whole = {"network", "preprocess", "fingerprint"} <= document.keys() and isinstance(document["network"], dict)
        if document["kind"] not in ("sdnet", "unet") or not whole:
            raise ValueError("it lacks what describes a network")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(path, "not a cardiomix model description", "train again or restore the file") from error
    return dict(document)


def vendors_seen(document: dict[str, Any]) -> list[str]:
    """The vendors that a network, and the networks that it started from, were trained and validated on."""
    data = document.get("about", {}).get("data", {})
    return sorted({vendor for part in ("train", "validation", "start") for vendor in data.get(part, ())})


def sdnet_fingerprint(folder: str) -> str:
    """The network's `fingerprint`, as recorded in `model.json`. Raises InputError as `read_config` does."""
    return str(read_config(folder)["fingerprint"])
